"""Steps at the edge of the numbers: logits of 10,000, nothing to predict, one latent, a huge vocabulary in bfloat16."""

import dataclasses
import math

import lightning as L
import pytest
import torch
from tiny import QUIET, RECORDS, all_losses, continuous_losses, tiny_artifact

from cvae_lightning.backbones.causal_lm import head_of
from cvae_lightning.backbones.generation import generate_ids
from cvae_lightning.functional import jensen_shannon_divergence, latent_token_stats
from cvae_lightning.modules import ContinuousCVAE, SharedDiscreteCVAE
from cvae_lightning.outputs import Record


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("artifact"))


def discrete(artifact, **options):
    torch.manual_seed(3)
    return SharedDiscreteCVAE(artifact, all_losses(), **{"num_latents": 3} | options)


def continuous(artifact, **options):
    torch.manual_seed(3)
    return ContinuousCVAE(
        artifact, continuous_losses(), **{"latent_dim": 2, "num_samples": 2, "injection": "both"} | options
    )


BUILDS = pytest.mark.parametrize("build", [discrete, continuous])


def sharpen(model, factor):
    """Multiply the logits of generator and router, and of the posterior network's backbone."""
    with torch.no_grad():
        model.lm.model.norm.weight.mul_(factor)
    return model


def step(model, batch):
    """Return total, terms and outputs of a training step, after checking that all is finite, gradients included."""
    torch.manual_seed(0)
    total, terms, outputs = model._step(batch, "train")
    assert bool(total.isfinite())
    assert all(bool(term.isfinite()) for term in terms.values()), terms
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients
    assert not [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
    return total.detach(), {name: term.detach() for name, term in terms.items()}, outputs


def evaluate(model, batch):
    """Return the metrics of one batch, after checking that those that are there are finite."""
    model.trainer = L.Trainer(**QUIET)
    with torch.no_grad():
        _, terms, outputs = model._step(batch, "val")
        model.update_metrics(batch, outputs, terms, model.diagnostics(outputs))
        metrics = model.compute_metrics()
    assert metrics
    return {name: float(value) for name, value in metrics.items()}


def test_logits_of_ten_thousand_are_finite_and_right(artifact):
    """fp32 against the same step in fp64."""
    results = []
    for dtype in (torch.float64, torch.float32):
        model = sharpen(discrete(artifact), 20_000.0).to(dtype)
        batch = model.template.collate(RECORDS)
        total, terms, outputs = step(model, batch)
        results.append((total, terms, outputs))
        with torch.no_grad():
            branches = model.encode(batch)
            logits = head_of(model.lm).logits(branches.hidden)
        assert 1e4 < logits.abs().max() < 1e5
        metrics = evaluate(model, batch)
        assert not [name for name, value in metrics.items() if math.isnan(value)], metrics
    (exact, exact_terms, outputs), (found, found_terms, single) = results
    assert outputs.sequence_nll.max() > 1e4
    torch.testing.assert_close(found.double(), exact.double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(single.sequence_nll.double(), outputs.sequence_nll.double(), rtol=1e-4, atol=0.1)
    torch.testing.assert_close(single.inter_latent_jsd.double(), outputs.inter_latent_jsd.double(), rtol=0, atol=1e-2)
    for name, term in exact_terms.items():
        torch.testing.assert_close(found_terms[name].double(), term.double(), rtol=1e-3, atol=1e-2, msg=name)
    torch.testing.assert_close(single.posterior_log_probs.exp().sum(-1), torch.ones(len(RECORDS)))


def test_logits_of_ten_thousand_under_sampled_latents_are_finite(artifact):
    model = sharpen(continuous(artifact), 20_000.0)
    batch = model.template.collate(RECORDS)
    _, _, outputs = step(model, batch)
    assert outputs.sequence_nll.max() > 1e4
    assert outputs.log_evidence is None or bool(outputs.log_evidence.isfinite().all())
    metrics = evaluate(model, batch)
    assert math.isfinite(metrics["rho_recon"])
    assert math.isfinite(metrics["marginal_nll"])


@pytest.mark.parametrize("temperature", [1e-3, 1.0])
def test_sampling_from_logits_of_ten_thousand_takes_the_largest(artifact, temperature):
    model = sharpen(discrete(artifact), 20_000.0)
    ids, mask = model.template.prefixes(["12", "7"])
    greedy = generate_ids(model.lm, ids, mask, model.template.end_id, 5)
    source = torch.Generator().manual_seed(0)
    sampled = generate_ids(
        model.lm, ids, mask, model.template.end_id, 5, do_sample=True, temperature=temperature, generator=source
    )
    assert torch.equal(sampled, greedy)


@BUILDS
def test_a_batch_with_nothing_to_predict_costs_nothing(artifact, build):
    model = build(artifact)
    batch = model.template.collate(RECORDS)
    batch = dataclasses.replace(batch, y_mask=torch.zeros_like(batch.y_mask))
    _, terms, outputs = step(model, batch)
    assert not outputs.token_nll.any()
    for name in ("reconstruction_loss", "token_weighted_reconstruction_loss", "inter_latent_divergence_loss"):
        assert float(terms[name]) == 0, name
    if build is discrete:  # nothing was seen: the posterior is the router
        torch.testing.assert_close(outputs.posterior_log_probs, outputs.router_log_probs)


@BUILDS
def test_one_record_with_nothing_to_predict_leaves_the_others_alone(artifact, build):
    model = build(artifact)
    batch = model.template.collate(RECORDS)
    mask = batch.y_mask.clone()
    mask[2] = False
    _, _, whole = step(model, batch)
    _, _, holed = step(model, dataclasses.replace(batch, y_mask=mask))
    others = [i for i in range(len(RECORDS)) if i != 2]
    torch.testing.assert_close(holed.token_nll[others], whole.token_nll[others])
    assert not holed.token_nll[2].any()


@BUILDS
@pytest.mark.parametrize("record", [Record("12", ""), Record("", "3=3"), Record("", "")])
def test_empty_texts_have_their_end_to_predict(artifact, build, record):
    model = build(artifact)
    batch = model.template.collate([record])
    assert batch.y_mask.sum() == len(record.y) + 2  # </y> and <eos>
    _, _, outputs = step(model, batch)
    assert bool((outputs.token_nll > 0).all())
    both = model.template.collate([record, RECORDS[2]])  # and padding changes nothing
    _, _, padded = step(model, both)
    if build is discrete:
        width = outputs.token_nll.shape[-1]
        torch.testing.assert_close(padded.token_nll[:1, :, :width], outputs.token_nll, rtol=1e-4, atol=1e-5)
        assert not padded.token_nll[0, :, width:].any()


def test_one_latent_is_refused_and_has_no_divergence(artifact):
    with pytest.raises(ValueError, match="num_latents must be at least 2 for z to mean anything, got 1"):
        discrete(artifact, num_latents=1)
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 1, 3, 4, requires_grad=True), torch.randn(7, 4)
    nll, jsd = latent_token_stats(hidden, weight, torch.tensor([[0, 6, -100], [3, 3, 3]]))
    expected = -(hidden[:, 0] @ weight.T).log_softmax(-1)
    assert nll[0, 0, 1].item() == pytest.approx(float(expected[0, 1, 6].detach()), rel=1e-5)
    assert jsd.detach().abs().max() < 1e-6
    (nll.sum() + jsd.sum()).backward()
    assert bool(hidden.grad.isfinite().all())


@pytest.mark.parametrize("chunk", [None, 5])
def test_more_latents_than_records(artifact, chunk):
    model = discrete(artifact, num_latents=16, num_latent_chunk=chunk)
    batch = model.template.collate(RECORDS[:1])
    _, _, outputs = step(model, batch)
    assert outputs.token_nll.shape[:2] == (1, 16)
    metrics = evaluate(model, batch)
    assert not [name for name, value in metrics.items() if math.isnan(value)], metrics
    assert 1 <= metrics["diagnostics/latent_usage_perplexity"] <= 16


def test_a_bfloat16_head_of_150_000_tokens_errs_less_than_the_plain_one():
    torch.manual_seed(0)
    batch, latents, length, width, vocab = 1, 3, 4, 32, 151_936
    hidden = torch.randn(batch, latents, length, width).bfloat16().requires_grad_()
    weight = (0.3 * torch.randn(vocab, width)).bfloat16()
    targets = torch.randint(vocab, (batch, length))
    exact = (hidden.detach().double() @ weight.double().T).log_softmax(-1)  # [B, K, T, V]
    exact_nll = -exact.gather(-1, targets[:, None, :, None].expand(-1, latents, -1, -1))[..., 0]
    exact_jsd = jensen_shannon_divergence(exact.transpose(1, 2))
    plain = (hidden.detach() @ weight.T).log_softmax(-1)
    plain_nll = -plain.gather(-1, targets[:, None, :, None].expand(-1, latents, -1, -1))[..., 0]
    plain_error = (plain_nll.double() - exact_nll).abs().max()

    nll, jsd = latent_token_stats(hidden, weight, targets)
    assert nll.dtype == jsd.dtype == torch.float32
    assert (nll.double() - exact_nll).abs().max() <= plain_error
    assert (jsd.double() - exact_jsd).abs().max() < 0.02
    assert bool(((jsd >= 0) & (jsd <= math.log(latents))).all())
    (nll.mean() + jsd.mean()).backward()
    assert bool(hidden.grad.isfinite().all())
    one = hidden.detach().double().requires_grad_()
    log_probs = (one @ weight.double().T).log_softmax(-1)
    nats = -log_probs.gather(-1, targets[:, None, :, None].expand(-1, latents, -1, -1)).mean()
    (nats + jensen_shannon_divergence(log_probs.transpose(1, 2)).mean()).backward()
    assert (hidden.grad.double() - one.grad).norm() < 0.02 * one.grad.norm()
