"""Generation from a shared prefix, against the full model without a cache, one row at a time."""

import pytest
import torch
from tiny import CONFIGS, tiny_artifact

from cvae_lightning.backbones.causal_lm import build_causal_lm, decoder_of
from cvae_lightning.backbones.generation import generate_ids, generate_within
from cvae_lightning.losses import ReconstructionLoss
from cvae_lightning.modules import SharedDiscreteCVAE

RECURRENT = {
    "model_type": "lfm2",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "layer_types": ["conv", "full_attention"],
}
STATE_SPACE = {  # families that take no `past_key_values`
    "mamba2": {
        **{"model_type": "mamba2", "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 8},
        **{"state_size": 4, "n_groups": 1, "chunk_size": 4},
    },
    "mamba": {"model_type": "mamba", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2},
}
END, LIMIT = 7, 9


def build(config):
    torch.manual_seed(0)
    lm = build_causal_lm({**config, "tie_word_embeddings": False}, 20, 0).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
        lm.get_output_embeddings().weight[END] *= 1.5  # a token that comes up, sooner or later
    return lm


def alone(lm, prompt, banned, limit=LIMIT):
    """Greedy ids of one unpadded prompt: the full model over the whole sequence at every step."""
    ids = list(prompt)
    for _ in range(limit):
        logits = lm(torch.tensor([ids]), use_cache=False).logits[0, -1]
        logits[banned] = float("-inf")
        ids.append(int(logits.argmax()))
        if ids[-1] == END:
            break
    return ids[len(prompt) :]


def until_end(row):
    row = row.tolist()
    return row[: row.index(END) + 1] if END in row else row


FAMILIES = {**CONFIGS, "lfm2": RECURRENT, **STATE_SPACE}


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_branches_continue_every_prompt_as_if_alone(config):
    lm, banned = build(config), torch.tensor([0, 1])
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 20, (6, 5), generator=generator)
    mask = torch.arange(5) >= 5 - torch.tensor([5, 2, 3, 4, 1, 5])[:, None]
    branches = torch.tensor([[8, 9], [10, 11], [12, 9]])
    found = generate_ids(lm, ids, mask, END, LIMIT, banned=banned, branches=branches)
    prompts = [p[m].tolist() for p, m in zip(ids, mask, strict=True)]
    expected = [alone(lm, prompt + branch, banned) for prompt in prompts for branch in branches.tolist()]
    assert [until_end(row) for row in found] == expected
    lengths = {len(row) for row in expected}
    assert len(lengths) > 1 or config is RECURRENT  # rows end at different steps, so some have left the batch
    plain = generate_ids(lm, ids, mask, END, LIMIT, banned=banned)
    assert [until_end(row) for row in plain] == [alone(lm, prompt, banned) for prompt in prompts]


SHORT = {  # 16 positions
    "llama": {**CONFIGS["llama"], "max_position_embeddings": 16},
    "gpt2": {**CONFIGS["gpt2"], "n_positions": 16},
    "gpt_neo": {  # masks by a table of 16 x 16 places
        **{"model_type": "gpt_neo", "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32},
        **{"max_position_embeddings": 16, "attention_types": [[["global", "local"], 1]], "window_size": 64},
    },
}


@pytest.mark.parametrize("options", [{}, {"shrink": False}, {"renormalize_logits": True}], ids=["", "all stay", "hf"])
@pytest.mark.parametrize("config", SHORT.values(), ids=SHORT)
def test_a_long_prompt_does_not_cut_short_what_stands_beside_it(config, options):
    """In 16 positions; every prompt is continued as far as it would be alone, in order, by ids and by vectors."""
    lm = build(config)
    with torch.no_grad():
        lm.get_output_embeddings().weight[END] = 0.0  # rarely
    ids = torch.randint(8, 20, (6, 15), generator=torch.Generator().manual_seed(5))
    lengths = [3, 15, 4, 9, 1, 9]
    mask = torch.arange(15) >= 15 - torch.tensor(lengths)[:, None]
    prompts = [p[m].tolist() for p, m in zip(ids, mask, strict=True)]
    room = [min(11, 16 - length) for length in lengths]
    expected = [alone(lm, prompt, [], most) for prompt, most in zip(prompts, room, strict=True)]
    assert [len(row) for row in expected if END not in row] == [11, 1, 11, 7, 11, 7]
    for embed in (None, lambda prompts, rows: lm.get_input_embeddings()(prompts)):
        found = generate_within(lm, ids, mask, END, 11, 16, embed, **options).tolist()
        assert [row[:most] for row, most in zip(found, room, strict=True)] == expected
        assert all(set(row[most:]) <= {END} for row, most in zip(found, room, strict=True))
    behind = [[*prompt, branch] for prompt in prompts[2:] for branch in (8, 9)]
    found = generate_within(lm, ids[2:], mask[2:], END, 11, 16, branches=torch.tensor([[8], [9]]), **options).tolist()
    for row, prompt in zip(found, behind, strict=True):
        most = min(11, 16 - len(prompt))
        assert row[:most] == alone(lm, prompt, [], most)


@pytest.mark.parametrize("config", STATE_SPACE.values(), ids=STATE_SPACE)
def test_vectors_are_continued_without_a_cache_too(config):
    lm = build(config)
    ids = torch.randint(2, 20, (4, 5), generator=torch.Generator().manual_seed(4))
    mask = torch.arange(5) >= 5 - torch.tensor([5, 2, 3, 4])[:, None]
    found = generate_ids(lm, lm.get_input_embeddings()(ids), mask, END, LIMIT)
    prompts = [p[m].tolist() for p, m in zip(ids, mask, strict=True)]
    assert [until_end(row) for row in found] == [alone(lm, prompt, []) for prompt in prompts]


def test_the_prefix_is_read_once_and_ended_rows_cost_nothing():
    lm, tokens = build(CONFIGS["llama"]), []
    decoder_of(lm).register_forward_pre_hook(lambda m, a, k: tokens.append(k["input_ids"].shape), with_kwargs=True)
    ids = torch.randint(2, 20, (8, 30), generator=torch.Generator().manual_seed(0))
    out = generate_ids(lm, ids, torch.ones_like(ids, dtype=torch.bool), END, LIMIT, branches=torch.tensor([[8], [9]]))
    assert tokens[:2] == [(8, 30), (16, 1)]
    for step, (rows, width) in enumerate(tokens[2:], 1):
        running = int((out[:, :step] != END).all(-1).sum())
        assert width == 1
        assert rows * 0.75 < running or rows == running


def test_sampling_is_reproducible_and_follows_the_model():
    lm = build(CONFIGS["gpt2"])
    ids = torch.full((600, 3), 5)
    mask = torch.ones_like(ids, dtype=torch.bool)
    options = {"do_sample": True, "temperature": 2.0, "branches": torch.tensor([[8]])}
    sources = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    draw = [generate_ids(lm, ids, mask, END, 3, generator=source, **options) for source in sources]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    probs = (lm(torch.tensor([[5, 5, 5, 8]])).logits[0, -1].detach() / 2).softmax(-1)
    share = torch.bincount(draw[0][:, 0], minlength=20) / 600
    assert float((share - probs).abs().max()) < 0.08


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_generate_all_equals_forced_generation(tmp_path, family):
    artifact = tiny_artifact(tmp_path, family)
    torch.manual_seed(1)
    model = SharedDiscreteCVAE(artifact, {"reconstruction_loss": ReconstructionLoss()}, num_latents=3).train()
    xs = ["12", "7", "3456", "9", "80"]
    rows = model.generate_all(xs, max_new_tokens=8, batch_size=6)
    assert rows == [[model.generate([x], k, max_new_tokens=8)[0] for k in range(3)] for x in xs]
    assert model.training
    assert model.generate_all([]) == []
