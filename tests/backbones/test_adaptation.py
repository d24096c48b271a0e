"""Low-rank adapters and token rows over families of models: what is trained, what stays, and what is merged."""

import sys

import pytest
import torch
from tiny import CONFIGS

from cvae_lightning.backbones.adaptation import add_low_rank, merged, scatter_rows, sharing_copy, train_rows
from cvae_lightning.backbones.causal_lm import build_causal_lm, decoder_of, head_of

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
MAMBA = {
    **{"model_type": "mamba2", "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 8},
    **{"state_size": 4, "n_groups": 1, "chunk_size": 4},
}
FAMILIES = {
    "gpt2": {**CONFIGS["gpt2"], "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": CONFIGS["llama"],
    "qwen2": CONFIGS["qwen2"],  # its head is not tied
    "qwen3": {"model_type": "qwen3", **SMALL, **GROUPED, "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", **SMALL, **GROUPED, "sliding_window": 5, "query_pre_attn_scalar": 8},
    "gemma3": {"model_type": "gemma3_text", **SMALL, **GROUPED, "sliding_window": 5, "query_pre_attn_scalar": 8},
    "mamba2": MAMBA,
    "phi": {"model_type": "phi", **SMALL},  # its head has a bias
}
ADAPTED = [(f, a) for f in FAMILIES for a in ("frozen", "lora") if (f, a) != ("mamba2", "lora")]
VOCABULARY, SIZE = 20, 23
ROWS = [18, 19, 20, 21, 22]  # two markers of the model's own table, three tokens behind it
IDS = torch.tensor([[3, 18, 5, 21, 22], [19, 20, 7, 8, 9]])


def build(family):
    torch.manual_seed(0)
    lm = build_causal_lm(FAMILIES[family], VOCABULARY, 0)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
        if lm.get_output_embeddings().bias is not None:
            lm.get_output_embeddings().bias.normal_()
    return lm


def adapt(lm, adaptation, rank=4):
    if adaptation == "lora":
        pytest.importorskip("peft")
        add_low_rank(lm, rank, 8.0)
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_("lora_" in name)
    train_rows(lm, ROWS, SIZE)


def logits(lm, ids):
    """By transformers' own head, and by the package's."""
    with torch.no_grad():
        own = lm(ids, use_cache=False).logits
        hidden = decoder_of(lm)(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(head_of(lm).logits(hidden), own.float(), atol=1e-4, rtol=1e-4)
    return own


def descend(lm):
    """Two large steps of every trained parameter."""
    trained = [p for p in lm.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):  # the second reaches A of the adapters, whose B starts at zero
        optimizer.zero_grad()
        out = lm(IDS, use_cache=False).logits
        (-out.log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None]).mean()).backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()


@pytest.mark.parametrize(("family", "adaptation"), ADAPTED)
def test_it_starts_as_the_model_trains_beside_it_and_merges(family, adaptation):
    lm = build(family)
    entangled = sharing_copy(lm)
    weights = {name: p.detach().clone() for name, p in lm.named_parameters()}
    known = IDS.clamp_max(VOCABULARY - 1)
    start = logits(entangled, known)
    adapt(lm, adaptation)
    torch.testing.assert_close(logits(lm, known)[..., :VOCABULARY], start)
    assert logits(lm, IDS).shape[-1] == SIZE
    descend(lm)
    assert (logits(lm, known)[..., :VOCABULARY] - start).abs().max() > 0.1
    assert torch.equal(logits(entangled, known), start)
    for name, parameter in entangled.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert any(parameter is own for own in lm.parameters()), name
    plain = merged(lm)
    torch.testing.assert_close(logits(plain, IDS), logits(lm, IDS), atol=1e-4, rtol=1e-4)
    assert {n for n, _ in plain.named_parameters()} == weights.keys()
    assert plain.config.vocab_size == SIZE
    tables = plain.get_input_embeddings().weight, plain.get_output_embeddings().weight
    assert (tables[0] is tables[1]) == bool(lm.config.tie_word_embeddings)
    assert torch.equal(logits(entangled, known), start)  # merging is done on a copy


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_rows_get_the_gradient_that_they_would_have_in_the_whole_table(family):
    rows, whole = build(family), build(family)
    adapt(rows, "frozen")
    scatter_rows(rows, [20, 21, 22], list(range(18)), 1.0)
    whole = merged(rows).requires_grad_(True)
    for lm in (rows, whole):
        lm(IDS, use_cache=False).logits.sin().sum().backward()
    for found, expected in (
        (rows.get_input_embeddings(), whole.get_input_embeddings()),
        (rows.get_output_embeddings(), whole.get_output_embeddings()),
    ):
        torch.testing.assert_close(found.rows.values.grad, expected.weight.grad[ROWS])
        assert found.table.weight.grad is None


def test_new_rows_differ_and_a_table_with_room_keeps_its_size():
    lm = build("llama")
    table = lm.get_input_embeddings().weight.detach().clone()
    adapt(lm, "frozen")
    scatter_rows(lm, [20, 21, 22], list(range(18)), 1.0)
    new = lm.get_input_embeddings().weight[20:]
    assert torch.pdist(new).min() > 3 * float(table.std())
    torch.testing.assert_close(new.mean(0), table[:18].mean(0), atol=3 * float(table.std()), rtol=0)

    lm = build("llama")  # tokens 15 and 16 are in the table, and nobody's
    train_rows(lm, [15, 16], 17)
    scatter_rows(lm, [15, 16], list(range(15)), 1.0)
    module = lm.get_input_embeddings()
    assert module.weight.shape == table.shape
    assert torch.equal(module.table.weight, table)
    changed = (module.weight != table).any(-1).nonzero().flatten().tolist()
    assert changed == [15, 16]


def test_only_the_maps_named_are_adapted_and_never_the_head():
    pytest.importorskip("peft")
    lm = build("qwen2")
    add_low_rank(lm, 2, 4.0, 0.5, ["q_proj"])
    names = {n.split(".")[-4] for n, p in lm.named_parameters() if p.requires_grad}
    assert names == {"q_proj"}
    assert {part.p for part in lm.modules() if isinstance(part, torch.nn.Dropout)} == {0.5}
    lm = build("qwen2")
    add_low_rank(lm, 2, 4.0)
    names = {n.split(".")[-4] for n, p in lm.named_parameters() if p.requires_grad}
    assert names == {f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")}


def test_what_cannot_be_adapted_is_one_clear_error(monkeypatch):
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"Mamba2ForCausalLM cannot have low-rank adapters there: .*out_proj"):
        add_low_rank(build("mamba2"), 2, 4.0)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot have low-rank adapters there: .*nonsense"):
        add_low_rank(build("llama"), 2, 4.0, 0.0, ["nonsense"])
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"needs the package peft .* pip install 'cvae-lightning\[lora\]'"):
        add_low_rank(build("llama"), 2, 4.0)
