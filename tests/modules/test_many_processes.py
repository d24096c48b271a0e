"""Two and four gloo processes, under DDP and FSDP2, as torchrun and SLURM start them: one process with all the data."""

import json
import multiprocessing
import os
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from forked_commands import environments, exit_code
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from processes import run_in_processes
from tiny import QUIET, RECORDS, addition_artifact, all_losses, tiny_artifact
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from cvae_lightning import losses as losses_
from cvae_lightning.callbacks import AtomicCheckpointIO, PartialGradients, StepSeed, StrategyEvaluation
from cvae_lightning.data import SyntheticDataModule
from cvae_lightning.data.tasks import MultidigitAddition
from cvae_lightning.modules import ContinuousCVAE, EntangledLM, SharedDiscreteCVAE
from cvae_lightning.modules.sharding import is_sharded

pytestmark = pytest.mark.filterwarnings("ignore:.*fingerprint.*", "ignore:.*The dirpath has changed.*")
SHARDS = (slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5))  # of RECORDS, for four processes


class Step(torch.nn.Module):
    """The training step of a module as a forward pass, as DDP needs it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, records):
        return self.module._step(self.module.template.collate(records), "train")[:2]


def step(build, strategy, rank):
    """Return the loss, the raw terms and the gradients; rank None is one process with all records."""
    model, records = build().train(), RECORDS if rank is None else RECORDS[SHARDS[rank]]
    if strategy == "fsdp" and rank is not None:
        model._device_mesh = init_device_mesh("cpu", (4, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
        model.configure_model()
        assert sum(map(is_sharded, model.modules())) == 5  # two layers of each language model, and the rest
        register_fsdp_forward_method(model, "_step")
    wrapped = Step(model)
    if strategy == "ddp" and rank is not None:
        wrapped = DistributedDataParallel(wrapped)
    total, terms = wrapped(records)
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    if strategy == "fsdp" and rank is not None:
        gradients = {name: gradient.full_tensor() for name, gradient in gradients.items()}
    return {"total": total.detach(), "terms": {k: v.detach() for k, v in terms.items()}, "gradients": gradients}


@pytest.mark.filterwarnings("ignore:.*returned a view tensor")  # of the terms, which training_step keeps for itself
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_step_on_four_uneven_shards_is_the_step_on_their_union(tmp_path, strategy):
    folder = tiny_artifact(tmp_path / "artifact")

    def build():
        torch.manual_seed(3)
        return SharedDiscreteCVAE(folder, all_losses(), num_latents=3, norm_dim=4, posterior="amortized")

    expected = step(build, strategy, None)
    scale = max(gradient.abs().max() for gradient in expected["gradients"].values())
    for found in run_in_processes(lambda rank: step(build, strategy, rank), tmp_path, world_size=4):
        torch.testing.assert_close(found["total"], expected["total"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["terms"], expected["terms"], rtol=1e-5, atol=1e-6)
        for name, gradient in expected["gradients"].items():
            assert (found["gradients"][name] - gradient).abs().max() < 1e-5 * scale, name


def test_activations_are_not_made_again_with_divided_weights(tmp_path):
    folder = tiny_artifact(tmp_path / "artifact")

    def build():
        return SharedDiscreteCVAE(folder, all_losses(), num_latents=3, branch_activations="again")

    def refused(rank):
        with pytest.raises(ValueError, match="branch_activations=again does not work with weights that are divided"):
            step(build, "fsdp", rank)
        return True

    assert all(run_in_processes(refused, tmp_path, world_size=4))


class Witness(L.Callback):
    """Keeps what every process saw."""

    def __init__(self):
        self.losses, self.metrics = [], {}

    def on_train_batch_end(self, trainer, pl_module, outputs, *args):
        self.losses.append(float(outputs["loss"]))

    def on_validation_end(self, trainer, pl_module):
        self.metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if "val/" in key}


def fit(build, folder, ckpt_path=None, callbacks=(), batch_size=16, again=False, **options):
    """Train in this process, as one of several or alone, and leave what was seen in ``folder``."""
    witness = Witness()
    options = (
        QUIET
        | {"max_steps": 3, "val_check_interval": 3, "num_sanity_val_steps": 2, "plugins": [AtomicCheckpointIO()]}
        | options
    )
    trainer = L.Trainer(**options, default_root_dir=folder, callbacks=[witness, StepSeed(0), *callbacks])
    data = SyntheticDataModule(
        MultidigitAddition(), train_size=64, val_size=7, batch_size=batch_size, eval_batch_size=1
    )
    model = build()
    trainer.fit(model, data, ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / "end.ckpt")
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps([witness.losses, witness.metrics]))
    if again:
        before = witness.metrics
        trainer.validate(model, data, verbose=False)
        assert witness.metrics == pytest.approx(before, nan_ok=True)


def fit_together(build, folder, size, strategy, launcher, nodes=1, **options):
    """The same in several processes, and return what the first has seen; all must have logged the same metrics."""
    options |= {"devices": size // nodes, "num_nodes": nodes}
    folder.mkdir()

    def run(environment):
        os.environ.update(environment)
        fit(build, folder, batch_size=16 // size, strategy=strategy(), **options)

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run, args=(own,)) for own in environments(size, launcher, nodes)]
    for rank in ranks:
        rank.start()
    assert [exit_code(rank, 200) for rank in ranks] == [0] * size
    seen = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
    assert all(metrics == seen[0][1] for _, metrics in seen)
    return seen[0]


def fsdp(**options):
    return ModelParallelStrategy(**{"tensor_parallel_size": 1, "save_distributed_checkpoint": False, **options})


STRATEGIES = {"ddp": lambda: "ddp", "fsdp": lambda: fsdp(data_parallel_size=4)}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return addition_artifact(tmp_path_factory.mktemp("artifact"), scale=8)


@pytest.fixture(scope="module")
def alone(artifact, tmp_path_factory):
    """A run of one process: (how its model is built, its folder)."""

    def build():
        torch.manual_seed(3)
        return SharedDiscreteCVAE(artifact, all_losses(), num_latents=3, norm_dim=4, warmup_steps=1)

    folder = tmp_path_factory.mktemp("alone")
    fit(build, folder, callbacks=[StrategyEvaluation(num_examples=7, max_new_tokens=12)])
    return build, folder


def assert_close_weights(found, expected, start):
    moved = max((expected[name] - value).abs().max() for name, value in start.items() if value.is_floating_point())
    assert moved > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-2 * float(moved), msg=name)


@pytest.mark.parametrize(("strategy", "launcher"), [("ddp", "torchrun"), ("fsdp", "srun")])
def test_a_run_on_two_machines_of_two_processes_is_the_run_of_one(alone, tmp_path, strategy, launcher):
    build, whole = alone
    options = {"nodes": 2, "callbacks": [StrategyEvaluation(num_examples=7, max_new_tokens=12)], "again": True}
    losses, metrics = fit_together(build, tmp_path / "four", 4, STRATEGIES[strategy], launcher, **options)
    expected_losses, expected = json.loads((whole / "0.json").read_text())
    assert losses == pytest.approx(expected_losses, rel=1e-3)
    assert losses[0] == pytest.approx(expected_losses[0], rel=1e-5)
    assert metrics.keys() == expected.keys()
    assert {"val/rho_recon", "val/alignment/one_to_one", "val/controlled/final_answer_accuracy"} <= metrics.keys()
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value, rel=1e-2, abs=1e-3, nan_ok=True), key
    one, four = (SharedDiscreteCVAE.load_from_checkpoint(f / "end.ckpt") for f in (whole, tmp_path / "four"))
    assert_close_weights(four.state_dict(), one.state_dict(), build().state_dict())


def test_a_divided_run_resumes_in_the_middle_of_gradient_accumulation(alone, tmp_path):
    build, _ = alone

    def run(name, **more):
        save = ModelCheckpoint(tmp_path / name, "{step}", save_top_k=-1, every_n_epochs=1, monitor="val/elbo")
        options = {"accumulate_grad_batches": 2, "enable_checkpointing": True, "gradient_clip_val": 1.0}
        options |= {"callbacks": [PartialGradients(), save], "limit_val_batches": 1}
        fit_together(
            build, tmp_path / f"{name}-run", 2, lambda: fsdp(data_parallel_size=2), "torchrun", **options, **more
        )
        return torch.load(tmp_path / f"{name}-run/end.ckpt", weights_only=True)

    whole = run("whole")
    middle = tmp_path / "whole/step=1.ckpt"
    assert torch.load(middle, weights_only=True)["accumulated_gradients"]
    resumed = run("resumed", ckpt_path=middle)
    assert resumed["global_step"] == whole["global_step"] == 3
    for name, value in whole["state_dict"].items():
        torch.testing.assert_close(resumed["state_dict"][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_other_modules_are_divided_too(artifact, tmp_path):
    def entangled(output):
        torch.manual_seed(3)
        return EntangledLM(str(output), model=artifact, warmup_steps=1, max_gap=0)

    def continuous():
        torch.manual_seed(3)
        losses = {"reconstruction_loss": losses_.ReconstructionLoss(), "kl_prior_loss": losses_.PriorKLLoss()}
        return ContinuousCVAE(artifact, losses, latent_dim=2, num_eval_samples=2, injection="both")

    fit(lambda: entangled(tmp_path / "one"), tmp_path)
    strategy = lambda: fsdp(data_parallel_size=2)  # noqa: E731
    fit_together(lambda: entangled(tmp_path / "two"), tmp_path / "a", 2, strategy, "torchrun")
    one, two = (json.loads((tmp_path / name / "baseline.json").read_text()) for name in ("one", "two"))
    assert two["c_base"] == pytest.approx(one["c_base"], rel=1e-3)
    losses, metrics = fit_together(continuous, tmp_path / "b", 2, strategy, "torchrun")
    assert all(loss == loss for loss in losses)
    assert metrics["val/marginal_nll"] > 0


class Mesh:
    """A device mesh of so many processes."""

    def __init__(self, data_parallel, tensor_parallel):
        self.sizes = {"data_parallel": data_parallel, "tensor_parallel": tensor_parallel}

    def size(self):
        return self.sizes["data_parallel"] * self.sizes["tensor_parallel"]

    def __getitem__(self, name):
        return SimpleNamespace(size=lambda: self.sizes[name])


def test_what_cannot_be_divided_is_refused(tmp_path):
    folder = tiny_artifact(tmp_path / "artifact")
    model = SharedDiscreteCVAE(folder, all_losses(), num_latents=2)
    model.configure_model()  # nothing happens without a mesh
    assert not is_sharded(model)
    model._device_mesh = Mesh(1, 2)
    with pytest.raises(ValueError, match="expected tensor_parallel_size 1 and data_parallel_size 2, got 2 and 1"):
        model.configure_model()
    model._device_mesh = Mesh(2, 1)
    model._trainer = SimpleNamespace(strategy=ModelParallelStrategy())
    with pytest.raises(ValueError, match="expected save_distributed_checkpoint false, got true"):
        model.configure_model()
    model._trainer = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(ValueError, match=r"expected ModelParallelStrategy \(FSDP2\), got FSDPStrategy"):
        model.configure_model()
    frozen = SharedDiscreteCVAE(folder, all_losses(), num_latents=2, adaptation="frozen")
    frozen._device_mesh = Mesh(2, 1)
    with pytest.raises(ValueError, match="expected adaptation full, got frozen"):
        frozen.configure_model()
