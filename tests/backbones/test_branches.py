"""The shared prefix, the branches and the head against one unpadded sequence at a time through the full model."""

import pytest
import torch
from tiny import CONFIGS, RECORDS, tiny_artifact

from cvae_lightning.backbones import grouped_attention
from cvae_lightning.backbones.branches import run_branches
from cvae_lightning.losses import PosteriorDistillationLoss, ReconstructionLoss
from cvae_lightning.modules import SharedDiscreteCVAE


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def artifact(request, tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp(request.param), request.param)


def module(artifact, **options):
    torch.manual_seed(1)
    losses = {"reconstruction_loss": ReconstructionLoss(), "distillation": PosteriorDistillationLoss()}
    return SharedDiscreteCVAE(artifact, losses, num_latents=3, **options)


def oracle(model, record):
    """Router log-probabilities [K] and token NLL [K, T] of one record, from full unpadded prompts and full logits."""
    t = model.template
    prefix, y = t.segments([record])[0]
    m = t.marker_ids
    rows = []
    for k in t.latent_ids:
        ids = [*prefix, m["<z>"], k, m["</z>"], m["<y>"], *y]
        logits = model.lm(torch.tensor([ids])).logits[0]
        router = logits[len(prefix)][torch.tensor(t.latent_ids)].log_softmax(-1)
        start = len(prefix) + 4
        log_probs = logits.log_softmax(-1)
        rows.append(torch.stack([-log_probs[start + i - 1, token] for i, token in enumerate(y)]))
    return router, torch.stack(rows)


@pytest.mark.parametrize("method", ["cache", "repeat"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_enumeration_equals_one_sequence_at_a_time(artifact, method, side):
    model = module(artifact, branch_method=method, padding_side=side).eval()
    batch = model.template.collate(RECORDS)
    outputs = model.compute_outputs(batch, frozenset({"inter_latent_jsd", "baseline_nll"}))
    for i, record in enumerate(RECORDS):
        router, nll = oracle(model, record)
        size = nll.shape[1]
        torch.testing.assert_close(outputs.router_log_probs[i], router, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(outputs.token_nll[i, :, :size], nll, atol=1e-5, rtol=1e-5)
        assert not outputs.token_nll[i, :, size:].any()
        free = [*model.template.segments([record])[0][0], model.template.marker_ids["<y>"]]
        y = model.template.segments([record])[0][1]
        log_probs = model.reference()(torch.tensor([free + y])).logits[0].log_softmax(-1)
        expected = torch.stack([-log_probs[len(free) - 1 + j, token] for j, token in enumerate(y)])
        torch.testing.assert_close(outputs.baseline_nll[i, :size], expected, atol=1e-5, rtol=1e-5)


def test_methods_give_the_same_gradients(artifact):
    grads = []
    for method in ("cache", "repeat"):
        model = module(artifact, branch_method=method)
        batch = model.template.collate(RECORDS)
        out = model.compute_outputs(batch, frozenset())
        (out.token_nll * torch.linspace(0.5, 2, 3)[:, None]).sum().add(out.router_log_probs[:, 0].sum()).backward()
        grads.append({n: p.grad for n, p in model.lm.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert grads[0]
    for name, value in grads[0].items():
        torch.testing.assert_close(value, grads[1][name], atol=1e-4 * float(value.abs().max() + 1), rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"norm_dim": 2}, {"num_latent_chunk": 2}, {"branch_method": "grouped"}, {"adaptation": "lora"}],
    ids=lambda options: next(iter(options)),
)
def test_attending_in_parts_changes_nothing(artifact, options, monkeypatch):
    found = []
    for queries in (192, 2):
        monkeypatch.setattr(grouped_attention, "QUERIES", queries)
        model = module(artifact, **options)
        for linear in model.norms.maps if model.norms else ():
            torch.nn.init.normal_(linear.weight, std=0.3)
        outputs = model.compute_outputs(model.template.collate(RECORDS), frozenset())
        outputs.token_nll.sin().sum().backward()
        parts = queries == 2 or options.get("branch_method") == "grouped"
        assert (model.lm.config._attn_implementation == grouped_attention.NAME) == parts
        found.append((outputs.token_nll, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[1], found[0], atol=2e-5, rtol=1e-4)


def test_padding_changes_nothing(artifact):
    model = module(artifact).eval()
    fields = frozenset({"inter_latent_jsd"})
    together = model.compute_outputs(model.template.collate(RECORDS), fields)
    for i, record in enumerate(RECORDS):
        alone = model.compute_outputs(model.template.collate([record]), fields)
        size = alone.token_nll.shape[-1]
        torch.testing.assert_close(together.token_nll[i, :, :size], alone.token_nll[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.amortized_log_probs[i], alone.amortized_log_probs[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.inter_latent_jsd[i, :size], alone.inter_latent_jsd[0], atol=1e-5, rtol=1e-5)


def test_greedy_generation_equals_the_argmax_of_the_full_model(artifact):
    model = module(artifact).eval()
    t, m = model.template, model.template.marker_ids
    banned = torch.tensor([m[k] for k in m if k != "</y>"] + t.latent_ids)
    xs = ["12", "7", "3456"]
    for z, (x, text) in zip(
        [0, 2, 1], zip(xs, model.generate(xs, [0, 2, 1], max_new_tokens=6), strict=True), strict=True
    ):
        ids = [*t.segments([RECORDS[0].__class__(x, "")])[0][0], m["<z>"], t.latent_ids[z], m["</z>"], m["<y>"]]
        new = []
        for _ in range(6):
            logits = model.lm(torch.tensor([ids])).logits[0, -1]
            logits[banned] = float("-inf")
            ids.append(int(logits.argmax()))
            new.append(ids[-1])
            if new[-1] == t.end_id:
                break
        assert t.decode(torch.tensor([new]))[0] == text


def test_route_equals_the_router_of_the_step(artifact):
    model = module(artifact).eval()
    outputs = model.compute_outputs(model.template.collate(RECORDS), frozenset())
    torch.testing.assert_close(model.route([r.x for r in RECORDS]), outputs.router_log_probs, atol=1e-5, rtol=1e-5)


def test_embedded_suffixes_equal_token_suffixes(artifact):
    model = module(artifact).eval()
    batch = model.template.collate(RECORDS)
    ids = torch.randint(0, 10, (len(RECORDS), 2, 4))
    vectors = model.lm.get_input_embeddings()(ids)
    mask = torch.ones(len(RECORDS), 4, dtype=torch.bool)
    for method in ("cache", "repeat"):
        runs = [run_branches(model.lm, batch.prefix_ids, batch.prefix_mask, s, mask, method) for s in (ids, vectors)]
        torch.testing.assert_close(runs[0].hidden, runs[1].hidden, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(runs[0].router_hidden, runs[1].router_hidden, atol=1e-5, rtol=1e-5)
