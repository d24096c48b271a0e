"""What is read from, and set in, the language models of many families."""

import pytest
import torch

from cvae_lightning.backbones.causal_lm import (
    add_token_rows,
    build_causal_lm,
    decoder_of,
    has_dropout,
    head_of,
    load_causal_lm,
    set_dropout,
)

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
DROPPING = {
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
    "opt": {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    "bloom": {"hidden_size": 16, "n_layer": 1, "n_head": 2, "hidden_dropout": 0.1, "attention_dropout": 0.1},
    "starcoder2": {**SMALL, "intermediate_size": 32, "num_key_value_heads": 1, "residual_dropout": 0.1},
    "gpt_bigcode": {"n_embd": 16, "n_layer": 1, "n_head": 2},
}
CAPPED = {
    "gemma2": {**SMALL, "num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 0.5},
    "recurrent_gemma": {
        **SMALL,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "lru_width": 16,
        "logits_soft_cap": 0.5,
    },
    "xlstm": {
        "hidden_size": 32,
        "embedding_dim": 32,
        "num_hidden_layers": 1,
        "num_heads": 2,
        "output_logit_soft_cap": 0.5,
    },
}
VOCABULARY = 40


def build(family, **config):
    torch.manual_seed(0)
    lm = build_causal_lm({"model_type": family, **config}, VOCABULARY, 0)
    with torch.no_grad():  # larger weights: an error shows
        for parameter in lm.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    return lm


@torch.no_grad()
def hidden_of(lm):
    ids = torch.randint(1, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    return decoder_of(lm)(input_ids=ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("family", DROPPING)
def test_dropout_of_every_family_is_set_and_seen(family):
    lm = build(family, **DROPPING[family]).train()
    assert has_dropout(lm)
    assert not torch.equal(hidden_of(lm), hidden_of(lm))
    set_dropout(lm, 0.0)
    assert not has_dropout(lm)
    assert torch.equal(hidden_of(lm), hidden_of(lm))
    set_dropout(lm, 0.5)
    assert has_dropout(lm)
    assert not torch.equal(hidden_of(lm), hidden_of(lm))


def test_a_rate_given_as_an_integer_is_set_and_a_switch_is_not():
    lm = build("opt", **DROPPING["opt"], dropout=0, attention_dropout=0)
    lm.use_dropout = True
    assert not has_dropout(lm)
    set_dropout(lm, 0.2)
    assert {layer.dropout for layer in lm.model.decoder.layers} == {0.2}
    assert lm.use_dropout is True


@pytest.mark.parametrize("family", CAPPED)
def test_the_head_bounds_its_logits_as_the_family_does(family):
    lm = build(family, **CAPPED[family]).eval()
    ids = torch.randint(1, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = lm(input_ids=ids, use_cache=False).logits
    head = head_of(lm)
    assert head.softcap == 0.5
    assert (hidden_of(lm) @ head.weight.T).abs().max() > 1.0  # it matters
    torch.testing.assert_close(head.logits(hidden_of(lm)), expected)


def test_a_head_that_is_not_known_is_refused_at_once(tmp_path):
    """HyperCLOVA X multiplies by what Granite, under the same name, divides by."""
    config = {**SMALL, "intermediate_size": 32, "num_key_value_heads": 1, "logits_scaling": 4.0}
    for family, known in (("granite", True), ("hyperclovax", False)):
        build(family, **config).save_pretrained(tmp_path / family)
        if known:
            load_causal_lm(str(tmp_path / family))
        else:
            with pytest.raises(ValueError, match="of the family 'hyperclovax', whose head"):
                load_causal_lm(str(tmp_path / family))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tokens", [30, 43])
def test_new_tokens_get_rows_where_a_padded_table_has_them_already(tied, tokens):
    """20 tokens are known, 20 rows are padding; the tokens from 24 on are new."""
    lm = build("llama", **SMALL, intermediate_size=32, tie_word_embeddings=tied)
    with torch.no_grad():
        for table in (lm.get_input_embeddings(), lm.get_output_embeddings()):
            table.weight[20:] = 0.0
    before = lm.get_input_embeddings().weight.detach().clone()
    added = list(range(24, tokens))
    assert add_token_rows(lm, tokens, 1.0, torch.Generator().manual_seed(0), added) == added
    for table in (lm.get_input_embeddings(), lm.get_output_embeddings()):
        new = table.weight[24:tokens].detach()
        assert torch.pdist(new).min() > 2 * float(before[:20].std())
        assert float((new.std() / before[:24].std()).log().abs()) < 0.3
    now = lm.get_input_embeddings().weight
    assert torch.equal(now[:24], before[:24])
    assert torch.equal(now[tokens:], before[tokens:])
    assert add_token_rows(lm, tokens, 1.0) == []
