"""Two gloo processes with uneven data: the losses, gradients, metrics and training of one process."""

import json
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import run_in_processes
from tiny import CONFIGS, QUIET, RECORDS, addition_artifact, all_losses, tiny_artifact
from torch.nn.parallel import DistributedDataParallel

from cvae_lightning import losses as losses_
from cvae_lightning.backbones.artifact import Baseline, save_artifact
from cvae_lightning.backbones.causal_lm import build_causal_lm
from cvae_lightning.backbones.tokenizer import build_tokenizer
from cvae_lightning.callbacks import PartialGradients, StepSeed, StrategyEvaluation
from cvae_lightning.data import PairsDataModule, SyntheticDataModule
from cvae_lightning.data.tasks import MultidigitAddition
from cvae_lightning.modules import ContinuousCVAE, EntangledLM, SharedDiscreteCVAE
from cvae_lightning.template import PromptTemplate

SHARDS = (slice(0, 4), slice(4, None))  # four records here, one there, of other lengths
pytestmark = pytest.mark.filterwarnings("ignore:.*fingerprint.*")


BATCH_STATISTICS = ("router_marginal_kl_to_prior_loss", "aggregate_posterior_balance_loss")


class Step(torch.nn.Module):
    """The training step of a module as a forward pass, as DDP needs it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, records):
        if isinstance(self.module, EntangledLM):
            self.module.log = lambda *args, **kwargs: None
            total = self.module.training_step(self.module.template.collate(records), 0)
            return total, self.module.last_terms
        total, terms, _ = self.module._step(self.module.template.collate(records), "train")
        return total, terms


def step(build, rank):
    """Return the loss, the raw terms and the gradients; rank None is one process with all records."""
    model = Step(build()).train()
    wrapped = model if rank is None else DistributedDataParallel(model)
    total, terms = wrapped(RECORDS if rank is None else RECORDS[SHARDS[rank]])
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"total": total.detach(), "terms": {k: v.detach() for k, v in terms.items()}, "gradients": gradients}


def assert_equal_steps(build, folder):
    expected = step(build, None)
    scale = max(g.abs().max() for g in expected["gradients"].values())
    assert scale > 1e-2
    for found in run_in_processes(lambda rank: step(build, rank), folder):
        torch.testing.assert_close(found["total"], expected["total"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["terms"], expected["terms"], rtol=1e-5, atol=1e-6)
        assert found["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            error = (found["gradients"][name] - gradient).abs().max() / scale
            assert error < 1e-5, f"{name}: {error}"


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"posterior": "exact"}),
        ("llama", {"posterior": "exact", "branch_activations": "again", "norm_dim": 4}),
        ("llama", {"posterior": "amortized", "baseline": "dynamic", "pooling": "attention"}),
        ("qwen2", {"posterior": "exact", "posterior_temperature": 1.0, "branch_method": "repeat", "pooling": "last"}),
    ],
)
def test_uneven_batches_give_losses_and_gradients_of_the_union(tmp_path, family, options):
    folder = tiny_artifact(tmp_path / "artifact", family)

    def build():
        torch.manual_seed(3)
        return SharedDiscreteCVAE(folder, all_losses(), num_latents=3, **options)

    assert_equal_steps(build, tmp_path)


def test_entangled_model_on_uneven_batches(tmp_path):
    """The mean is over the tokens of the global batch, not over the means of the processes."""
    folder = tiny_artifact(tmp_path / "artifact")
    assert_equal_steps(lambda: EntangledLM(str(tmp_path / "out"), model=folder, max_gap=0), tmp_path)


def addition(**sizes):
    sizes = {"train_size": 64, "val_size": 7, "test_size": 7, **sizes}
    return SyntheticDataModule(MultidigitAddition(), **sizes)


def artifact_of(data, folder):
    """An untrained entangled model, far from uniform, that was measured on the data."""
    return addition_artifact(folder, scale=8, data=data.fingerprint("val"))


def evaluate(model, data, path, processes, callbacks=()):
    """Return the validation metrics; processes are forked, rank 0 leaves its metrics in a file."""
    options = {"devices": processes, "strategy": "ddp_fork"} if processes > 1 else {}
    trainer = L.Trainer(**QUIET, **options, callbacks=[Dump(path), *callbacks])
    trainer.validate(model, data, verbose=False)
    return json.loads(path.read_text())


class Dump(L.Callback):
    """Writes the metrics of rank zero, because nothing comes back from a forked process by itself."""

    def __init__(self, path):
        self.path = path

    def on_validation_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            self.path.write_text(json.dumps({k: float(v) for k, v in trainer.callback_metrics.items()}))


def assert_same_metrics(found, expected):
    assert found.keys() == expected.keys()
    for key in expected:
        assert found[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-6, nan_ok=True), key


def both(build_model, build_data, tmp_path, callbacks=lambda: []):
    results = []
    for processes in (1, 2):
        path = tmp_path / f"{processes}.json"
        results.append(evaluate(build_model(), build_data(), path, processes, callbacks()))
    return results


@pytest.mark.parametrize("batch_size", [1, 3])
def test_validation_over_uneven_shards_equals_one_process(tmp_path, batch_size):
    folder = artifact_of(addition(), tmp_path / "artifact")

    def model():
        torch.manual_seed(3)
        return SharedDiscreteCVAE(folder, all_losses(), num_latents=5)  # as many as strategies

    one, two = both(
        model,
        lambda: addition(eval_batch_size=batch_size),
        tmp_path,
        lambda: [StrategyEvaluation(num_examples=7, max_new_tokens=12)],
    )
    assert {"val/rho_recon", "val/alignment/one_to_one", "val/controlled/alignment_one_to_one"} <= one.keys()
    assert one["val/router/true_cross_entropy"] == pytest.approx(math.log(5))
    assert math.log(5) <= one["val/router/expected_cross_entropy"] < math.inf
    assert math.log(2) < one["val/router/cross_entropy"] < math.inf
    assert 0 <= one["val/router/calibration_error"] < 1
    assert {f"val/{name}" for name in (*BATCH_STATISTICS, "loss")} <= one.keys()  # of the split, not of its batches
    assert_same_metrics(two, one)


def test_validation_of_pairs_with_labels_equals_one_process(tmp_path):
    rows = [{"x": f"{i}", "y": f"{'ab'[i % 2]}{i}", "s": "odd" if i % 2 else "even"} for i in range(9)]
    rows[3]["s"] = ""  # unlabelled
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))

    def data():
        paths = {"train_path": str(tmp_path / "train.jsonl"), "val_path": str(tmp_path / "val.jsonl")}
        return PairsDataModule(**paths, strategy_column="s", batch_size=4, eval_batch_size=2)

    tokenizer = build_tokenizer(["0123456789abc"], "char")
    template = PromptTemplate(tokenizer)
    lm = build_causal_lm(CONFIGS["llama"], len(template), template.pad_id)
    save_artifact(tmp_path / "artifact", lm, tokenizer, Baseline(1.5, 10, "-", template.fingerprint()))

    def model():
        torch.manual_seed(3)
        names = ("free_energy_loss", "kl_prior_loss")
        return SharedDiscreteCVAE(str(tmp_path / "artifact"), {n: all_losses()[n] for n in names}, num_latents=2)

    with pytest.warns(UserWarning, match="inputs of val_path are in train_path too"):
        one, two = both(model, data, tmp_path)
    assert "val/alignment/one_to_one" in one
    assert_same_metrics(two, one)


def test_c_base_is_measured_over_all_processes(tmp_path):
    folder = artifact_of(addition(), tmp_path / "artifact")
    (tmp_path / "artifact/baseline.json").unlink()
    chosen = {"free_energy_loss": losses_.FreeEnergyLoss()}

    def model():
        torch.manual_seed(3)
        return SharedDiscreteCVAE(folder, chosen, num_latents=3)

    one, two = both(model, lambda: addition(eval_batch_size=2), tmp_path)
    assert one["val/rho_recon"] > 0
    assert_same_metrics(two, one)


def fit(model, data, path, processes, callbacks=(), ckpt_path=None, **options):
    """Return the weights after training, as rank zero saved them."""
    options |= {"devices": processes, "strategy": "ddp_fork"} if processes > 1 else {}
    options = QUIET | {"max_steps": 3, "limit_val_batches": 0} | options
    trainer = L.Trainer(**options, callbacks=[Weights(path), *callbacks])
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return torch.load(path, weights_only=True)


class Weights(L.Callback):
    """Writes the weights of rank zero when training ends."""

    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            torch.save(pl_module.state_dict(), self.path)


def test_training_on_two_processes_is_training_on_batches_of_twice_the_size(tmp_path):
    folder = artifact_of(addition(), tmp_path / "artifact")
    weights = []
    for processes, batch_size in ((1, 8), (2, 4)):
        torch.manual_seed(3)
        model = SharedDiscreteCVAE(folder, all_losses(), num_latents=3, warmup_steps=1)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        weights.append(fit(model, addition(batch_size=batch_size), tmp_path / f"{processes}.pt", processes))
    moved = max((weights[0][name] - start[name]).abs().max() for name in start if start[name].is_floating_point())
    assert moved > 1e-3
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=2e-2 * float(moved), msg=name)


class Switch(L.Callback):
    """Gives a term the weight 1 from the third optimizer step on, and 0 before."""

    def __init__(self, name):
        self.name = name

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.losses[self.name].weight = float(trainer.global_step >= 2)


def test_a_posterior_network_that_waits_for_its_term_trains_as_on_one_process(tmp_path):
    """Until then no weight decay touches it, and its moments do not begin."""
    folder = artifact_of(addition(), tmp_path / "artifact")
    chosen = ("free_energy_loss", "posterior_distillation_loss")
    weights = []
    for processes, batch_size in ((1, 8), (2, 4)):
        torch.manual_seed(3)
        losses = {name: all_losses()[name] for name in chosen}
        model = SharedDiscreteCVAE(folder, losses, num_latents=3, warmup_steps=1, weight_decay=0.1)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        path, data = tmp_path / f"{processes}.pt", addition(batch_size=batch_size)
        weights.append(fit(model, data, path, processes, [Switch(chosen[1])], max_steps=4))
    moved = max((weights[0][name] - start[name]).abs().max() for name in start if name.startswith("posterior_network"))
    assert moved > 1e-4
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=2e-2 * float(moved), msg=name)


@pytest.mark.parametrize("steps", [2, 4])
def test_a_gaussian_router_that_only_a_term_of_weight_0_reads_stays_until_it_counts(tmp_path, steps):
    folder = artifact_of(addition(), tmp_path / "artifact")
    losses = {"reconstruction_loss": losses_.ReconstructionLoss(), "kl_prior_loss": losses_.PriorKLLoss(0.0)}
    torch.manual_seed(3)
    options = {"latent_dim": 2, "posterior": "reparameterized", "warmup_steps": 1, "weight_decay": 0.1}
    model = ContinuousCVAE(folder, losses, **options)
    torch.nn.init.normal_(model.router_head.weight)
    start = model.router_head.weight.detach().clone()
    data = addition(batch_size=4)
    found = fit(model, data, tmp_path / "found.pt", 2, [Switch("kl_prior_loss")], max_steps=steps)
    assert torch.equal(found["router_head.weight"], start) == (steps == 2)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_two_processes_resume_in_the_middle_of_gradient_accumulation(tmp_path):
    folder = artifact_of(addition(), tmp_path / "artifact")
    options = {"accumulate_grad_batches": 2, "val_check_interval": 3, "limit_val_batches": 1}

    def weights(name, **more):
        torch.manual_seed(3)
        model = SharedDiscreteCVAE(folder, all_losses(), num_latents=3, warmup_steps=1)
        save = ModelCheckpoint(tmp_path / name, "{step}", save_top_k=-1, every_n_epochs=1, monitor="val/elbo")
        callbacks = [StepSeed(0), PartialGradients(), save]
        data = addition(batch_size=4, eval_batch_size=2)
        return fit(
            model,
            data,
            tmp_path / f"{name}.pt",
            2,
            callbacks,
            **QUIET | options | {"enable_checkpointing": True, "default_root_dir": tmp_path},
            **more,
        )

    whole = weights("whole")
    middle = tmp_path / "whole/step=1.ckpt"
    assert torch.load(middle, weights_only=True)["accumulated_gradients"]
    resumed = weights("resumed", ckpt_path=middle)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-6, msg=name)
