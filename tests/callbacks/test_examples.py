"""Which inputs a model writes for: different ones, of the records that it can read."""

import json

import pytest
from callback_fakes import FakeData, FakeModule, MirrorTask, make_trainer
from tiny import tiny_artifact, tiny_tokenizer

from cvae_lightning import SharedDiscreteCVAE
from cvae_lightning.callbacks import StrategyEvaluation
from cvae_lightning.callbacks.examples import different_inputs
from cvae_lightning.data import PairsDataModule, SyntheticDataModule
from cvae_lightning.data.synthetic import SyntheticRecords
from cvae_lightning.data.tasks import MultidigitAddition
from cvae_lightning.losses import FreeEnergyLoss
from cvae_lightning.template import PromptTemplate


def pairs(folder, rows, **options):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"x": x, "y": y}) + "\n" for x, y in rows))
    return PairsDataModule(str(path), val_path=str(path), batch_size=2, **options)


def test_examples_are_different_inputs():
    data = FakeData(MirrorTask(), inputs=("12", "12", "34", "12", "11", "56"))
    evaluation = StrategyEvaluation(num_examples=3)
    make_trainer(evaluation).validate(FakeModule(), data, verbose=False)
    assert [g.x for g in evaluation.controlled[::2]] == ["12", "34", "11"]
    assert [record.index for record in different_inputs(data, "val", 9)] == [0, 2, 4, 5]


def test_examples_of_a_task_are_its_first_records_and_no_others_are_made(monkeypatch):
    data = SyntheticDataModule(MultidigitAddition(), val_size=200_000)
    expected = [data.records("val")[i] for i in range(64)]
    data.template = PromptTemplate(tiny_tokenizer())
    assert len({record.x for record in expected}) == 64
    made, make = [], SyntheticRecords.__getitem__
    monkeypatch.setattr(SyntheticRecords, "__getitem__", lambda self, i: made.append(i) or make(self, i))
    assert different_inputs(data, "val", 64) == expected
    assert made == [*range(64)]


@pytest.mark.filterwarnings("ignore:.*are in train_path too", "ignore:.*fingerprint.*")
def test_records_that_are_left_out_are_no_examples(tmp_path):
    data = pairs(tmp_path, [("1" * 80, "1=1"), *((str(i), f"{i}={i}") for i in range(8))])
    artifact, losses = tiny_artifact(tmp_path / "artifact", "gpt2"), {"free_energy_loss": FreeEnergyLoss()}
    module = SharedDiscreteCVAE(artifact, losses, num_latents=2, max_length=64, on_overflow="skip")
    evaluation = StrategyEvaluation(num_examples=2, max_new_tokens=2)
    make_trainer(evaluation, num_sanity_val_steps=0).validate(module, data, verbose=False)
    assert [g.x for g in evaluation.controlled[::2]] == ["0", "1"]
    assert data.skipped["val"] == 1
    assert [record.x for record in data.kept_records("val")] == [str(i) for i in range(8)]


@pytest.mark.filterwarnings("ignore:.*are in train_path too")
def test_kept_records_need_a_template(tmp_path):
    with pytest.raises(ValueError, match="has no template"):
        pairs(tmp_path, [("1", "2"), ("3", "4")]).kept_records("train")
