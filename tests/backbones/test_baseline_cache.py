"""The cache on disk: what was computed once is read back bit for bit, and nothing else is ever believed."""

import copy

import pytest
import torch
from tiny import tiny_lm

from cvae_lightning.backbones.baseline_cache import HEADER, ROW, BaselineCache, model_fingerprint

SIZES = [3, 1, 4, 2, 5, 3]
COSTS = [torch.rand(n, generator=torch.Generator().manual_seed(i)) + i for i, n in enumerate(SIZES)]


class Reference:
    """Counts what it is asked for."""

    def __init__(self):
        self.calls = 0

    def rows(self, cache, indices):
        """Costs of some records through the cache."""
        width = max(SIZES[i] for i in indices)
        mask = torch.arange(width) < torch.tensor([SIZES[i] for i in indices])[:, None]

        def compute():
            self.calls += 1
            padded = torch.full(mask.shape, 99.0)
            for b, i in enumerate(indices):
                padded[b, : SIZES[i]] = COSTS[i]
            return padded

        found = cache.rows(torch.tensor(indices), mask, compute)
        for b, i in enumerate(indices):
            assert torch.equal(found[b, : SIZES[i]], COSTS[i])
            assert not found[b, SIZES[i] :].any()


def open_cache(folder, fingerprint="a", rank=0):
    return BaselineCache(folder / "cache", fingerprint, len(SIZES), rank)


def test_rows_are_computed_once(tmp_path):
    cache, reference = open_cache(tmp_path), Reference()
    reference.rows(cache, [4, 0, 2])
    reference.rows(cache, [2, 4])
    reference.rows(open_cache(tmp_path), [0, 2, 4])
    reference.rows(copy.deepcopy(cache), [0])
    assert reference.calls == cache.computed == 1
    reference.rows(cache, [0, 1])  # one unknown row
    reference.rows(open_cache(tmp_path), [1])
    assert reference.calls == 2
    assert open_cache(tmp_path).missing(range(6)) == [3, 5]


def test_known_rows_keep_their_value(tmp_path):
    cache, mask = open_cache(tmp_path), torch.ones(2, 3, dtype=torch.bool)
    first = cache.rows(torch.tensor([0, 5]), mask, lambda: torch.full((2, 3), 1.0))
    second = cache.rows(torch.tensor([5, 3]), mask[:, :3], lambda: torch.full((2, 3), 2.0))
    assert first.unique().tolist() == [1.0]
    assert second[0].tolist() == [1.0] * 3
    assert second[1].tolist() == [2.0] * 3


def test_a_row_torn_at_any_byte_is_computed_again(tmp_path):
    Reference().rows(open_cache(tmp_path), [0, 2, 4])
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    last = len(whole) - ROW.size - 4 * SIZES[4]
    for end in range(HEADER.size, len(whole)):
        file.write_bytes(whole[:end])
        if end not in (HEADER.size, last, HEADER.size + ROW.size + 4 * SIZES[0]):
            with pytest.warns(UserWarning, match="breaks off"):
                cache = open_cache(tmp_path)
        else:
            cache = open_cache(tmp_path)
        assert 4 in cache.missing(range(6))
        assert (2 in cache.missing(range(6))) == (end < last)
        reference = Reference()
        reference.rows(cache, [4])
        assert reference.calls == 1
        for other in (tmp_path / "cache").glob("0-1*"):
            other.unlink()


def test_a_changed_byte_is_noticed(tmp_path):
    Reference().rows(open_cache(tmp_path), [1, 3])
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        if place < HEADER.size:
            cache = open_cache(tmp_path)
        else:
            with pytest.warns(UserWarning, match="breaks off"):
                cache = open_cache(tmp_path)
        assert 3 in cache.missing(range(6))


def test_another_fingerprint_is_another_cache(tmp_path):
    first, second = Reference(), Reference()
    first.rows(open_cache(tmp_path), [0, 1])
    assert open_cache(tmp_path, "b").missing(range(2)) == [0, 1]
    second.rows(open_cache(tmp_path, "b"), [0])
    assert second.calls == 1
    assert open_cache(tmp_path).missing(range(2)) == []


def test_a_row_of_another_length_is_computed_again(tmp_path):
    cache = open_cache(tmp_path)
    Reference().rows(cache, [0])
    with pytest.warns(UserWarning, match="3 tokens for record 0, the data 2"):
        found = cache.rows(torch.tensor([0]), torch.ones(1, 2, dtype=torch.bool), lambda: torch.ones(1, 2))
    assert found.tolist() == [[1.0, 1.0]]


def test_ranks_write_apart_and_see_each_other(tmp_path):
    ranks, reference = [open_cache(tmp_path, rank=r) for r in range(2)], Reference()
    reference.rows(ranks[0], [0, 2])
    reference.rows(ranks[1], [1, 3])
    assert [cache.missing(range(6)) for cache in ranks] == [[4, 5], [4, 5]]
    reference.rows(ranks[0], [4])
    reference.rows(ranks[1], [5])
    for cache in ranks:
        assert cache.missing(range(6)) == []
        reference.rows(cache, [5, 4, 3, 2, 1, 0])
    assert reference.calls == 4
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path):
    (tmp_path / "cache").write_text("a file")
    reference, cache = Reference(), open_cache(tmp_path)
    for _ in range(2):
        with pytest.warns(UserWarning, match="cannot be cached"):
            reference.rows(cache, [0, 1])
    assert reference.calls == 2


def test_model_fingerprint_sees_every_weight():
    lm, _ = tiny_lm("gpt2")
    same = model_fingerprint(tiny_lm("gpt2")[0])
    assert model_fingerprint(lm) == same
    with torch.no_grad():
        weight = lm.get_input_embeddings().weight
        weight[-1, -1] = torch.nextafter(weight[-1, -1], torch.tensor(9.0))
    assert model_fingerprint(lm) != same
    assert model_fingerprint(tiny_lm("gpt2")[0].bfloat16()) != same
