"""Hidden states and attention averaged over thirds of y, against one unpadded record at a time."""

import dataclasses

import pytest
import torch
from tiny import CONFIGS, RECORDS, tiny_lm, tiny_tokenizer

from cvae_lightning.backbones.branch_choice import attends_only
from cvae_lightning.backbones.causal_lm import build_causal_lm
from cvae_lightning.backbones.solution_features import MAX_LAYERS, OFFSETS, PLACES, solution_features
from cvae_lightning.outputs import Record
from cvae_lightning.template import PromptTemplate


def thirds(count):
    """Which third of y each of its tokens lies in."""
    return [t * 3 // count for t in range(count)]


def mean_over(rows, which, third):
    """The mean of the rows of a third; zeros where it has none."""
    chosen = [row for row, part in zip(rows, which, strict=True) if part == third]
    return sum(chosen) / len(chosen) if chosen else torch.zeros_like(rows[0])


def read(lm, template, record):
    """Hidden states and attentions of one unpadded record, the length of its prefix and of its y-region."""
    (prefix, y), m = template.segments([record])[0], template.marker_ids
    lm.eval()
    with torch.no_grad():
        output = lm(
            torch.tensor([[*prefix, m["<y>"], *y]]),
            output_hidden_states=True,
            output_attentions=lm.config._attn_implementation == "eager",
        )
    return output, len(prefix), len(y)


def oracles(lm, template, record):
    """All views of one record with slow loops over tokens, layers, heads and keys."""
    output, prefix, tokens = read(lm, template, record)
    which = thirds(tokens)
    ids = template.segments([record])[0][1]
    log_probs = output.logits[0].log_softmax(-1)
    nll = [-float(log_probs[prefix + t, ids[t]]) for t in range(tokens)]

    def surprised(rows):
        return sum(row * cost for row, cost in zip(rows, nll, strict=True)) / sum(nll)

    states = [[state[0, prefix + 1 + t] for t in range(tokens)] for state in output.hidden_states]
    views = {
        "hidden": torch.stack([torch.cat([mean_over(rows, which, third) for third in range(3)]) for rows in states]),
        "hidden, surprises": torch.stack([surprised(rows) for rows in states]),
    }
    if output.attentions is None or not attends_only(lm):
        return views
    looks = []
    for head in (head for layer in output.attentions for head in layer[0]):
        rows = []
        for t in range(tokens):
            row, query = torch.zeros(PLACES + OFFSETS), prefix + 1 + t
            for key in range(query + 1):
                if key < prefix:
                    row[key * PLACES // max(prefix, PLACES)] += head[query, key]
                elif query - key < OFFSETS:
                    row[PLACES + query - key] += head[query, key]
            rows.append(row)
        looks.append(rows)
    by_third = [mean_over(rows, which, third) for third in range(3) for rows in looks]
    return views | {
        "attention": torch.cat(by_third)[None],
        "attention, surprises": torch.cat([surprised(rows) for rows in looks])[None],
    }


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batches_change_nothing(family, side):
    lm, _ = tiny_lm(family)
    template = PromptTemplate(tiny_tokenizer(), padding_side=side)
    records = [*RECORDS, Record("123456789" * 3, ""), Record("", "1")]  # an empty y still has </y>
    if attends_only(lm):
        lm.set_attn_implementation("eager")
    slow = [oracles(lm, template, r) for r in records]
    expected = {name: torch.stack([views[name] for views in slow]) for name in slow[0]}
    assert ("attention" in expected) == attends_only(lm)
    lm.set_attn_implementation("sdpa")
    for batch_size in (1, 3, 256):
        found = solution_features(lm, template, records, batch_size)
        assert found.keys() == expected.keys()
        for name, view in expected.items():
            assert view.std(0).max() > 1e-3
            torch.testing.assert_close(found[name], view, rtol=1e-4, atol=1e-4)
    assert lm.config._attn_implementation == "sdpa"


def test_of_many_layers_it_takes_eight_with_both_ends():
    template = PromptTemplate(tiny_tokenizer())
    torch.manual_seed(0)
    lm = build_causal_lm(CONFIGS["llama"] | {"num_hidden_layers": 14}, len(template), template.pad_id)
    found = solution_features(lm, template, RECORDS)["hidden"]
    assert found.shape == (len(RECORDS), MAX_LAYERS, 3 * 16)
    every = torch.stack([oracles(lm, template, r)["hidden"] for r in RECORDS])  # embeddings and 14 layers
    torch.testing.assert_close(found, every[:, ::2], rtol=1e-4, atol=1e-5)


def test_labels_never_matter():
    lm, template = tiny_lm()
    unlabelled = [Record(r.x, r.y) for r in RECORDS]
    wrong = [dataclasses.replace(r, strategy=1 - r.strategy, index=9) for r in RECORDS]
    expected = solution_features(lm, template, RECORDS)
    for other in (unlabelled, wrong):
        found = solution_features(lm, template, other)
        assert all(torch.equal(found[name], view) for name, view in expected.items())


def test_the_model_is_read_without_dropout_and_left_as_it_was():
    lm, template = tiny_lm("gpt2", dropout=0.5)
    lm.train()
    state = torch.get_rng_state()
    first, second = (solution_features(lm, template, RECORDS) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(view.requires_grad for view in first.values())
    assert all(part.training for part in lm.modules())
    views = solution_features(lm.bfloat16(), template, RECORDS)
    assert all(view.dtype == torch.float32 for view in views.values())


def test_long_records_of_a_large_model_are_read_in_smaller_numbers(monkeypatch):
    lm, template = tiny_lm()
    expected, sizes = solution_features(lm, template, RECORDS), []
    longest = max(len(prefix) + 1 + len(y) for prefix, y in template.segments(RECORDS))
    config = lm.config
    row = 4 * config.num_hidden_layers * longest * (config.hidden_size + config.num_attention_heads * longest)
    collate = template.collate
    monkeypatch.setattr(template, "collate", lambda records: sizes.append(len(records)) or collate(records))
    for budget, most in ((1, 1), (2 * row, 2), (2 * row + row - 1, 2), (100 * row, len(RECORDS))):
        monkeypatch.setattr("cvae_lightning.backbones.solution_features.BUDGET", budget)
        sizes.clear()
        found = solution_features(lm, template, RECORDS)
        assert max(sizes) == most
        for name, view in expected.items():
            torch.testing.assert_close(found[name], view, rtol=1e-4, atol=1e-5)
