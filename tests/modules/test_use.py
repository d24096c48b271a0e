"""Inference and scoring of texts by trained latents, against loops over the model's own forward pass."""

import lightning as L
import numpy as np
import pytest
import torch
from tiny import QUIET, RECORDS, tiny_artifact, tiny_lm

from cvae_lightning.backbones.artifact import Baseline, save_artifact
from cvae_lightning.backbones.causal_lm import load_causal_lm
from cvae_lightning.losses import PosteriorDistillationLoss, ReconstructionLoss
from cvae_lightning.modules import ContinuousCVAE, SharedDiscreteCVAE
from cvae_lightning.outputs import Record

XS, YS = [r.x for r in RECORDS], [r.y for r in RECORDS]
PLAIN = {"reconstruction_loss": ReconstructionLoss()}
DISTILLED = PLAIN | {"posterior_distillation_loss": PosteriorDistillationLoss()}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("artifact"))


def build(artifact, losses=PLAIN, cls=SharedDiscreteCVAE, **options):
    torch.manual_seed(1)
    return cls(artifact, losses, **options)


def alone(model, x, y):
    """log p(z_k|x) and log p(y|x,z_k) of one record: one unpadded sequence at a time through the language model."""
    t, word = model.template, model.template.tokenizer.convert_tokens_to_ids
    prompt = [*t.bos, word("<x>"), *t._ids([x])[0], word("</x>"), word("<z>")]
    logits = model.lm(torch.tensor([prompt]), use_cache=False).logits[0, -1, t.latent_ids]
    likelihoods = []
    for k in range(model.num_latents):
        parts = [word(f"<z_{k}>"), *(word(f"<z_{k}.{i}>") for i in range(1, t.prefix_length))]
        head, tail = [*prompt, *parts, word("</z>"), word("<y>")], [*t._ids([y])[0], word("</y>"), *t.eos]
        log_probs = model.lm(torch.tensor([head + tail]), use_cache=False).logits[0].log_softmax(-1)
        likelihoods.append(sum(log_probs[len(head) - 1 + i, token] for i, token in enumerate(tail)))
    return logits.log_softmax(-1), torch.stack(likelihoods)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2])
def test_scores_are_those_of_the_enumerated_latents(artifact, length):
    model = build(artifact, num_latents=3, prefix_length=length).train()
    router, likelihood = (torch.stack(rows) for rows in zip(*map(alone, [model] * 5, XS, YS), strict=True))
    evidence = (router.exp() * likelihood.double().exp()).sum(-1).log().float()
    close = {"rtol": 1e-4, "atol": 1e-4}
    for size in (1, 2, 8):
        torch.testing.assert_close(model.route(XS, batch_size=size), router, **close)
        torch.testing.assert_close(model.log_likelihood(XS, YS, batch_size=size), likelihood, **close)
        torch.testing.assert_close(model.log_evidence(XS, YS, batch_size=size), evidence, **close)
        bayes = model.infer(XS, YS, temperature=1.0, batch_size=size)
        torch.testing.assert_close(bayes, router + likelihood - evidence[:, None], **close)
    sharp = (router + likelihood / 0.3).log_softmax(-1)
    torch.testing.assert_close(model.infer(XS, YS, "exact"), sharp, rtol=1e-3, atol=1e-3)
    assert model.training  # as it was


def test_the_posterior_network_where_there_is_one(artifact):
    model = build(artifact, DISTILLED, num_latents=3)
    torch.nn.init.normal_(model.posterior_network.project.weight)
    found = model.infer(XS, YS, "amortized", batch_size=2)
    with torch.no_grad():
        expected = torch.cat([model.amortized_posterior(model.template.collate([r])) for r in RECORDS])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, model.infer(XS, YS), atol=0.1)
    amortized = build(artifact, posterior="amortized", num_latents=3)
    assert torch.equal(amortized.infer(XS, YS), amortized.infer(XS, YS, "amortized"))
    with pytest.raises(ValueError, match="posterior network of this model was not trained"):
        build(artifact, num_latents=3).infer(XS, YS, "amortized")


def test_wrong_texts_are_one_clear_error(artifact):
    model = build(artifact, num_latents=2)
    for call, message in (
        (lambda: model.generate("12"), r"x must be a list of texts, got the single text '12': give \[x\]"),
        (lambda: model.route("12"), "x must be a list of texts"),
        (lambda: model.infer(["12"], "3"), "y must be a list of texts"),
        (lambda: model.log_evidence([12], ["3"]), "x must hold texts, got 12 of type int"),
        (lambda: model.log_evidence(["1", "2"], ["3"]), "got 2 x and 1 y"),
        (lambda: model.infer(XS, YS, "variational"), "posterior must be 'exact' or 'amortized'"),
        (lambda: model.infer(XS, YS, "amortized", temperature=1.0), "temperature belongs to posterior='exact'"),
        (lambda: model.infer(XS, YS, temperature=-1.0), "beta must be a positive"),
        (lambda: model.route(XS, batch_size=0), "batch_size must be at least 1"),
        (lambda: model.log_likelihood(["1"], ["2" * 80]), "more than the model's 64 positions"),
        (lambda: model.generate(XS, "best"), "'router', 'argmax' or 'all'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("cls", [SharedDiscreteCVAE, ContinuousCVAE])
def test_a_base_model_in_half_precision_is_loaded_in_full(tmp_path, cls):
    """What is trained is fp32, whatever the base model's config says; its checkpoint is not rounded when loaded."""
    lm, template = tiny_lm()
    save_artifact(
        tmp_path / "base", lm.bfloat16(), template.tokenizer, Baseline(1.5, 10, "val", template.fingerprint())
    )
    model = build(str(tmp_path / "base"), cls=cls)
    assert {model.lm.dtype, load_causal_lm(str(tmp_path / "base")).dtype} == {torch.float32}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    trainer = L.Trainer(**QUIET)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = cls.load_from_checkpoint(tmp_path / "model.ckpt")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.equal(again.log_evidence(XS, YS), model.log_evidence(XS, YS))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("cls", [SharedDiscreteCVAE, ContinuousCVAE])
def test_an_x_that_leaves_no_room_is_one_clear_error(tmp_path, cls, family):
    model = build(tiny_artifact(tmp_path, family), cls=cls)
    model.template.max_length = 20  # of records to train on; no matter here
    batch = model.template.unlimited().collate([Record("2", ""), Record("1" * 80, "")])
    for call in (
        lambda: model.route(batch.x),
        lambda: model.generate(batch.x, max_new_tokens=3),
        lambda: model.generate(batch.x, max_new_tokens=3, num_beams=2),
        lambda: model.predict_step(batch, 0),
    ):
        with pytest.raises(ValueError, match=r"whose x begins with '1111.*the model's 64 positions"):
            call()
    assert model.log_evidence(["1" * 20], ["2" * 10]).isfinite()


def test_a_latent_may_be_any_kind_of_number(artifact):
    model, options = build(artifact, num_latents=3), {"max_new_tokens": 5}
    expected = model.generate(XS, 1, **options)
    for z in (np.int64(1), torch.tensor(1), [1] * 5, np.ones(5, int), torch.ones(5, dtype=torch.int64), (1,) * 5):
        assert model.generate(XS, z, **options) == expected
    for wrong in (1.0, [1.0] * 5, [[1]] * 5, None):
        with pytest.raises(ValueError, match="z must be a latent or a list of latents, got"):
            model.generate(XS, wrong)
    with pytest.raises(ValueError, match="one for all or one per x"):
        model.generate(XS, [1, 1])
    gaussian = build(artifact, cls=ContinuousCVAE, latent_dim=2)
    expected = gaussian.generate(XS, torch.full((2,), 0.5), **options)
    for z in ([0.5, 0.5], np.full(2, 0.5), np.full((5, 2), 0.5), [[0.5, 0.5]] * 5):
        assert gaussian.generate(XS, z, **options) == expected


def test_nothing_asked_for_is_nothing(artifact):
    model = build(artifact, num_latents=2)
    assert model.route([]).shape == model.infer([], []).shape == model.log_likelihood([], []).shape == (0, 2)
    assert model.log_evidence([], []).shape == (0,)
    assert model.generate([], "all") == []
    gaussian = build(artifact, cls=ContinuousCVAE, latent_dim=2)
    assert [t.shape for t in (*gaussian.route([]), *gaussian.infer([], []))] == [(0, 2)] * 4
    assert gaussian.log_evidence([], []).shape == (0,)


@torch.no_grad()
def test_the_evidence_of_a_gaussian_latent_is_that_of_a_numerical_integral(artifact):
    model = build(artifact, cls=ContinuousCVAE, latent_dim=1, num_eval_samples=4)
    torch.nn.init.normal_(model.router_head.weight, std=0.02)
    mean, logvar = model.route(XS)
    grid = torch.linspace(-6, 6, 401)
    z = mean + (0.5 * logvar).exp() * grid  # [B, G], in standard deviations of the router
    expected = []
    for i, record in enumerate(RECORDS):
        batch = model.template.collate([record])
        nll = model.generator(model.encode(batch, z[i, None, :, None]).hidden, batch)[0].sum(-1)[0].double()
        density = torch.exp(-0.5 * grid.double().square()) / (2 * torch.pi) ** 0.5
        expected.append(torch.trapezoid(density * (-nll).exp(), grid.double()).log())
    expected = torch.stack(expected).float()
    found = model.log_evidence(XS, YS, num_samples=400)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.15)
    assert torch.equal(found, model.log_evidence(XS, YS, num_samples=400))
    few = torch.stack([model.log_evidence(XS, YS, generator_seed=100 * seed) for seed in range(30)])
    assert bool((few.mean(0) < expected + 2 * few.std(0) / 30**0.5).all())  # a lower bound in expectation
    torch.testing.assert_close(model.log_evidence(XS, YS, batch_size=2), few[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        model.log_evidence(XS, YS, num_samples=0)


def test_neighbouring_seeds_of_the_evidence_have_no_sample_in_common(artifact):
    model = build(artifact, cls=ContinuousCVAE, latent_dim=2, num_eval_samples=2)
    same = ([XS[0]] * 4, [YS[0]] * 4)
    found = torch.stack([model.log_evidence(*same, generator_seed=seed) for seed in range(3)])
    gaps = (found.flatten()[:, None] - found.flatten()).abs()
    assert gaps[~torch.eye(12, dtype=torch.bool)].min() > 1e-6


def test_batches_do_not_change_a_gaussian_posterior(artifact):
    model = build(artifact, cls=ContinuousCVAE, latent_dim=2)
    for whole, parts in zip(model.infer(XS, YS), model.infer(XS, YS, batch_size=2), strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", [SharedDiscreteCVAE, ContinuousCVAE])
def test_token_ids_say_what_their_texts_say(artifact, cls):
    model = build(artifact, DISTILLED if cls is SharedDiscreteCVAE else PLAIN, cls)
    x, y = ([model.template._ids([text])[0] for text in texts] for texts in (XS, YS))
    for kind in (list, tuple, torch.tensor):
        some = [kind(ids) for ids in x]
        torch.testing.assert_close(model.route(some), model.route(XS), rtol=0, atol=0)
        torch.testing.assert_close(model.infer(some, y), model.infer(XS, YS), rtol=0, atol=0)
    evidence = [run(model.log_evidence, *pair) for pair in ((XS, YS), (x, y), (XS, y))]
    torch.testing.assert_close(evidence[1:], [evidence[0]] * 2, rtol=0, atol=0)
    z = torch.zeros(model.latent_dim) if cls is ContinuousCVAE else "argmax"
    texts, ids = (model.generate(some, z, max_new_tokens=9) for some in (XS, x))
    assert model.template.tokenizer.batch_decode(ids, skip_special_tokens=True) == texts
    assert any(texts)
    several = model.generate(x, z, do_sample=True, num_return_sequences=2, max_new_tokens=4, generator_seed=0)
    assert [len(two) for two in several] == [2] * len(x)
    assert all(isinstance(i, int) for two in several for one in two for i in one)


@torch.no_grad()
def test_a_seed_draws_latents_and_tokens_independently(tmp_path):
    model = build(tiny_artifact(tmp_path, "qwen2"), num_latents=12).eval()
    model.lm.get_output_embeddings().weight.zero_()  # router and tokens are uniform
    latents, generate = [], model._generate
    model._generate = lambda x, section, z, *a, **o: latents.append(int(z)) or generate(x, section, z, *a, **o)
    options = {"do_sample": True, "max_new_tokens": 1}
    tokens = [model.generate([[4]], "router", generator_seed=seed, **options)[0] for seed in range(300)]
    equal = sum(token == [z] for token, z in zip(tokens, latents, strict=True))
    chance = 1 / len(set(map(tuple, tokens)))
    assert equal < 300 * chance + 4 * (300 * chance) ** 0.5
    again = [model.generate([[4]], "router", generator_seed=seed, **options)[0] for seed in range(30)]
    assert (again, latents[300:]) == (tokens[:30], latents[:30])
    assert len(set(latents)) == 12


@torch.no_grad()
def test_a_seed_draws_gaussian_latents_apart_from_tokens(artifact):
    model = build(artifact, cls=ContinuousCVAE, latent_dim=3)
    mean, logvar = model.route(XS)
    noise = (model._latents(XS, "router", 5) - mean) / (0.5 * logvar).exp()
    tokens = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))  # the stream that draws y
    assert (noise - tokens).abs().max() > 0.1
    assert torch.equal(model._latents(XS, "router", 5), model._latents(XS, "router", 5))
    assert not torch.equal(model._latents(XS, "router", 5), model._latents(XS, "router", 6))


def run(function, *arguments):
    torch.manual_seed(0)
    return function(*arguments)


def test_ids_that_stand_for_no_text_are_refused(artifact):
    model = build(artifact, num_latents=2)
    marker, size = model.template.marker_ids["</x>"], len(model.template)
    for wrong, message in [
        ([[5, marker]], f"token id {marker} is a marker's or a latent's"),
        ([[5], [model.template.latent_ids[1]]], "is a marker's or a latent's"),
        ([[size]], f"token id {size} is outside the vocabulary of {size}"),
        ([[-1]], "token id -1 is outside"),
        ([5, 6], "x must hold texts, got 5 of type int"),
        ([[5], "5"], "x must hold texts, got '5' of type str"),
        (["5", [5]], "x must hold texts, got .5. of type list"),
        ([torch.tensor([0.5])], "of type Tensor"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.generate(wrong, 0)
