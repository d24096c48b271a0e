"""The order of training batches: pure, complete, the same after a stop, disjoint over ranks."""

import json
import types

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from cvae_lightning.data import SyntheticDataModule
from cvae_lightning.data.loader import EpochSampler, ResumableLoader
from cvae_lightning.data.tasks import MultidigitAddition


def lengths(count):
    return [(7 * i * i) % 23 for i in range(count)]


def make(count=50, batch_size=4, seed=0, workers=0, bucketing=False):
    sampler = EpochSampler(range(count), batch_size, seed, lengths(count) if bucketing else None)
    return ResumableLoader(
        range(count), batch_size=batch_size, sampler=sampler, drop_last=True, num_workers=workers, collate_fn=list
    )


def epoch_of(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return list(loader)


@pytest.mark.parametrize("bucketing", [False, True])
def test_order_is_a_function_of_seed_and_epoch(bucketing):
    first = [epoch_of(make(bucketing=bucketing), epoch) for epoch in range(3)]
    loader = make(bucketing=bucketing)
    assert [epoch_of(loader, epoch) for epoch in (2, 0, 1)] == [first[2], first[0], first[1]]
    assert len({str(order) for order in first}) == 3
    assert epoch_of(make(bucketing=bucketing, seed=1), 0) != first[0]
    for order in first:
        assert [len(batch) for batch in order] == [4] * 12
        assert len({i for batch in order for i in batch}) == 48
    torch.manual_seed(99)
    assert epoch_of(make(bucketing=bucketing), 0) == first[0]


def test_all_records_come_up_over_the_epochs():
    loader = make(count=10, batch_size=4)
    assert {i for epoch in range(20) for batch in epoch_of(loader, epoch) for i in batch} == set(range(10))


@pytest.mark.parametrize("bucketing", [False, True])
@pytest.mark.parametrize(("count", "ranks"), [(50, 2), (51, 3), (8, 2)])
def test_ranks_are_disjoint_and_cover_the_batches_of_one_process(bucketing, count, ranks):
    sizes = lengths(count) if bucketing else None
    one = EpochSampler(range(count), 4 * ranks, seed=3, lengths=sizes, num_replicas=1, rank=0)
    parts = [EpochSampler(range(count), 4, seed=3, lengths=sizes, num_replicas=ranks, rank=r) for r in range(ranks)]
    for sampler in (one, *parts):
        sampler.set_epoch(5)
    whole, shares = list(one), [list(part) for part in parts]
    assert [len(share) for share in shares] == [len(part) for part in parts] == [len(whole) // ranks] * ranks
    for batch in range(len(whole) // (4 * ranks)):
        expected = whole[batch * 4 * ranks : (batch + 1) * 4 * ranks]
        got = [i for share in shares for i in share[batch * 4 : (batch + 1) * 4]]
        assert sorted(got) == sorted(expected)
        assert len(set(got)) == 4 * ranks


def test_bucketing_makes_batches_of_similar_length():
    size = lengths(400)

    def spread(bucketing):
        batches = epoch_of(make(400, bucketing=bucketing), 0)
        return sum(max(size[i] for i in batch) - min(size[i] for i in batch) for batch in batches) / len(batches)

    assert spread(True) < 0.2 * spread(False)


def test_too_few_records_for_the_ranks_are_an_error():
    with pytest.raises(ValueError, match="3 training records do not fill one batch of 2 on each of 2 processes"):
        EpochSampler(range(3), 2, num_replicas=2, rank=0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 5, 11])
def test_a_stopped_epoch_resumes_batch_for_batch(workers, stop):
    whole = epoch_of(make(), 3)
    loader = make(workers=workers)
    loader.sampler.set_epoch(3)
    batches = iter(loader)
    seen = [next(batches) for _ in range(stop)]  # workers have prefetched more by now
    state = loader.state_dict()
    del batches
    again = make(workers=workers)
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert seen + epoch_of(again, 3) == whole
    assert epoch_of(again, 4) == epoch_of(make(), 4)


def test_a_position_counts_for_its_epoch_only():
    loader = make()
    assert len(epoch_of(loader, 2)) == 12
    state = loader.state_dict()
    assert state["batches"] == 12
    again = make()
    again.load_state_dict(state)
    assert epoch_of(again, 3) == epoch_of(make(), 3)


@pytest.mark.parametrize("change", [{"count": 60}, {"batch_size": 2}, {"seed": 1}, {"bucketing": True}])
def test_a_position_in_another_order_is_dropped_with_a_warning(change):
    loader = make()
    batches = iter(loader)
    next(batches)
    next(batches)
    other = make(**change)
    other.load_state_dict(loader.state_dict())
    with pytest.warns(UserWarning, match="saved at batch 2 of an epoch"):
        assert epoch_of(other, 0) == epoch_of(make(**change), 0)


class Remember(L.LightningModule):
    """Its weight depends on the order of everything that it has seen."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, _):
        self.seen.append(batch)
        return (self.weight - sum(batch)) ** 2 * 0.001

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


def fit(tmp_path, workers, ckpt_path=None, **options):
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saver] if ckpt_path is None else [],
        enable_checkpointing=ckpt_path is None,
        **options,
    )
    module = Remember()
    trainer.fit(module, make(workers=workers), ckpt_path=ckpt_path, weights_only=True)
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("workers", "options"), [(0, {}), (2, {}), (0, {"limit_train_batches": 5})])
def test_training_resumed_from_any_file_ends_in_the_same_weight(tmp_path, workers, options):
    whole = fit(tmp_path, workers, **options)
    files = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    assert len(files) == len(whole.seen)
    for done, path in list(enumerate(files, 1))[:: 4 if workers else 1]:
        resumed = fit(tmp_path, workers, ckpt_path=path, **options)
        assert resumed.seen == whole.seen[done:], done
        assert resumed.weight.item() == whole.weight.item()


class Note(Remember):
    """Writes down which records each rank trained and validated on."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.validated = folder, []

    def validation_step(self, batch, _):
        self.validated += batch

    def on_train_end(self):
        path = self.folder / f"rank{self.global_rank}.json"
        path.write_text(json.dumps([self.seen, self.validated]))


@pytest.mark.filterwarnings("ignore")
def test_two_processes_share_an_epoch_and_validate_every_record_once(tmp_path):
    data = SyntheticDataModule(MultidigitAddition(), train_size=45, val_size=17, batch_size=5, seed=2)
    data.template = types.SimpleNamespace(max_length=None, collate=lambda records: [record.index for record in records])
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Note(tmp_path), data)
    (seen0, val0), (seen1, val1) = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert sorted(val0 + val1) == sorted([*range(17)] * 2)
    assert len(seen0) == len(seen1) == 8
    one = EpochSampler(range(45), 10, seed=2)
    for epoch in range(2):
        one.set_epoch(epoch)
        order = list(one)
        for batch in range(4):
            got = seen0[epoch * 4 + batch] + seen1[epoch * 4 + batch]
            assert sorted(got) == sorted(order[batch * 10 : (batch + 1) * 10])
