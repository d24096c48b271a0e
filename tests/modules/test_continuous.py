"""The step of ContinuousCVAE: mathematics, estimation, checkpoints."""

import json
import math
import subprocess
import sys

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import QUIET, RECORDS, TinyData, tiny_artifact

from cvae_lightning import losses as losses_
from cvae_lightning.callbacks import ContinuousEvaluation, LatentPanels
from cvae_lightning.modules import ContinuousCVAE


def all_losses(posterior="importance"):
    chosen = {
        "reconstruction_loss": losses_.ReconstructionLoss(0.5),
        "baseline_normalized_reconstruction_loss": losses_.BaselineNormalizedReconstructionLoss(0.5),
        "token_weighted_reconstruction_loss": losses_.TokenWeightedReconstructionLoss(1.0),
        "free_energy_loss": losses_.FreeEnergyLoss(1.0),
        "kl_prior_loss": losses_.PriorKLLoss(0.1),
        "inter_latent_divergence_loss": losses_.InterLatentDivergenceLoss(0.3),
        "router_marginal_kl_to_prior_loss": losses_.RouterMarginalKLLoss(0.1),
        "aggregate_posterior_balance_loss": losses_.AggregatePosteriorBalanceLoss(1.0),
        "posterior_entropy_loss": losses_.PosteriorEntropyLoss(-0.01),
        "posterior_variance_loss": losses_.PosteriorVarianceLoss(0.0),
    }
    if posterior == "importance":
        chosen["posterior_distillation_loss"] = losses_.PosteriorDistillationLoss(0.1)
    return chosen


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("artifact"))


def build(artifact, losses=None, **options):
    torch.manual_seed(3)
    options = {"latent_dim": 2, "num_samples": 2, **options}
    given = all_losses(options.get("posterior", "importance")) if losses is None else losses
    return ContinuousCVAE(artifact, given, **options)


def batch_of(model, records=RECORDS):
    return model.template.collate(records)


def outputs_of(model, stage="train", records=RECORDS):
    torch.manual_seed(0)
    return model.compute_outputs(batch_of(model, records), model.required_fields(stage))


@pytest.mark.parametrize("posterior", ["importance", "reparameterized"])
@pytest.mark.parametrize("injection", ["prefix", "norm", "both"])
@pytest.mark.parametrize("latent_dim", [1, 3])
def test_every_form_trains(artifact, posterior, injection, latent_dim):
    model = build(artifact, posterior=posterior, injection=injection, latent_dim=latent_dim)
    for records in (RECORDS, RECORDS[:1]):  # B = 1 too
        total, terms, outputs = model._step(batch_of(model, records), "train")
        assert set(terms) == set(all_losses(posterior))
        assert bool(total.isfinite())
        expected = sum(model.losses[name].weight * float(term.detach()) for name, term in terms.items())
        assert float(total.detach()) == pytest.approx(expected, rel=1e-5)
        assert outputs.token_nll.shape[:2] == (len(records), 6 if posterior == "importance" else 2)
        assert not terms["posterior_variance_loss"].requires_grad
        total.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.isfinite().all())}
    silent = {n for n, p in model.named_parameters() if p.requires_grad} - trained
    assert silent <= {"lm.lm_head.weight"}


def test_the_elbo_is_below_the_evidence_and_both_agree_with_quadrature(artifact):
    """D = 1: the evidence and the ELBO by a fine grid over z, through the model itself."""
    chosen = {"free_energy_loss": losses_.FreeEnergyLoss()}
    model = build(artifact, chosen, latent_dim=1, num_eval_samples=600, posterior_initial_logvar=-0.5).eval()
    batch = batch_of(model, RECORDS[:3])
    with torch.no_grad():
        torch.manual_seed(0)
        o = model.compute_outputs(batch, frozenset({"log_evidence", "baseline_nll"}))
        grid = torch.linspace(-7, 7, 1401)
        branches = model.encode(batch, grid[None, :, None].expand(3, -1, -1))
        nll = model.generator(branches.hidden, batch)[0].sum(-1)  # [3, G]

    def log_normal(mean, logvar):
        return -0.5 * (math.log(2 * math.pi) + logvar + (grid - mean).square() / logvar.exp())

    log_p, log_q = log_normal(o.prior_mean, o.prior_logvar), log_normal(o.posterior_mean, o.posterior_logvar)
    evidence = (log_p - nll).logsumexp(-1) + math.log(0.01)
    elbo = (log_q.exp() * (log_p - log_q - nll)).sum(-1) * 0.01
    assert bool((elbo < evidence).all())
    assert bool(((o.log_evidence - evidence).abs() < 4 * o.log_evidence_error + 1e-4).all())
    assert float(o.log_evidence_error.max()) < 0.2
    kl = losses_.PriorKLLoss()(o)
    sampled = -o.posterior_sequence_nll.mean(-1) - kl
    error = o.posterior_sequence_nll.std(-1) / 600**0.5
    assert bool(((sampled - elbo).abs() < 4 * error + 1e-3).all())


def test_the_weighted_free_energy_at_one_is_the_negative_evidence(artifact):
    model = build(artifact, posterior_temperature=1.0)
    o = outputs_of(model, "val")
    value = losses_.FreeEnergyLoss()(o) * o.num_tokens * o.c_base
    torch.testing.assert_close(value, -o.log_evidence, rtol=1e-5, atol=1e-5)


def test_importance_weights_pull_router_and_posterior_to_the_good_samples(artifact):
    """A generator that only likes z near 2: descending the objective moves both means there."""

    class Liking(ContinuousCVAE):
        def generator(self, hidden, batch, need_jsd=False):
            nll, jsd = super().generator(hidden, batch, need_jsd)
            return nll * 0 + self.cost[:, : nll.shape[1], None] * batch.y_mask[:, None], jsd

        def encode(self, batch, latents):
            self.cost = (latents[..., 0] - 2).square() / batch.y_mask.sum(-1).view(-1, 1)
            return super().encode(batch, latents)

    torch.manual_seed(0)
    chosen = {"free_energy_loss": losses_.FreeEnergyLoss(), "distil": losses_.PosteriorDistillationLoss()}
    model = Liking(artifact, chosen, latent_dim=1, num_samples=16, num_router_samples=16, posterior_temperature=1.0)
    # both groups share the order of encode: router samples come second
    original = Liking.generator

    def split(self, hidden, batch, need_jsd=False):
        result = original(self, hidden, batch, need_jsd)
        self.cost = self.cost.roll(-hidden.shape[1], 1)
        return result

    Liking.generator = split
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        total = model._step(batch_of(model), "train")[0]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    mean, _ = model.route([r.x for r in RECORDS])
    inferred, logvar = model.infer([r.x for r in RECORDS], [r.y for r in RECORDS])
    assert float(mean.mean()) > 0.8
    assert float(inferred.mean()) > 1.2
    assert float(logvar.mean()) < 0


def test_under_dropout_samples_are_weighed_by_the_router_that_drew_them(tmp_path):
    chosen = {"free_energy_loss": losses_.FreeEnergyLoss()}
    options = {"num_samples": 2, "num_router_samples": 2, "posterior_temperature": 1.0}
    model = build(tiny_artifact(tmp_path, "gpt2"), chosen, dropout=0.3, **options).train()
    torch.nn.init.normal_(model.router_head.weight, std=0.3)
    routers, route = [], model.router
    model.router = lambda hidden: routers.append(route(hidden)) or routers[-1]
    o = outputs_of(model)
    proposed, p = ([part.detach() for part in router] for router in routers)
    assert (proposed[0] - p[0]).abs().max() > 0.1

    def density(mean, logvar):
        normal = torch.distributions.Normal(mean[:, None], (0.5 * logvar[:, None]).exp())
        return normal.log_prob(o.latents).sum(-1).exp()

    mixture = 0.5 * density(o.posterior_mean, o.posterior_logvar) + 0.5 * density(*proposed)
    expected = density(*p).log() - mixture.log() - o.token_nll.sum(-1) - math.log(4)
    torch.testing.assert_close(o.sample_log_weights, expected, rtol=1e-4, atol=1e-4)


def test_batches_may_be_permuted_and_padded(artifact):
    model = build(artifact).eval()
    with torch.no_grad():
        batch = batch_of(model)
        mean, logvar = model.posterior(batch)
        prior = model.router(model.read_prompt(batch))[0]
        z = torch.randn(len(RECORDS), 2, 2)
        nll = model.generator(model.encode(batch, z).hidden, batch)[0].sum(-1)
        order = [3, 1, 4, 0, 2]
        shuffled = batch_of(model, [RECORDS[i] for i in order])
        torch.testing.assert_close(model.posterior(shuffled)[0], mean[order], atol=1e-5, rtol=1e-5)
        found = model.generator(model.encode(shuffled, z[order]).hidden, shuffled)[0].sum(-1)
        torch.testing.assert_close(found, nll[order], atol=1e-4, rtol=1e-5)
        swapped = model.generator(model.encode(batch, z.flip(1)).hidden, batch)[0].sum(-1)
        torch.testing.assert_close(swapped, nll.flip(1), atol=1e-4, rtol=1e-5)
        for i, record in enumerate(RECORDS):  # alone: nothing is padded
            alone = batch_of(model, [record])
            torch.testing.assert_close(model.posterior(alone)[1][0], logvar[i], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(model.router(model.read_prompt(alone))[0][0], prior[i], atol=1e-5, rtol=1e-5)
            one = model.generator(model.encode(alone, z[i : i + 1]).hidden, alone)[0].sum(-1)
            torch.testing.assert_close(one[0], nll[i], atol=1e-4, rtol=1e-5)


def test_labels_never_reach_training(artifact):
    model = build(artifact)
    batch = batch_of(model)
    scrambled = type(batch)(**{**vars(batch), "strategy": batch.strategy.flip(0)})
    totals = []
    for given in (batch, scrambled):
        torch.manual_seed(0)
        totals.append(model._step(given, "train")[0])
    assert torch.equal(*totals)


def test_only_what_a_loss_asks_for_is_computed(artifact):
    model = build(artifact, {"reconstruction_loss": losses_.ReconstructionLoss()}, posterior="reparameterized")
    o = outputs_of(model)
    assert o.baseline_nll is None
    assert o.inter_latent_jsd is None
    assert o.log_evidence is None
    assert not model._reference


def test_compared_latents_come_from_different_examples(artifact):
    model = build(artifact, num_divergence_latents=4)
    latents = torch.arange(5.0)[:, None, None].expand(5, 2, 2)
    pool = model.divergence_latents(latents)
    assert pool.shape == (5, 4, 2)
    assert len(set(pool[0, :, 0].tolist())) == 4
    assert torch.equal(pool[0], pool[3])
    assert model.divergence_latents(latents[:1]).shape == (1, 4, 2)  # B = 1: samples repeat


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_small_batch_compares_latents_that_differ(artifact, size):
    model = build(artifact, num_samples=1, num_divergence_latents=4)
    compared, encode = [], model.encode
    model.encode = lambda batch, latents: compared.append(latents[:, -4:]) or encode(batch, latents)
    o = outputs_of(model, records=RECORDS[:size])
    assert [len(row.unique(dim=0)) for row in compared[0].detach()] == [4] * size
    assert o.inter_latent_jsd.detach().max() > 1e-6


def test_extreme_network_outputs_stay_finite(artifact):
    for value in (-1e4, 1e4):
        model = build(artifact, posterior="reparameterized")
        with torch.no_grad():
            model.posterior_network.project.bias[2:] = value
            model.router_head.bias[2:] = -value
        total, _, o = model._step(batch_of(model), "train")
        total.backward()
        assert bool(total.isfinite())
        assert -8 <= float(o.posterior_logvar.detach().min()) <= float(o.prior_logvar.detach().max()) + 12
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_bf16_training_stays_finite(artifact):
    trainer = fit(build(artifact), precision="bf16-mixed", max_steps=4)
    assert math.isfinite(float(trainer.callback_metrics["train/loss"]))


def fit(model, **options):
    trainer = L.Trainer(**{**QUIET, "max_steps": 3, **options})
    trainer.fit(model, TinyData())
    return trainer


@pytest.mark.parametrize("posterior", ["importance", "reparameterized"])
def test_validation_logs_the_keys_of_the_design(artifact, posterior):
    logged = fit(build(artifact, posterior=posterior)).callback_metrics
    names = all_losses(posterior)
    expected = {f"val/{name}" for name in names} | {f"val/loss_contrib/fraction_abs/{name}" for name in names}
    keys = "loss elbo marginal_nll marginal_nll_standard_error baseline_nll rho_recon diagnostics/active_units"
    keys += " diagnostics/active_units_delta diagnostics/posterior_std diagnostics/posterior_entropy posterior_std/d1"
    keys += " diagnostics/router_entropy diagnostics/num_eval_samples diagnostics/inter_latent_jsd/weighted_mean"
    keys += " router_marginal/mean_d0 router_marginal/variance_d1 diagnostics/prior_kl"
    expected |= {f"val/{key}" for key in keys.split()}
    assert expected <= set(logged)
    tokens = sum(len(r.y) + 2 for r in RECORDS)
    per_token = -float(logged["val/elbo"]) * len(RECORDS) / tokens
    slack = 4 * float(logged["val/marginal_nll_standard_error"])
    assert per_token >= float(logged["val/marginal_nll"]) - slack
    assert float(logged["val/diagnostics/num_eval_samples"]) == 16


def test_one_dimension_is_logged_compared_and_drawn_too(artifact, tmp_path):
    model = build(artifact, latent_dim=1)
    panels = [ContinuousEvaluation(num_examples=2), LatentPanels()]
    logger = TensorBoardLogger(tmp_path)
    trainer = L.Trainer(**QUIET | {"max_steps": 2, "logger": logger, "log_every_n_steps": 1}, callbacks=panels)
    trainer.fit(model, TinyData(batch_size=5))
    logged = trainer.callback_metrics
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    assert "val/figures/router_marginal" in events.Tags()["images"]
    assert {"val/router_marginal/mean_d0", "val/posterior_std/d0"} <= set(logged)
    model.metrics.moments.update(*(torch.randn(4, 1) for _ in range(4)))
    assert model.metrics.moments.compute()["router_mean"].shape == ()  # torchmetrics squeezes it
    assert model.aggregate_outputs().prior_mean.shape == (1, 1)


def test_checkpoint_loads_alone_in_a_fresh_process(tmp_path):
    artifact = tiny_artifact(tmp_path / "artifact")
    model = build(artifact, injection="both", prefix_length=2)
    trainer = fit(model)
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    xs, ys = [r.x for r in RECORDS], [r.y for r in RECORDS]
    z = [[0.5, -1.0]] * len(xs)
    expected = {
        "route": [t.tolist() for t in model.route(xs)],
        "infer": [t.tolist() for t in model.infer(xs, ys)],
        "y": model.generate(xs, torch.tensor(z), max_new_tokens=5),
        "c_base": model.c_base,
    }
    (tmp_path / "artifact").rename(tmp_path / "gone")
    code = (
        "import json, torch; from cvae_lightning import ContinuousCVAE as M\n"
        f"m = M.load_from_checkpoint({str(path)!r}, weights_only=True).eval(); xs, ys = {xs!r}, {ys!r}\n"
        "print(json.dumps({'route': [t.tolist() for t in m.route(xs)], 'infer': [t.tolist() for t in m.infer(xs, ys)],"
        f" 'y': m.generate(xs, torch.tensor({z!r}), max_new_tokens=5), 'c_base': m.c_base,"
        " 'losses': {k: v.weight for k, v in m.losses.items()}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found.pop("losses") == {k: v.weight for k, v in model.losses.items()}
    assert found == expected


def test_use(artifact):
    model = build(artifact)
    xs = [r.x for r in RECORDS]
    mean, logvar = model.route(xs)
    assert mean.shape == logvar.shape == (5, 2)
    assert not mean.any()  # the router starts at N(0, I)
    once = [model.generate(xs, "router", generator_seed=1, max_new_tokens=4) for _ in range(2)]
    assert once[0] == once[1]
    assert model.generate(xs, "mean", max_new_tokens=4) == model.generate(xs, torch.zeros(2), max_new_tokens=4)
    assert model.generate([], torch.zeros(2)) == []
    rows = model.predict_step(batch_of(model), 0)
    assert [row["x"] for row in rows] == xs
    assert rows[0]["router_mean"] == [0.0, 0.0]
    assert [row["y"] for row in rows] == model.generate(xs, torch.tensor([row["z"] for row in rows]))
    alone = model.predict_step(batch_of(model, RECORDS[1:2]), 0)[0]  # the same whatever stands beside it
    assert {key: alone[key] for key in ("index", "x", "z", "y", "target")}.items() <= rows[1].items()
    assert alone["log_evidence"] == pytest.approx(rows[1]["log_evidence"], rel=1e-5)
    with pytest.raises(ValueError, match=r"z must have shape \[5, 2\]"):
        model.generate(xs, torch.zeros(5, 3))
    with pytest.raises(ValueError, match="'router' or 'mean'"):
        model.generate(xs, "argmax")


def test_bad_construction_names_what_is_wrong(artifact):
    for options, message in (
        ({"latent_dim": 0}, "latent_dim must be at least 1"),
        ({"num_divergence_latents": 1}, "num_divergence_latents must be at least 2"),
        ({"posterior_temperature": 0.0}, "posterior_temperature"),
        ({"injection": "cache"}, "injection must be"),
        ({"posterior": "exact"}, "posterior must be"),
        ({"logvar_bounds": (1.0, 4.0)}, "logvar_bounds must enclose"),
        ({"prefix_length": 0}, "prefix_length"),
    ):
        with pytest.raises(ValueError, match=message):
            build(artifact, **options)


def test_marginal_terms_of_a_split_do_not_depend_on_its_batches(artifact):
    chosen = {
        "reconstruction_loss": losses_.ReconstructionLoss(),
        "router_marginal_kl_to_prior_loss": losses_.RouterMarginalKLLoss(),
        "aggregate_posterior_balance_loss": losses_.AggregatePosteriorBalanceLoss(),
    }
    model = build(artifact, chosen)
    torch.nn.init.normal_(model.router_head.weight)
    xs, ys = [r.x for r in RECORDS], [r.y for r in RECORDS]
    expected = {}
    for name, (mean, logvar) in {
        "router_marginal_kl_to_prior": model.route(xs),
        "aggregate_posterior_balance": model.infer(xs, ys),
    }.items():
        m, v = mean.mean(0), (logvar.exp() + mean.square()).mean(0) - mean.mean(0).square()
        expected[f"val/{name}_loss"] = float(0.5 * (v + m.square() - 1 - v.log()).sum())
    for batch_size in (1, 3, 5):
        trainer = L.Trainer(**QUIET)
        logged = trainer.validate(model, TinyData(batch_size=batch_size), verbose=False)[0]
        assert {key: logged[key] for key in expected} == pytest.approx(expected, rel=1e-3, abs=1e-4)
