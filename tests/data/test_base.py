"""What every data module does with the template: batches, and records that are too long."""

import pytest
import torch

from cvae_lightning.backbones.tokenizer import build_tokenizer
from cvae_lightning.data import PairsDataModule, SyntheticDataModule
from cvae_lightning.data.tasks import LinearEquations
from cvae_lightning.outputs import PairBatch
from cvae_lightning.template import PromptTemplate


def template(max_length=None, on_overflow="error"):
    tokenizer = build_tokenizer(sorted(LinearEquations().alphabet), "char")
    return PromptTemplate(tokenizer, num_latents=2, max_length=max_length, on_overflow=on_overflow)


def test_batches_are_built_by_the_template():
    data = SyntheticDataModule(LinearEquations(), train_size=40, val_size=20, batch_size=8)
    data.template = template()
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, PairBatch)
    assert len(batch) == 8
    records = data.records("train")
    for row, index in enumerate(batch.index.tolist()):
        assert (batch.x[row], batch.y[row]) == (records[index].x, records[index].y)
        assert batch.strategy[row] == records[index].strategy
        assert batch.y_mask[row].sum() == len(records[index].y) + 2


def test_without_a_template_the_error_says_where_it_comes_from():
    with pytest.raises(ValueError, match=r"assign datamodule\.template"):
        SyntheticDataModule(LinearEquations()).val_dataloader()


def test_the_trainers_module_gives_the_template():
    data = SyntheticDataModule(LinearEquations(), val_size=20)

    class Trainer:
        class lightning_module:
            template = template()

    data.trainer = Trainer
    assert data.template is Trainer.lightning_module.template
    data.template = own = template()
    assert data.template is own


def test_records_that_are_too_long_are_left_out_and_counted():
    data = SyntheticDataModule(LinearEquations(), train_size=100, val_size=60, batch_size=4)
    # bos, x, <x>, </x> and 4 for the latent section, then y, </y>, eos
    size = [len(r.x) + len(r.y) + 9 for r in data.records("val")]
    limit = sorted(size)[30]
    data.template = template(limit, "skip")
    served = [int(i) for batch in data.val_dataloader() for i in batch.index]
    assert served == [i for i, length in enumerate(size) if length <= limit]
    assert data.skipped["val"] == 60 - len(served) > 0
    trained = {int(i) for batch in data.train_dataloader() for i in batch.index}
    assert all(len(r.x) + len(r.y) + 9 <= limit for r in (data.records("train")[i] for i in trained))
    data.template = template(200, "skip")
    assert sum(map(len, data.val_dataloader())) == 60


def test_records_that_are_too_long_are_an_error_by_default(tmp_path):
    data = SyntheticDataModule(LinearEquations(), val_size=60)
    data.template = template(14)
    with pytest.raises(ValueError, match=r"record 0 of split 'val' is longer than max_length=14 tokens: raise"):
        data.val_dataloader()
    data.template = template(14, "skip")
    with pytest.raises(ValueError, match="every record of split 'val' is longer"):
        data.val_dataloader()
    path = tmp_path / "pairs.csv"
    path.write_text("x,y\n1,2\n1,2:3:4:5:6:7:8:9\n")
    pairs = PairsDataModule(str(path), str(path))
    pairs.template = template(14)
    with pytest.warns(UserWarning, match="are in train_path too"), pytest.raises(ValueError, match=r"pairs\.csv:3 is"):
        pairs.train_dataloader()


def test_iterating_leaves_the_global_generator_alone():
    data = SyntheticDataModule(LinearEquations(), train_size=40, val_size=20, batch_size=8)
    data.template = template()
    state = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        list(loader)
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_over_ranks_is_unrepeated(monkeypatch):
    data = SyntheticDataModule(LinearEquations(), train_size=40, val_size=21, batch_size=8)
    data.template = template()
    import torch.distributed as dist

    served = []
    for rank in range(2):
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
        monkeypatch.setattr(dist, "get_rank", lambda group=None, rank=rank: rank)
        served.append([int(i) for batch in data.val_dataloader() for i in batch.index])
        assert len(data.train_dataloader()) == 2
    assert sorted(served[0] + served[1]) == list(range(21))
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 50)
    with pytest.raises(ValueError, match="fewer than the 50 processes"):
        data.val_dataloader()
    with pytest.raises(ValueError, match="do not fill one batch of 1 on each of 50"):
        data.train_dataloader()
