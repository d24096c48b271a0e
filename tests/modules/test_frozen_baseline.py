"""How often the entangled model is run in training: once per record, whatever happens in between."""

import pytest
import torch
from lightning import Trainer, seed_everything
from tiny import tiny_artifact

from cvae_lightning.backbones.baseline_cache import HEADER, ROW, BaselineCache
from cvae_lightning.backbones.causal_lm import decoder_of, load_tokenizer
from cvae_lightning.data import SyntheticDataModule
from cvae_lightning.data.tasks import MultidigitAddition
from cvae_lightning.functional import latent_head
from cvae_lightning.losses import ReconstructionLoss, TokenWeightedReconstructionLoss
from cvae_lightning.modules import SharedDiscreteCVAE, compared
from cvae_lightning.template import PromptTemplate


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("entangled"), "llama", data=data().fingerprint("val"))


class Counted(SharedDiscreteCVAE):
    """Counts runs of the frozen model, by the step they happen in."""

    def free_token_nll(self, lm, batch, *args):
        if lm is not self.lm:
            self.runs = [*getattr(self, "runs", []), self.global_step]
        return super().free_token_nll(lm, batch, *args)


def data(size=22):
    return SyntheticDataModule(MultidigitAddition(), train_size=size, val_size=5, test_size=3, batch_size=4)


def fit(artifact, root, epochs=3, module=None, devices=1, strategy="auto", **options):
    seed_everything(3)
    options.setdefault("baseline_cache", str(root / "baseline_cache"))
    if module is None:
        losses = {"reconstruction_loss": ReconstructionLoss(), "weighted": TokenWeightedReconstructionLoss()}
        module = Counted(artifact, losses, num_latents=2, learning_rate=1e-2, **options)
    trainer = Trainer(
        default_root_dir=root,
        max_epochs=epochs,
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, datamodule=data())
    return module, trainer


def test_the_entangled_model_is_run_once_per_record_and_then_gone(artifact, tmp_path, monkeypatch):
    module, _ = fit(artifact, tmp_path)
    steps = 22 // 4
    assert max(module.runs) == steps  # the 2 records left over by the first epoch came at its end
    assert not module._reference
    assert {path.name.split("-")[0] for path in (tmp_path / "baseline_cache").iterdir()} == {"train", "val"}

    # a second run finds everything, and does not even load the model
    losses, folder = {"weighted": TokenWeightedReconstructionLoss()}, str(tmp_path / "baseline_cache")
    again = Counted(artifact, losses, num_latents=2, baseline_cache=folder)
    monkeypatch.setattr(compared, "load_causal_lm", None)
    fit(artifact, tmp_path, module=again)
    assert not hasattr(again, "runs")


def test_cached_and_computed_training_agree(artifact, tmp_path):
    cached, _ = fit(artifact, tmp_path / "a")
    computed, _ = fit(artifact, tmp_path / "b", baseline_cache=False)
    assert len(computed.runs) > len(cached.runs)
    assert not (tmp_path / "b" / "baseline_cache").exists()
    for (name, a), b in zip(cached.named_parameters(), computed.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=name)


def test_an_interrupted_run_leaves_a_cache_that_changes_nothing(artifact, tmp_path):
    whole, _ = fit(artifact, tmp_path / "a")

    class Killed(Counted):
        def on_train_batch_start(self, batch, batch_idx):
            if self.global_step == 3:
                raise RuntimeError("killed")

    losses = {"reconstruction_loss": ReconstructionLoss(), "weighted": TokenWeightedReconstructionLoss()}
    options = {"num_latents": 2, "learning_rate": 1e-2, "baseline_cache": str(tmp_path / "b" / "baseline_cache")}
    seed_everything(3)
    killed = Killed(artifact, losses, **options)
    with pytest.raises(RuntimeError, match="killed"):
        fit(artifact, tmp_path / "b", module=killed)
    (file,) = (tmp_path / "b" / "baseline_cache").glob("train-*/*.rows")
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.warns(UserWarning, match="breaks off"):
        resumed, _ = fit(artifact, tmp_path / "b")
    assert len(resumed.runs) < len(whole.runs)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_other_data_template_or_model_is_another_cache(artifact, tmp_path):
    fit(artifact, tmp_path, epochs=1)
    other = tiny_artifact(tmp_path / "other", "llama", seed=9, data=data().fingerprint("val"))
    for i, options in enumerate([{}, {"padding_side": "right"}]):
        module, _ = fit(other if i == 0 else artifact, tmp_path, epochs=1, **options)
        assert hasattr(module, "runs") == (i == 0)  # the side of padding is no matter of the tokens


def test_work_of_a_step_is_what_the_shared_prefix_needs(artifact, monkeypatch):
    """Tokens read by the backbone and rows of the head, counted."""
    torch.manual_seed(0)
    module = SharedDiscreteCVAE(artifact, {"reconstruction_loss": ReconstructionLoss()}, num_latents=5)
    datamodule = data()
    datamodule.template = module.template
    batch = next(iter(datamodule.val_dataloader()))
    module.eval()
    module._step(batch, "train")  # the one-time check of the branch method
    tokens, rows, plain_head = [], [], latent_head._plain_head

    def head(*arguments):
        nll, jsd = plain_head(*arguments)
        rows.append(nll.numel())  # one for every row of logits
        return nll, jsd

    decoder_of(module.lm).register_forward_pre_hook(
        lambda m, a, k: tokens.append(k["position_ids"].numel()), with_kwargs=True
    )
    monkeypatch.setattr(latent_head, "_plain_head", head)
    module._step(batch, "train")
    (size, width), length = batch.prefix_ids.shape, batch.y_ids.shape[1]
    assert sum(tokens) == size * (width + 1) + size * 5 * (length + 2)  # <z>; z_k </z> <y> y without its last token
    assert rows == [5 * int(batch.y_mask.sum())]  # supervised positions alone
    assert not module._reference


def test_ranks_share_the_work_and_the_result(artifact, tmp_path):
    alone, both = tmp_path / "alone", tmp_path / "both"
    fit(artifact, alone, epochs=2, posterior="amortized")
    fit(artifact, both, epochs=2, devices=2, strategy="ddp_fork", posterior="amortized")
    caches = {}
    for root in (alone, both):
        (folder,) = (root / "baseline_cache").glob("train-*")
        assert len(list(folder.iterdir())) == (1 if root == alone else 2)
        caches[root] = BaselineCache(folder, folder.name.removeprefix("train-"), 22)
        assert caches[root].missing(range(22)) == []
    template = PromptTemplate(load_tokenizer(artifact))
    batch = template.collate([data().records("train")[i] for i in range(22)])
    rows = [cache.rows(batch.index, batch.y_mask, lambda: pytest.fail("not cached")) for cache in caches.values()]
    torch.testing.assert_close(*rows, atol=1e-5, rtol=1e-5)
    written = sum(len(f.read_bytes()) for f in folder.iterdir())
    assert written == 2 * HEADER.size + 22 * ROW.size + 4 * int(batch.y_mask.sum())  # no record twice
