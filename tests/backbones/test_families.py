"""Every way of running branches over families of models: equal to one unpadded sequence at a time, gradients too."""

from types import SimpleNamespace

import pytest
import torch
from tiny import kept_for_backward
from transformers.integrations import sdpa_attention

from cvae_lightning.backbones import grouped_attention
from cvae_lightning.backbones.branch_activations import BranchActivations
from cvae_lightning.backbones.branch_choice import candidate_methods
from cvae_lightning.backbones.branches import METHODS, run_branches
from cvae_lightning.backbones.causal_lm import build_causal_lm, decoder_of

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
FAMILIES = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {**SMALL, "tie_word_embeddings": True},
    "qwen2": {**SMALL, "num_key_value_heads": 1},
    "mistral": {**SMALL, **GROUPED, "sliding_window": 5},
    "gemma2": {**SMALL, **GROUPED, "sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "lfm2": {**SMALL, "num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]},
    "mamba2": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "head_dim": 8,
        "state_size": 4,
        "n_groups": 1,
        "chunk_size": 4,
    },
}
METHODS_OF = {
    "gpt2": ["cache", "grouped"],
    "llama": ["cache", "grouped"],
    "qwen2": ["cache", "grouped"],
    "mistral": ["cache"],
    "gemma2": ["cache"],
    "lfm2": [],
    "mamba2": [],
}
VOCABULARY, LATENTS = 40, 3


def build(family, seed=0):
    torch.manual_seed(seed)
    lm = build_causal_lm({"model_type": family, **FAMILIES[family]}, VOCABULARY, 0)
    with torch.no_grad():  # logits and attention far from uniform, so that an error shows
        for parameter in lm.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return lm


def prompts(padding, batch=3, width=6, length=5):
    """Random prompts with [6, 3, 4] prefix and [5, 5, 2] suffix tokens, padded on either side or not at all."""
    generator = torch.Generator().manual_seed(1)
    prefix = torch.randint(1, VOCABULARY, (batch, width), generator=generator)
    suffix = torch.randint(1, VOCABULARY, (batch, LATENTS, length), generator=generator)
    sizes = torch.tensor([width] * batch if padding == "none" else [width, 3, 4])[:, None]
    place = torch.arange(width)
    prefix_mask = place >= width - sizes if padding == "left" else place < sizes
    suffix_mask = torch.arange(length) < torch.tensor([length, length, 2])[:, None]
    return prefix, prefix_mask, suffix, suffix_mask


def statistics(lm, method, padding, chunk=None, grad=True, activations=None, weighed=slice(None)):
    """A scalar that depends on every real hidden state of the latents that weigh, its value and its gradients."""
    device = next(lm.parameters()).device
    prefix, prefix_mask, suffix, suffix_mask = (given.to(device) for given in prompts(padding))
    output = run_branches(lm, prefix, prefix_mask, suffix, suffix_mask, method, chunk, activations=activations)
    hidden = output.hidden * suffix_mask[:, None, :, None]
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).to(device)
    total = (hidden.sin() * weights)[:, weighed].sum() + (output.router_hidden.sin() * weights[:, 0, 0]).sum()
    grads = torch.autograd.grad(total, list(lm.parameters()), allow_unused=True) if grad else ()
    return hidden.detach(), output.router_hidden.detach(), grads


def assert_equal_gradients(lm, found, expected):
    for (name, _), a, b in zip(lm.named_parameters(), found, expected, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert float((a - b).norm()) <= 1e-4 * float(b.norm()) + 1e-6, name


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(
    ("family", "method"),
    [(f, m) for f in FAMILIES for m in [*METHODS_OF[f], "repeat"]]
    + [(f, "packed") for f, methods in METHODS_OF.items() if "grouped" in methods],
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_hidden_states_equal_one_unpadded_sequence_at_a_time(family, method, padding):
    lm = build(family).eval()
    prefix, prefix_mask, suffix, suffix_mask = prompts(padding)
    with torch.no_grad():
        hidden, router_hidden, _ = statistics(lm, method, padding, grad=False)
        for i in range(len(prefix)):
            start = prefix[i][prefix_mask[i]]
            for k in range(LATENTS):
                real = suffix[i, k][suffix_mask[i]]
                alone = decoder_of(lm)(torch.cat([start, real])[None], use_cache=False).last_hidden_state[0]
                torch.testing.assert_close(hidden[i, k, : len(real)], alone[len(start) :], atol=2e-5, rtol=1e-4)
                torch.testing.assert_close(router_hidden[i], alone[len(start) - 1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("queries", [192, 2])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(("family", "method"), [(f, m) for f, methods in METHODS_OF.items() for m in methods])
def test_gradients_equal_those_of_repeat(family, method, padding, queries, monkeypatch):
    expected = statistics(build(family), "repeat", padding)
    monkeypatch.setattr(grouped_attention, "QUERIES", queries)
    lm = build(family)
    found = statistics(lm, method, padding)
    torch.testing.assert_close(found[:2], expected[:2], atol=2e-5, rtol=1e-4)
    assert_equal_gradients(lm, found[2], expected[2])
    if queries == 2:
        parts = "grouped" in METHODS_OF[family]
        assert (lm.config._attn_implementation == grouped_attention.NAME) == parts


@pytest.mark.parametrize(("length", "parts"), [(1, 1), (287, 1), (289, 2), (1027, 5)])
def test_long_branches_attend_in_parts_that_see_no_later_key(length, parts, monkeypatch):
    scores = []
    whole = sdpa_attention.sdpa_attention_forward

    def counted(module, query, key, *others, **options):
        scores.append(query.shape[2] * key.shape[2])
        return whole(module, query, key, *others, **options)

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", counted)
    query, key = torch.randn(1, 2, length, 4), torch.randn(1, 1, 3 + length, 4)
    mask = torch.ones(length, 3 + length, dtype=torch.bool).tril(3)[None, None]
    module = SimpleNamespace(num_key_value_groups=2)
    found = grouped_attention.attend_in_parts(module, query, key, key, mask)
    assert len(scores) == parts
    assert sum(scores) <= length * (3 + length) * (0.51 + 0.5 / parts)
    scores.clear()
    torch.testing.assert_close(found, counted(module, query, key, key, mask)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has no backward pass on a CPU")
def test_gradients_of_packed_branches_equal_those_of_repeat():
    for family in ("gpt2", "llama", "qwen2"):
        lm = build(family).cuda()
        found, expected = (statistics(lm, method, "left") for method in ("packed", "repeat"))
        torch.testing.assert_close(found[:2], expected[:2], atol=2e-4, rtol=1e-3)
        assert_equal_gradients(lm, found[2], expected[2])


@pytest.mark.parametrize(("method", "family"), [("cache", "gemma2"), ("grouped", "gpt2"), ("repeat", "lfm2")])
@pytest.mark.parametrize("chunk", [1, 2])
def test_latents_in_chunks_change_nothing(family, method, chunk):
    lm = build(family)
    found, expected = statistics(lm, method, "left", chunk), statistics(lm, method, "left")
    torch.testing.assert_close(found[:2], expected[:2], atol=2e-5, rtol=1e-4)
    assert_equal_gradients(lm, found[2], expected[2])


@pytest.mark.parametrize("weighed", [slice(None), slice(1, 2), slice(0)], ids=["all", "one", "none"])
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("queries", [192, 2])
@pytest.mark.parametrize("family", [family for family, methods in METHODS_OF.items() if "cache" in methods])
def test_activations_made_again_change_nothing(family, queries, chunk, weighed, monkeypatch):
    monkeypatch.setattr(grouped_attention, "QUERIES", queries)
    expected = statistics(build(family), "cache", "left", weighed=weighed)
    lm, activations = build(family), BranchActivations("again")
    found = statistics(lm, "cache", "left", chunk, activations=activations, weighed=weighed)
    torch.testing.assert_close(found[:2], expected[:2], atol=2e-5, rtol=1e-4)
    assert_equal_gradients(lm, found[2], expected[2])
    assert activations.share == pytest.approx(len(range(LATENTS)[weighed]) / LATENTS)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_gradient_checkpointing_changes_nothing(family):
    lm = build(family).train()
    expected = statistics(lm, "repeat", "left")
    lm.activation_checkpointing_enable({"use_reentrant": False})
    assert candidate_methods(lm) == (["grouped"] if "grouped" in METHODS_OF[family] else [])
    found = statistics(lm, "auto", "left")
    torch.testing.assert_close(found[:2], expected[:2], atol=2e-5, rtol=1e-4)
    assert_equal_gradients(lm, found[2], expected[2])
    with pytest.raises(ValueError, match="gradient checkpointing"):
        statistics(lm, "cache", "left")


@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_and_choice(family, recwarn):
    lm = build(family)
    assert candidate_methods(lm) == METHODS_OF[family]
    before = torch.random.get_rng_state()
    statistics(lm, "auto", "left")
    assert torch.equal(before, torch.random.get_rng_state())
    assert lm.training
    assert not [w for w in recwarn if "branch_method" in str(w.message)]


def test_a_method_that_disagrees_is_given_up(monkeypatch):
    lm, expected = build("llama"), statistics(build("llama"), "repeat", "left")

    def wrong(lm, inputs):
        output = METHODS["repeat"](lm, inputs)
        return type(output)(output.hidden * 1.001, output.router_hidden)

    def broken(lm, inputs):
        raise RuntimeError("no such thing")

    monkeypatch.setitem(METHODS, "cache", wrong)
    monkeypatch.setitem(METHODS, "grouped", broken)
    with pytest.warns(UserWarning, match="does not work with branch_method") as warned:
        found = statistics(lm, "auto", "left")
    assert ["off by" in str(w.message) for w in warned] == [True, False]
    torch.testing.assert_close(found[0], expected[0])
    monkeypatch.undo()
    torch.testing.assert_close(statistics(lm, "auto", "left")[0], expected[0])  # the choice was kept, and not warned of


def test_a_model_that_keeps_its_attention_in_the_dark_goes_by_the_mask(monkeypatch):
    """Nemotron's layers do not hand arguments on."""
    monkeypatch.setitem(FAMILIES, "nemotron", {**SMALL, "num_key_value_heads": 1})
    expected = statistics(build("nemotron"), "repeat", "left")
    monkeypatch.setattr(grouped_attention, "QUERIES", 2)
    lm = build("nemotron")
    found = statistics(lm, "cache", "left")
    assert lm.config._attn_implementation == grouped_attention.NAME
    torch.testing.assert_close(found[:2], expected[:2], atol=2e-5, rtol=1e-4)
    assert_equal_gradients(lm, found[2], expected[2])
    with pytest.raises(ValueError, match="is not told of branches"):
        statistics(lm, "grouped", "left")


def test_a_chosen_attention_function_leaves_ordinary_use_alone():
    lm = build("qwen2").eval()
    ids, mask = prompts("left")[:2]
    before = lm(input_ids=ids, attention_mask=mask.long()).logits
    statistics(lm, "grouped", "left")
    assert lm.config._attn_implementation == "latent_branches"
    torch.testing.assert_close(lm(input_ids=ids, attention_mask=mask.long()).logits[mask], before[mask])
    assert "latent_branches" not in str(lm.config.to_dict())


def test_grouped_refuses_what_it_would_get_wrong():
    with pytest.raises(ValueError, match="use cache or repeat"):
        statistics(build("mistral"), "grouped", "left")
    with pytest.raises(ValueError, match="branch_method=packed needs SDPA"):
        statistics(build("gemma2"), "packed", "left")
    with pytest.raises(ValueError, match="branch_method=packed trains on a GPU only"):
        statistics(build("llama"), "packed", "left")
    lm = build("llama").train()
    for layer in lm.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="no attention dropout"):
        statistics(lm, "packed", "left")
    with pytest.raises(ValueError, match="num_latent_chunk"):
        statistics(build("llama"), "repeat", "left", 0)


def test_many_latents_in_chunks_keep_no_more_than_one_chunk():
    lm = build("gpt2")
    prefix, prefix_mask, _, _ = prompts("left")
    suffix, mask = torch.randint(1, VOCABULARY, (3, 64, 20)), torch.ones(3, 20, dtype=torch.bool)

    def kept(latents, chunk):
        given = prefix, prefix_mask, suffix[:, :latents], mask
        return kept_for_backward(lambda: run_branches(lm, *given, "cache", chunk))

    few, _ = kept(4, None)
    all_at_once, expected = kept(64, None)
    chunked, found = kept(64, 4)
    assert all_at_once > 8 * few
    assert chunked < few
    torch.testing.assert_close(found.hidden, expected.hidden, atol=2e-5, rtol=1e-4)


def test_fused_activations_are_the_same_function():
    from transformers import AutoModelForCausalLM

    lm, ids = build("gpt2"), prompts("none")[0]
    plain = AutoModelForCausalLM.from_config(lm.config)
    plain.load_state_dict(lm.state_dict())
    assert "NewGELU" in str(plain)
    assert "NewGELU" not in str(lm)
    torch.testing.assert_close(lm(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
