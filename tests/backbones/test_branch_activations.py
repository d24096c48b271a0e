"""Activations of branches that are made again in the backward pass: what is read, kept, refused and decided."""

import weakref

import lightning as L
import pytest
import torch
from tiny import QUIET, RECORDS, TinyData, kept_for_backward, tiny_artifact

from cvae_lightning.backbones import branches
from cvae_lightning.backbones.branch_activations import WORTHWHILE, BranchActivations
from cvae_lightning.backbones.causal_lm import decoder_of, has_dropout
from cvae_lightning.losses import (
    AggregatePosteriorBalanceLoss,
    FreeEnergyLoss,
    InterLatentDivergenceLoss,
    PosteriorDistillationLoss,
)
from cvae_lightning.modules import LoRA, SharedDiscreteCVAE


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("artifact"))


def module(artifact, mode, **options):
    torch.manual_seed(1)
    losses = {"free_energy": FreeEnergyLoss(), "distillation": PosteriorDistillationLoss()}
    losses |= {"balance": AggregatePosteriorBalanceLoss()}
    losses |= options.pop("losses", {})
    model = SharedDiscreteCVAE(artifact, losses, num_latents=4, branch_activations=mode, **options).train()
    for linear in model.norms.maps if model.norms else ():
        torch.nn.init.normal_(linear.weight, std=0.3)
    return model


def step(model, dtype=None):
    """Return the loss and the gradients of a training step."""
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        total, _, _ = model._step(model.template.collate(RECORDS), "train")
    total.backward()
    return total.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def read_by(model):
    """Return a list that will hold how many rows every pass through the generator reads, and whether for gradients."""
    rows = []
    decoder_of(model.lm).register_forward_hook(
        lambda part, args, output: rows.append((len(output.last_hidden_state), torch.is_grad_enabled()))
    )
    return rows


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_dim": 4, "prefix_length": 2},
        {"adaptation": "lora", "lora": LoRA(rank=2)},
        {"adaptation": "frozen", "norm_dim": 4},
        {"posterior": "amortized", "losses": {"divergence": InterLatentDivergenceLoss(0.3)}},
        {"num_latent_chunk": 3, "norm_dim": 4},
        {"posterior_temperature": 0.003, "norm_dim": 4},
    ],
    ids=["plain", "norms", "lora", "frozen", "divergence", "chunk", "sharp"],
)
def test_a_step_has_the_same_loss_and_gradients(artifact, options):
    again = module(artifact, "again", **options)
    (expected, kept), (found, made) = step(module(artifact, "kept", **options)), step(again)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert made.keys() == kept.keys()
    scale = max(float(gradient.abs().max()) for gradient in kept.values())
    for name, gradient in kept.items():
        torch.testing.assert_close(made[name], gradient, rtol=1e-4, atol=1e-6 * scale, msg=name)
    assert (again.branch_activations.share < 0.5) == ("posterior_temperature" in options)


def test_autocast_is_that_of_the_step(artifact):
    options = {"norm_dim": 4, "posterior_temperature": 0.003}
    (expected, kept), (found, made) = (
        step(module(artifact, mode, **options), torch.bfloat16) for mode in ("kept", "again")
    )
    torch.testing.assert_close(found, expected)
    assert made.keys() == kept.keys()
    for name, gradient in kept.items():  # a product rounds by the number of its rows
        assert (made[name] - gradient).norm() < 0.02 * gradient.norm() + 1e-6, name


def test_branches_without_a_gradient_are_read_once(artifact):
    model = module(artifact, "again", posterior_temperature=0.003)
    batch = model.template.collate(RECORDS)
    model.encode(batch)  # chooses the method, and tries a branch
    rows = read_by(model)
    _, _, outputs = model._step(batch, "train")
    assert rows == [(5, True), (10, False), (10, False)]  # the prefix, and two latents at a time
    rows.clear()
    outputs.token_nll.sum((1, 2)).sum().backward(retain_graph=True)
    assert rows == 2 * [(10, True)]
    rows.clear()
    outputs.token_nll[[0, 2, 2], [1, 0, 3]].sum().backward()
    assert rows == [(3, True)]
    assert model.branch_activations.share == pytest.approx(3 / 20)


def test_nothing_of_the_branches_is_kept(artifact):
    """A step holds what goes into the branches alone between its passes."""

    def held(mode, latents):
        model = SharedDiscreteCVAE(artifact, {"free": FreeEnergyLoss()}, num_latents=latents, branch_activations=mode)
        batch = model.template.collate(RECORDS)
        model._step(batch, "train")  # chooses the method
        return kept_for_backward(lambda: model.encode(batch))[0]

    assert held("kept", 16) > 2 * held("kept", 4)
    assert held("again", 16) < 1.5 * held("again", 4)
    assert held("again", 16) < held("kept", 16) / 3


def test_a_second_backward_pass_gives_the_same(artifact):
    model = module(artifact, "again", norm_dim=4)
    total = model._step(model.template.collate(RECORDS), "train")[0]
    total.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    total.backward()
    for name, gradient in once.items():
        torch.testing.assert_close(model.get_parameter(name).grad, 2 * gradient)


def test_auto_goes_by_the_share_of_the_last_step(artifact):
    model = module(artifact, "auto", posterior_temperature=0.003)
    rows = read_by(model)
    step(model)
    assert (20, True) in rows
    assert model.branch_activations.share <= WORTHWHILE
    rows.clear()
    step(model)
    assert (10, False) in rows
    assert (20, True) not in rows
    model.posterior_temperature = 10.0
    step(model)
    assert model.branch_activations.share == 1.0
    rows.clear()
    step(model)
    assert (20, True) in rows
    assert (10, False) not in rows


def test_a_checkpoint_holds_what_the_next_step_decides_by(artifact, tmp_path):
    model = module(artifact, "auto", posterior_temperature=0.003)
    trainer = L.Trainer(default_root_dir=tmp_path, max_steps=1, limit_val_batches=0, **QUIET)
    trainer.fit(model, TinyData())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    loaded = SharedDiscreteCVAE.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=False)
    assert loaded.branch_activations.share == model.branch_activations.share < 1


def test_evaluation_keeps_nothing_and_decides_nothing(artifact):
    model = module(artifact, "again").eval()
    with torch.no_grad():
        model._step(model.template.collate(RECORDS), "val")
    assert model.branch_activations.share == 1.0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"branch_method": "repeat"}, "repeat and 0.0"),
        ({"branch_method": "grouped"}, "grouped and 0.0"),
        ({"dropout": 0.1}, "auto and 0.1"),
    ],
)
def test_what_would_be_wrong_is_refused_or_not_chosen(tmp_path, options, reason):
    artifact = tiny_artifact(tmp_path, "gpt2")
    with pytest.raises(ValueError, match=f"takes branch_method cache .* got {reason}"):
        module(artifact, "again", **options)
    assert_kept(module(artifact, "auto", **options))


def assert_kept(model):
    """Activations are kept where making them again would pay, and the gradients are right."""
    model.branch_activations.share = 0.1
    rows = read_by(model)
    _, found = step(model)
    kept = [size for size, grad in rows if grad and size not in (1, 5)]
    assert kept != [10, 10]
    model.zero_grad()
    model.branch_activations.mode = "kept"
    if not has_dropout(model.lm):
        _, expected = step(model)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("mode", ["auto", "again"])
def test_weights_that_a_hook_brings_are_found(artifact, mode):
    model = module(artifact, mode)
    model.adapter = torch.nn.Linear(16, 16)
    decoder_of(model.lm).layers[0].register_forward_hook(lambda part, args, output: output + model.adapter(output))
    if mode == "again":
        with pytest.raises(ValueError, match="does not work with weights beside those of the language model"):
            step(model)
    else:
        assert_kept(model)


@pytest.mark.parametrize("mode", ["auto", "again"])
def test_parts_that_act_at_random_are_found(artifact, mode):
    model = module(artifact, mode)
    decoder_of(model.lm).layers[0].mlp.register_forward_hook(
        lambda part, args, output: output * (1 + 0.1 * part.training * torch.rand_like(output))
    )
    if mode == "again":
        with pytest.raises(ValueError, match="does not work with parts that act at random"):
            step(model)
    else:
        model.branch_activations.share, rows = 0.1, read_by(model)
        step(model)
        assert (20, True) in rows


def test_a_gradient_hook_on_a_weight_runs_once(artifact):
    found = []
    for mode in ("kept", "again"):
        model, calls = module(artifact, mode, num_latent_chunk=3), []
        weight = decoder_of(model.lm).layers[0].mlp.up_proj.weight
        weight.register_hook(lambda gradient, calls=calls: calls.append(0) or 0.5 * gradient)
        step(model)
        found.append((weight.grad, len(calls)))
    assert found[0][1] == found[1][1] == 1
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-6)


def test_the_weights_of_a_functional_call_are_those_of_its_backward_pass(artifact):
    found = []
    for mode in ("kept", "again"):
        model = module(artifact, mode, norm_dim=4)
        batch = model.template.collate(RECORDS)
        weights = {name: p.detach().mul(1.1).requires_grad_() for name, p in model.named_parameters()}
        wrapped = Wrapped(model)
        names = {f"model.{name}": weight for name, weight in weights.items()}
        torch.func.functional_call(wrapped, names, (batch,)).backward()
        found.append({name: weight.grad for name, weight in weights.items() if weight.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


class Wrapped(torch.nn.Module):
    """The objective as a forward pass."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model._step(batch, "train")[0]


def test_where_no_branch_has_a_gradient_weights_have_one_of_zero(artifact):
    model = module(artifact, "again", norm_dim=4)
    outputs = model.compute_outputs(model.template.collate(RECORDS), frozenset())
    (outputs.router_log_probs.sum() + 0 * outputs.token_nll.sum()).backward()
    assert model.branch_activations.share == 0
    assert not model.latent_vectors.weight.grad.any()
    assert all(not linear.weight.grad.any() for linear in model.norms.maps)


def test_a_result_that_gives_no_gradient_counts_as_none(artifact):
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):
            return values.clone()

        @staticmethod
        def backward(ctx, gradient):
            return None

    model = module(artifact, "auto")
    branches = model.encode(model.template.collate(RECORDS))
    (Stop.apply(branches.hidden).sum() + branches.router_hidden.sum()).backward()
    assert model.branch_activations.share == 0


def test_nothing_of_the_prefix_outlives_the_backward_pass(artifact, monkeypatch):
    model, kept = module(artifact, "again", norm_dim=4), []
    read = branches._read_prefix

    def watched(*args):
        prefix, cache = read(*args)
        kept.append(weakref.ref(cache.layers[0].keys))
        return prefix, cache

    monkeypatch.setattr(branches, "_read_prefix", watched)
    total = model._step(model.template.collate(RECORDS), "train")[0]
    assert kept[-1]() is not None
    total.backward()
    assert kept[-1]() is None


def test_an_unknown_mode_is_refused(artifact):
    with pytest.raises(ValueError, match="branch_activations must be one of auto, kept, again, got 'never'"):
        BranchActivations("never")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks
def test_a_compiled_transformer_gives_the_same(artifact):
    options = {"norm_dim": 4, "posterior_temperature": 0.003}
    compiled = module(artifact, "again", **options)
    decoder_of(compiled.lm).compile(dynamic=True, backend="aot_eager")
    (expected, kept), (found, made) = step(module(artifact, "kept", **options)), step(compiled)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert made.keys() == kept.keys()
    for name, gradient in kept.items():
        torch.testing.assert_close(made[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
