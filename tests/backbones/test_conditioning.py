"""Latent vectors in the input, and conditioned norms through hooks."""

import copy

import pytest
import torch
from tiny import CONFIGS, RECORDS, tiny_artifact, tiny_lm

from cvae_lightning.backbones.causal_lm import build_causal_lm, read_hidden
from cvae_lightning.backbones.conditioning import LatentNorms, LatentPrefix
from cvae_lightning.losses import ReconstructionLoss
from cvae_lightning.modules import ContinuousCVAE

FAMILIES = sorted(CONFIGS)


def module(folder, **options):
    torch.manual_seed(1)
    options = {"latent_dim": 3, "num_samples": 2, "posterior": "reparameterized", **options}
    model = ContinuousCVAE(folder, {"reconstruction_loss": ReconstructionLoss()}, **options)
    if model.norms is not None:
        for linear in model.norms.maps:
            torch.nn.init.normal_(linear.weight, std=0.3)
    return model


@pytest.mark.parametrize("hidden", [0, 8])
def test_prefix_starts_with_the_spread_of_the_embeddings(hidden):
    lm, _ = tiny_lm()
    table = lm.get_input_embeddings().weight.detach()
    torch.manual_seed(0)
    prefix = LatentPrefix(lm, latent_dim=64, length=2, hidden=hidden)
    vectors = prefix(torch.randn(500, 7, 64)).detach()
    assert vectors.shape == (500, 7, 2, table.shape[1])
    torch.testing.assert_close(vectors.mean((0, 1)), table.mean(0).expand(2, -1), atol=0.2 * float(table.std()), rtol=0)
    if not hidden:
        assert float(vectors.std(0).mean()) == pytest.approx(float(table.std()), rel=0.2)
    with pytest.raises(ValueError, match="prefix_length"):
        LatentPrefix(lm, 2, length=0)


def test_prefix_has_the_scale_of_embeddings_that_their_module_multiplies():
    """Gemma multiplies by the root of the width, 4."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    lm = build_causal_lm({"model_type": "gemma2", **sizes, "num_key_value_heads": 1, "head_dim": 8}, 40, 0)
    seen = lm.get_input_embeddings()(torch.arange(40)).detach()
    assert float(seen.std()) == pytest.approx(4 * float(lm.get_input_embeddings().weight.detach().std()))
    vectors = LatentPrefix(lm, latent_dim=64)(torch.randn(2000, 64)).detach()
    assert float(vectors.std(0).mean()) == pytest.approx(float(seen.std()), rel=0.2)
    torch.testing.assert_close(vectors.mean((0, 1)), seen.mean(0), atol=0.1 * float(seen.std()), rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_change_nothing_at_the_start_nor_outside(family):
    lm, template = tiny_lm(family)
    batch = template.collate(RECORDS)
    plain = read_hidden(copy.deepcopy(lm).get_decoder(), batch.prefix_ids, batch.prefix_mask)
    norms = LatentNorms(lm, latent_dim=3)
    expected = {"llama": 5, "gpt2": 5, "qwen2": 5}[family]  # two per block and the last one
    assert len(norms.maps) == expected
    z = torch.randn(len(batch), 3)
    with norms.given(z):
        assert torch.equal(read_hidden(lm.get_decoder(), batch.prefix_ids, batch.prefix_mask), plain)
    torch.nn.init.normal_(norms.maps[0].weight)
    assert torch.equal(read_hidden(lm.get_decoder(), batch.prefix_ids, batch.prefix_mask), plain)
    with norms.given(z):
        changed = read_hidden(lm.get_decoder(), batch.prefix_ids, batch.prefix_mask)
    assert (changed - plain).abs().max() > 1e-3
    with norms.given(z, start=3):
        late = read_hidden(lm.get_decoder(), batch.prefix_ids, batch.prefix_mask)
    assert torch.equal(late[:, :3], plain[:, :3])
    with norms.given(z[:2]), pytest.raises(ValueError, match="2 latents for 5 rows"):
        read_hidden(lm.get_decoder(), batch.prefix_ids, batch.prefix_mask)


def test_first_norm_follows_its_formula():
    lm, _ = tiny_lm()
    norms = LatentNorms(lm, latent_dim=2)
    torch.nn.init.normal_(norms.maps[0].weight)
    first = lm.get_decoder().layers[0].input_layernorm
    hidden, z = torch.randn(2, 4, 16), torch.randn(2, 2)
    plain = first(hidden)
    with norms.given(z):
        found = first(hidden)
    scale, shift = (z @ norms.maps[0].weight.t())[:, None].split(16, -1)
    torch.testing.assert_close(found, plain * (1 + scale) + shift)


@pytest.mark.parametrize("injection", ["prefix", "norm", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_branches_equal_one_sequence_at_a_time(tmp_path, family, injection):
    """Cached and repeated branches, padded on either side, against one unpadded sequence per sample."""
    folder = tiny_artifact(tmp_path, family)
    for method in ("auto", "cache", "repeat"):
        for side in ("left", "right"):
            model = module(folder, injection=injection, prefix_length=2, branch_method=method, padding_side=side)
            model = model.eval()
            batch = model.template.collate(RECORDS)
            z = torch.randn(len(RECORDS), 2, 3, generator=torch.Generator().manual_seed(0))
            branches = model.encode(batch, z)
            nll, _ = model.generator(branches.hidden, batch)
            for i, record in enumerate(RECORDS):
                hidden, expected = oracle(model, record, z[i])
                torch.testing.assert_close(branches.router_hidden[i], hidden, atol=1e-4, rtol=1e-4)
                size = expected.shape[1]
                torch.testing.assert_close(nll[i, :, :size], expected, atol=2e-4, rtol=1e-4)
                assert not nll[i, :, size:].any()


def oracle(model, record, latents):
    """Hidden state [E] at <z> and token NLL [S, T], from full unpadded prompts."""
    m, rows = model.template.marker_ids, []
    prefix, y = model.template.segments([record])[0]
    table = model.lm.get_input_embeddings().weight
    before = torch.tensor([*prefix, m["<z>"]])
    hidden = read_hidden(model.lm.get_decoder(), before[None], torch.ones(1, len(before)))[0, -1]
    for z in latents:
        slot = model.prefix(z if model.injection != "norm" else torch.zeros_like(z))
        behind = table[torch.tensor([m["</z>"], m["<y>"], *y])]
        inputs = torch.cat([table[before], slot, behind])[None]
        if model.norms is None:
            logits = model.lm(inputs_embeds=inputs).logits[0]
        else:
            with model.norms.given(z[None], start=len(before)):
                logits = model.lm(inputs_embeds=inputs).logits[0]
        start = len(before) + len(slot) + 2
        log_probs = logits.log_softmax(-1)
        rows.append(torch.stack([-log_probs[start + i - 1, token] for i, token in enumerate(y)]))
    return hidden, torch.stack(rows)


@pytest.mark.parametrize("injection", ["prefix", "norm", "both"])
def test_greedy_generation_follows_the_likelihood(tmp_path, injection):
    """Every generated token is the most probable one under a full pass over what was generated before it."""
    model = module(tiny_artifact(tmp_path), injection=injection).eval()
    xs = [r.x for r in RECORDS]
    z = torch.randn(len(xs), 3, generator=torch.Generator().manual_seed(0)) * 2
    ys = model.generate(xs, z, max_new_tokens=6, batch_size=2)
    m = model.template.marker_ids
    banned = [m[t] for t in m if t != "</y>"]
    table = model.lm.get_input_embeddings().weight
    for x, latent, y in zip(xs, z, ys, strict=True):
        ids = model.template.tokenizer(y, add_special_tokens=False)["input_ids"]
        prefix = model.template.prefixes([x])[0][0].tolist()
        before = torch.tensor([*prefix, m["<z>"]])
        slot = model.prefix(latent if injection != "norm" else torch.zeros(3))
        behind = torch.tensor([m["</z>"], m["<y>"], *ids])
        inputs = torch.cat([table[before], slot, table[behind]])[None]
        if model.norms is None:
            logits = model.lm(inputs_embeds=inputs).logits[0]
        else:
            with model.norms.given(latent[None], start=len(before)):
                logits = model.lm(inputs_embeds=inputs).logits[0]
        logits[:, banned] = float("-inf")
        predicted = logits[len(before) + len(slot) + 1 :].argmax(-1).tolist()
        special = model.template.tokenizer.all_special_ids  # the end, or a token that the text does not show
        end = next((i for i, token in enumerate(predicted) if token in special), len(ids))
        assert predicted[:end] == ids[:end]
        assert end or not ids or predicted[0] in special


def test_contexts_nest():
    """A backward pass may read branches again while a context is open."""
    lm, template = tiny_lm()
    batch = template.collate(RECORDS)
    norms = LatentNorms(lm, latent_dim=3)
    torch.nn.init.normal_(norms.maps[1].weight)
    outer, inner = torch.randn(2, len(batch), 3)

    def read():
        return read_hidden(lm.get_decoder(), batch.prefix_ids, batch.prefix_mask)

    with norms.given(outer, start=2):
        expected = read()
        with norms.given(inner):
            assert not torch.equal(read(), expected)
        assert torch.equal(read(), expected)


def test_chunks_of_latents_are_conditioned_in_the_backward_pass_too():
    from cvae_lightning.backbones.branches import run_branches

    lm, template = tiny_lm()
    batch = template.collate(RECORDS)
    norms = LatentNorms(lm, latent_dim=2)
    for linear in norms.maps:
        torch.nn.init.normal_(linear.weight, std=0.3)
    suffix = torch.randint(4, 10, (len(batch), 3, 4), generator=torch.Generator().manual_seed(0))
    results = []
    for method, chunk in (("repeat", None), ("repeat", 2), ("cache", 2)):
        z = torch.randn(len(batch), 3, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
        mask = torch.ones(len(batch), 4, dtype=torch.bool)
        inputs = (batch.prefix_ids, batch.prefix_mask, suffix, mask, method, chunk, norms, z)
        hidden = run_branches(lm, *inputs).hidden
        results.append((hidden.detach(), *torch.autograd.grad(hidden.sin().sum(), [z, norms.maps[2].weight])))
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="branch_method=grouped"):
        run_branches(lm, *inputs[:4], "grouped", None, norms, z)


def test_grouped_branches_refuse_conditioned_norms(tmp_path):
    with pytest.raises(ValueError, match="branch_method=grouped"):
        module(tiny_artifact(tmp_path), injection="norm", branch_method="grouped")
