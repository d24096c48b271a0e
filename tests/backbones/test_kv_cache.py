"""The cache with room in reserve against transformers' own, operation by operation."""

import weakref

import pytest
import torch
from tiny import CONFIGS, tiny_lm
from transformers import MistralConfig, MistralForCausalLM
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from cvae_lightning.backbones.kv_cache import PreallocatedLayer, generation_cache


def states(rows, tokens, draw):
    return [torch.randn(rows, 2, tokens, 4, generator=draw) for _ in range(2)]


@pytest.mark.parametrize("seed", range(20))
def test_holds_what_the_growing_layer_holds(seed):
    draw = torch.Generator().manual_seed(seed)
    ours, theirs, rows = PreallocatedLayer(reserve=3), DynamicLayer(), 2

    def pick(low, high):
        return int(torch.randint(low, high, (), generator=draw))

    def update(tokens):
        new = states(rows, tokens, draw)
        for found, expected in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(found, expected)

    update(pick(1, 6))
    for _ in range(30):
        operation = pick(0, 6)
        if operation == 0 and rows < 8:
            rows *= 2
            ours.batch_repeat_interleave(2), theirs.batch_repeat_interleave(2)
        elif operation == 1 and rows > 1:
            index = torch.randperm(rows, generator=draw)[: pick(1, rows)]
            rows = len(index)
            ours.batch_select_indices(index), theirs.batch_select_indices(index)
        elif operation == 2 and theirs.get_seq_length() > 2:
            ours.crop(-2), theirs.crop(-2)
        elif operation == 3:
            order = torch.randperm(rows, generator=draw)
            ours.reorder_cache(order), theirs.reorder_cache(order)
        elif operation == 4:
            ours.reset(), theirs.reset()
            update(1)
        else:
            update(pick(1, 4))
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


def test_tokens_are_written_where_they_stay():
    draw = torch.Generator().manual_seed(0)
    layer = PreallocatedLayer(reserve=100)
    prompt = states(3, 5, draw)
    assert layer.update(*prompt)[0] is prompt[0]  # a prompt that nothing follows is not copied at all
    places = {layer.update(*states(3, 1, draw))[0].data_ptr() for _ in range(64)}
    assert len(places) == 1
    assert layer.keys.untyped_storage().nbytes() <= 3 * 2 * 4 * 4 * (5 + 1 + 64 + 2)  # room for 64 and a quarter of 6


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.batch_select_indices(torch.tensor([0, 2])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.reorder_cache(torch.tensor([2, 0, 1])),
    ],
)
def test_the_room_of_other_rows_is_let_go(change):
    draw = torch.Generator().manual_seed(0)
    layer = PreallocatedLayer(reserve=100)
    for tokens in (5, 1):
        layer.update(*states(3, tokens, draw))
    rooms = [weakref.ref(held.untyped_storage()) for held in (layer.keys, layer.values)]
    assert all(room().nbytes() > 3 * 2 * 6 * 4 * 4 for room in rooms)
    change(layer)
    assert [room() for room in rooms] == [None, None]


@pytest.mark.parametrize("part", ["decoder", "layer"])
def test_a_compiled_model_keeps_the_layers_of_transformers(part):
    lm, _ = tiny_lm("llama")
    assert {type(layer) for layer in generation_cache(lm, reserve=9).layers} == {PreallocatedLayer}
    decoder = lm.get_decoder()
    {"decoder": decoder, "layer": decoder.layers[0]}[part].compile(backend="eager")
    assert {type(layer) for layer in generation_cache(lm, reserve=9).layers} == {DynamicLayer}


@pytest.mark.parametrize(("window", "kind"), [(None, PreallocatedLayer), (4, DynamicSlidingWindowLayer)])
def test_layers_of_full_attention_are_exchanged_and_no_others(window, kind):
    config = {key: value for key, value in CONFIGS["llama"].items() if key != "model_type"}
    lm = MistralForCausalLM(MistralConfig(**config, vocab_size=20, sliding_window=window))
    cache = generation_cache(lm, reserve=9)
    assert {type(layer) for layer in cache.layers} == {kind}
