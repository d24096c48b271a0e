"""The step of SharedDiscreteCVAE: mathematics, plug-ins, checkpoints."""

import json
import math
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from tiny import QUIET, RECORDS, TinyData, all_losses, tiny_artifact
from torch import Tensor

from cvae_lightning import losses as losses_
from cvae_lightning.losses import LossCallback
from cvae_lightning.modules import SharedDiscreteCVAE


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("artifact"))


def build(artifact, losses=None, **options):
    torch.manual_seed(3)
    options = {"num_latents": 3, **options}
    return SharedDiscreteCVAE(artifact, all_losses() if losses is None else losses, **options)


def batch_of(model):
    return model.template.collate(RECORDS)


def everything(model):
    return model.compute_outputs(batch_of(model), model.required_fields("train"))


def test_elbo_is_at_most_the_evidence_and_equal_at_the_exact_posterior(artifact):
    model = build(artifact, posterior_temperature=1.0)
    o = everything(model)
    evidence = torch.logsumexp(o.router_log_probs - o.sequence_nll, -1)

    def elbo(log_q):
        return (log_q.exp() * (o.router_log_probs - o.sequence_nll - log_q)).sum(-1)

    torch.testing.assert_close(elbo(o.posterior_log_probs), evidence, rtol=1e-5, atol=1e-4)
    assert (elbo(o.amortized_log_probs) < evidence).all()


def test_total_is_the_weighted_sum_and_zero_weights_get_no_gradient(artifact):
    model = build(artifact)
    total, terms, _ = model._step(batch_of(model), "train")
    expected = sum(model.losses[name].weight * float(term.detach()) for name, term in terms.items())
    assert float(total.detach()) == pytest.approx(expected, rel=1e-5)
    assert set(terms) == set(all_losses())
    assert not terms["kl_prior_loss"].requires_grad
    assert all(t.requires_grad for n, t in terms.items() if n not in ("kl_prior_loss",))


def test_only_what_a_loss_asks_for_is_computed(artifact):
    model = build(artifact, {"reconstruction_loss": losses_.ReconstructionLoss()})
    o = everything(model)
    assert o.baseline_nll is None
    assert o.inter_latent_jsd is None
    assert not model._reference  # the entangled model was not even loaded
    assert "inter_latent_jsd/weighted_mean" not in model.diagnostics(o)


def test_an_evaluation_logs_the_inter_latent_jsd_whatever_the_losses(artifact):
    plain = build(artifact, {"reconstruction_loss": losses_.ReconstructionLoss()})
    asked = build(
        artifact,
        {"reconstruction_loss": losses_.ReconstructionLoss(), "jsd": all_losses()["inter_latent_divergence_loss"]},
    )
    a, b = (m.diagnostics(m.compute_outputs(batch_of(m), m.required_fields("val"))) for m in (plain, asked))
    torch.testing.assert_close(a, b)
    assert a["inter_latent_jsd/weighted_mean"] > 0


def test_a_posterior_network_that_nothing_reads_is_neither_run_nor_trained(artifact):
    model = build(artifact, {"free_energy_loss": losses_.FreeEnergyLoss()})
    model.posterior_network.forward = lambda *a: pytest.fail("it was run")
    trainer = fit(model)
    assert not [p for p in model.posterior_network.parameters() if p.requires_grad]
    optimized = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in optimized}
    assert float(trainer.callback_metrics["val/elbo"]) < 0
    assert "val/alignment_amortized/one_to_one" not in trainer.callback_metrics


def test_permuting_latents_permutes_outputs(artifact):
    model = build(artifact)
    before = everything(model)
    order = [2, 0, 1]
    model.template.latent_prefixes = [model.template.latent_prefixes[i] for i in order]
    after = everything(model)
    torch.testing.assert_close(after.token_nll, before.token_nll[:, order], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(after.router_log_probs, before.router_log_probs[:, order], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(after.inter_latent_jsd, before.inter_latent_jsd, atol=1e-6, rtol=1e-5)


def test_labels_never_reach_training(artifact):
    model = build(artifact)
    batch = batch_of(model)
    scrambled = type(batch)(**{**vars(batch), "strategy": batch.strategy.flip(0)})
    totals = [model._step(b, "train")[0] for b in (batch, scrambled)]
    assert torch.equal(*totals)


def test_gradient_of_four_single_records_is_that_of_the_batch(artifact):
    """Per-example terms only: batch statistics are of the batch by definition."""
    names = ("free_energy_loss", "posterior_distillation_loss", "token_weighted_reconstruction_loss", "kl_prior_loss")
    chosen = {name: all_losses()[name] for name in names}
    grads = []
    for parts in ([RECORDS[:4]], [[r] for r in RECORDS[:4]]):
        model = build(artifact, chosen)
        for records in parts:
            (model._step(model.template.collate(records), "train")[0] / len(parts)).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


def test_the_exact_posterior_is_computed_without_dropout_and_keeps_its_gradient(tmp_path):
    folder = tiny_artifact(tmp_path, "gpt2")
    chosen = {"aggregate_posterior_balance_loss": losses_.AggregatePosteriorBalanceLoss(1.0)}
    noisy = build(folder, chosen, dropout=0.3).train()
    clean = build(folder, chosen, dropout=0.3).eval()
    o_noisy, o_clean = everything(noisy), everything(clean)
    assert (o_noisy.token_nll - o_clean.token_nll).abs().max() > 1e-3
    torch.testing.assert_close(o_noisy.posterior_log_probs, o_clean.posterior_log_probs, atol=1e-5, rtol=1e-5)
    o_noisy.posterior_log_probs[:, 0].sum().backward()
    assert noisy.lm.get_input_embeddings().weight.grad.abs().sum() > 0
    assert noisy.lm.training


def test_the_exact_posterior_stays_a_distribution_under_dropout(tmp_path):
    """Its sum is 1 whatever the weights, so the sum has no gradient, though one probability has."""
    free_energy = {"free_energy_loss": losses_.FreeEnergyLoss()}
    model = build(tiny_artifact(tmp_path, "gpt2"), free_energy, dropout=0.3).train()
    q = everything(model).posterior_log_probs.exp()

    def norm(value):
        grads = torch.autograd.grad(value, list(model.lm.parameters()), allow_unused=True, retain_graph=True)
        return sum(float(g.square().sum()) for g in grads if g is not None) ** 0.5

    assert norm(q.sum()) < 1e-4 * norm(q[:, 0].sum())


@pytest.mark.parametrize("pooling", ["mean", "last", "attention"])
@pytest.mark.parametrize("posterior", ["exact", "amortized"])
def test_every_posterior_trains(artifact, pooling, posterior):
    model = build(artifact, pooling=pooling, posterior=posterior)
    model._step(batch_of(model), "train")[0].backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not [n for n in silent if "lm.lm_head" not in n and "posterior_network.lm.lm_head" not in n]
    if posterior == "amortized":
        o = everything(model)
        assert o.posterior_log_probs is o.amortized_log_probs


def test_dynamic_baseline_follows_the_backbone(artifact):
    frozen, dynamic = build(artifact), build(artifact, baseline="dynamic")
    for model in (frozen, dynamic):
        with torch.no_grad():
            model.lm.get_input_embeddings().weight.mul_(1.5)
    assert not torch.allclose(everything(frozen).baseline_nll, everything(dynamic).baseline_nll)
    assert not everything(dynamic).baseline_nll.requires_grad


class MyLoss(LossCallback):
    """A user's own term."""

    def __init__(self, weight: float = 1.0, power: int = 2) -> None:
        super().__init__(weight)
        self.power = power

    def forward(self, outputs) -> Tensor:
        return outputs.router_log_probs.exp().pow(self.power).sum(-1)


class MyCVAE(SharedDiscreteCVAE):
    """A user's own stage."""

    def router(self, branches):
        return torch.zeros(len(branches.router_hidden), self.num_latents).log_softmax(-1)


def fit(model, **options):
    trainer = L.Trainer(**{**QUIET, "max_steps": 3, **options})
    trainer.fit(model, TinyData())
    return trainer


def test_own_loss_and_own_stage(artifact, tmp_path):
    torch.manual_seed(0)
    model = MyCVAE(artifact, {"free_energy_loss": losses_.FreeEnergyLoss(), "mine": MyLoss(0.5)}, num_latents=3)
    trainer = fit(model)
    logged = trainer.callback_metrics
    assert float(logged["train/mine"]) == pytest.approx(3 * (1 / 3) ** 2, rel=1e-5)
    assert float(logged["train/weight/mine"]) == 0.5
    shares = [float(v) for k, v in logged.items() if k.startswith("train/loss_contrib/fraction_abs/")]
    assert len(shares) == 2
    assert sum(shares) == pytest.approx(1, rel=1e-5)


def test_validation_logs_the_keys_of_the_design(artifact):
    trainer = fit(build(artifact))
    logged = trainer.callback_metrics
    expected = {f"val/{name}" for name in all_losses()}
    expected |= {f"val/loss_contrib/fraction_abs/{name}" for name in all_losses()}
    keys = "loss elbo marginal_nll baseline_nll rho_recon alignment/one_to_one alignment/ami alignment/nmi"
    keys += " alignment/purity router/cross_entropy router/calibration_error"
    keys += " alignment/homogeneity diagnostics/inter_latent_jsd/weighted_mean diagnostics/posterior_entropy"
    keys += " diagnostics/router_entropy diagnostics/latent_usage_perplexity"
    expected |= {f"val/{key}" for key in keys.split()}
    assert expected <= set(logged)
    assert float(logged["val/elbo"]) < 0
    tokens = sum(len(r.y) + 2 for r in RECORDS)
    assert -float(logged["val/elbo"]) * len(RECORDS) / tokens >= float(logged["val/marginal_nll"]) - 1e-4


def test_checkpoint_loads_alone_in_a_fresh_process_to_the_same_logits(tmp_path):
    artifact = tiny_artifact(tmp_path / "artifact")
    model = build(artifact)
    trainer = fit(model)
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    xs = [r.x for r in RECORDS]
    expected = {"route": model.route(xs).tolist(), "y": model.generate(xs, 1, max_new_tokens=5), "c_base": model.c_base}
    (tmp_path / "artifact").rename(tmp_path / "gone")
    code = (
        "import json, sys; from cvae_lightning import SharedDiscreteCVAE as M\n"
        f"m = M.load_from_checkpoint({str(path)!r}, weights_only=True).eval(); xs = {xs!r}\n"
        "print(json.dumps({'route': m.route(xs).tolist(), 'y': m.generate(xs, 1, max_new_tokens=5), 'c_base': m.c_base,"
        " 'losses': {k: v.weight for k, v in m.losses.items()}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found.pop("losses") == {k: v.weight for k, v in model.losses.items()}
    assert found == expected


def test_bad_construction_names_what_is_wrong(artifact, tmp_path):
    one = {"reconstruction_loss": losses_.ReconstructionLoss()}
    with pytest.raises(ValueError, match="num_latents must be at least 2"):
        build(artifact, num_latents=1)
    with pytest.raises(ValueError, match="posterior_temperature"):
        build(artifact, posterior_temperature=0.0)
    with pytest.raises(ValueError, match="`losses` is empty"):
        build(artifact, {"a": None})
    with pytest.raises(ValueError, match="cannot name a loss"):
        build(artifact, {"update": losses_.ReconstructionLoss()})
    with pytest.raises(
        ValueError, match="'elbo' cannot name a loss, as a metric is logged by that name: call it elbo_loss"
    ):
        build(artifact, {"elbo": losses_.FreeEnergyLoss()})
    with pytest.raises(ValueError, match=r"model\.c_base: c_base must be a positive number"):
        build(artifact, one, c_base=-1.0)
    with pytest.raises(ValueError, match="cannot load a causal language model from"):
        build(str(tmp_path / "nowhere"), one)
    broken = Path(tiny_artifact(tmp_path / "broken"))
    baseline = json.loads((broken / "baseline.json").read_text())
    for change, message in (({"c_base": 0.0}, "positive"), (None, "no key 'c_base'")):
        content = {**baseline, **change} if change else {k: v for k, v in baseline.items() if k != "c_base"}
        (broken / "baseline.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"baseline\.json.*{message}"):
            build(str(broken), one)


def test_a_baseline_of_other_data_is_a_warning_that_names_both(tmp_path):
    folder = tiny_artifact(tmp_path, data="other-data")
    with pytest.warns(UserWarning, match=r"data fingerprint other-data .*tiny-val"):
        fit(build(folder))


def test_c_base_is_measured_where_the_artifact_has_none(tmp_path):
    folder = Path(tiny_artifact(tmp_path))
    (folder / "baseline.json").unlink()
    model = build(str(folder))
    trainer = fit(model)
    assert model.c_base == pytest.approx(float(trainer.callback_metrics["val/baseline_nll"]), rel=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_the_known_entropy_of_the_strategies_does_not_depend_on_the_precision(artifact, precision):
    class Known(TinyData):
        def strategy_probs(self, x):
            return [1 / 3, 2 / 3]

    model = build(artifact, {"free_energy_loss": losses_.FreeEnergyLoss()}, num_latents=2, baseline_cache=False)
    logged = L.Trainer(**QUIET, precision=precision).validate(model, Known(), verbose=False)[0]
    expected = -(1 / 3 * math.log(1 / 3) + 2 / 3 * math.log(2 / 3))
    assert logged["val/router/true_cross_entropy"] == pytest.approx(expected, rel=1e-6)
