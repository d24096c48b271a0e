"""The entangled model: what it costs, what it leaves behind, and what it can be built from."""

import json
import shutil
import warnings
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from tiny import CONFIGS, QUIET, RECORDS, TinyData, tiny_artifact, tiny_lm, tiny_tokenizer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from cvae_lightning.backbones.artifact import Baseline
from cvae_lightning.losses import FreeEnergyLoss, ReconstructionLoss
from cvae_lightning.modules import EntangledLM, SharedDiscreteCVAE, entangled
from cvae_lightning.outputs import Record
from cvae_lightning.template import PromptTemplate


def trainer(**options):
    return L.Trainer(**{**QUIET, "max_steps": 3, **options})


def cost(folder, records):
    """Return (nats, tokens) of the y-regions, one record at a time, straight from the Hugging Face model."""
    lm = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    nats, tokens = 0.0, 0
    for record in records:
        words = ["<bos>", "<x>", *record.x, "</x>", "<y>", *record.y, "</y>", "<eos>"]
        ids = torch.tensor([tokenizer.convert_tokens_to_ids(words)])
        with torch.no_grad():
            log_probs = lm(input_ids=ids).logits[0].log_softmax(-1)
        for position in range(words.index("<y>") + 1, len(words)):
            nats -= float(log_probs[position - 1, ids[0, position]])
            tokens += 1
    return nats, tokens


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("family", CONFIGS)
def test_c_base_is_the_mean_cost_of_the_validation_tokens(tmp_path, family, padding_side):
    model = EntangledLM(str(tmp_path / "out"), config=CONFIGS[family], padding_side=padding_side)
    trainer().fit(model, TinyData())
    baseline = Baseline.load(tmp_path / "out")
    nats, tokens = cost(tmp_path / "out", RECORDS)
    assert baseline.num_tokens == tokens
    assert baseline.c_base == pytest.approx(nats / tokens, rel=1e-5)
    assert baseline.data == "tiny-val"


def test_training_loss_is_the_mean_over_tokens(tmp_path):
    folder = tiny_artifact(tmp_path / "start")
    model = EntangledLM(str(tmp_path / "out"), model=folder, max_gap=0)
    model.log = lambda *args, **kwargs: None
    nats, tokens = cost(folder, RECORDS)
    loss = model.training_step(model.template.collate(RECORDS), 0)
    assert float(loss.detach()) == pytest.approx(nats / tokens, rel=1e-5)


def test_validate_only_measures(tmp_path):
    start = tiny_artifact(tmp_path / "start")
    (tmp_path / "start/baseline.json").unlink()
    model = EntangledLM(str(tmp_path / "out"), model=start)
    logged = trainer().validate(model, TinyData(), verbose=False)[0]
    nats, tokens = cost(start, RECORDS)
    assert Baseline.load(tmp_path / "out").c_base == pytest.approx(nats / tokens, rel=1e-5)
    assert logged["val/baseline_nll"] == pytest.approx(nats / tokens, rel=1e-5)
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / f).state_dict() for f in ("start", "out"))
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_validate_writes_no_model_that_was_never_trained(tmp_path):
    out = tmp_path / "out"
    model, run = EntangledLM(str(out), config=CONFIGS["llama"]), trainer()
    run.fit(model, TinyData())
    run.save_checkpoint(tmp_path / "model.ckpt")
    before = (out / "model.safetensors").read_bytes()
    random = EntangledLM(str(out), config=CONFIGS["llama"])
    with pytest.raises(ValueError, match=r"random weights to .*out.* Give .*--ckpt_path"):
        trainer().validate(random, TinyData(), verbose=False)
    assert (out / "model.safetensors").read_bytes() == before
    trainer().validate(random, TinyData(), ckpt_path=tmp_path / "model.ckpt", verbose=False)
    trainer().validate(model, TinyData(), verbose=False)
    again = EntangledLM(str(out), model=str(out))  # as the message about another fingerprint says
    trainer().validate(again, TinyData([*RECORDS, RECORDS[0]]), verbose=False)
    assert Baseline.load(out).num_tokens == cost(out, [*RECORDS, RECORDS[0]])[1]
    assert (out / "model.safetensors").read_bytes() == before


def test_a_trial_run_leaves_a_trained_model_alone(tmp_path):
    out = tmp_path / "out"
    trainer().fit(EntangledLM(str(out), config=CONFIGS["llama"]), TinyData())
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    trainer(fast_dev_run=True).fit(EntangledLM(str(out), config=CONFIGS["llama"], warmup_steps=0), TinyData())
    trainer(fast_dev_run=True).validate(EntangledLM(str(out), model=str(out)), TinyData(), verbose=False)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_test_and_sanity_check_leave_no_artifact(tmp_path):
    model = EntangledLM(str(tmp_path / "out"), model=tiny_artifact(tmp_path / "start"))
    assert trainer().test(model, TinyData(), verbose=False)[0]["test/baseline_nll"] > 0
    assert not (tmp_path / "out").exists()


def test_the_artifact_fits_the_cvae_without_a_warning(tmp_path):
    trainer().fit(EntangledLM(str(tmp_path / "out"), config=CONFIGS["llama"]), TinyData())
    model = SharedDiscreteCVAE(str(tmp_path / "out"), {"free_energy_loss": FreeEnergyLoss()}, num_latents=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fingerprint.*")
        trainer(max_steps=1).fit(model, TinyData())
    assert model.c_base == Baseline.load(tmp_path / "out").c_base


def test_a_failed_run_leaves_no_artifact(tmp_path):
    class Stop(L.Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        trainer(callbacks=[Stop()]).fit(EntangledLM(str(tmp_path / "out"), config=CONFIGS["llama"]), TinyData())
    assert not list((tmp_path / "out").iterdir())


def test_it_learns_by_heart_and_writes_what_it_learned(tmp_path):
    torch.manual_seed(0)
    config = CONFIGS["llama"] | {"hidden_size": 32, "intermediate_size": 64}
    model = EntangledLM(str(tmp_path / "out"), config=config, learning_rate=1e-2, warmup_steps=5, max_gap=0)
    trainer(max_steps=120, limit_val_batches=0).fit(model, TinyData(batch_size=5))
    assert model.generate([r.x for r in RECORDS]) == [r.y for r in RECORDS]
    assert Baseline.load(tmp_path / "out").c_base < 0.1


def test_checkpoint_loads_without_data_and_artifact(tmp_path):
    model = EntangledLM(str(tmp_path / "out"), config=CONFIGS["qwen2"])
    run = trainer()
    run.fit(model, TinyData())
    run.save_checkpoint(tmp_path / "model.ckpt")
    found = EntangledLM.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True).eval()
    batch = model.template.collate(RECORDS)
    with torch.no_grad():
        assert torch.equal(found.free_token_nll(found.lm, batch), model.eval().free_token_nll(model.lm, batch))
    xs = [r.x for r in RECORDS]
    assert found.generate(xs, max_new_tokens=5) == model.generate(xs, max_new_tokens=5)
    assert found.template.fingerprint() == model.template.fingerprint()


def test_a_checkpoint_loads_without_the_model_that_it_started_from(tmp_path):
    model, run = EntangledLM(str(tmp_path / "out"), tiny_artifact(tmp_path / "base", "gpt2")), trainer()
    run.fit(model, TinyData())
    run.save_checkpoint(tmp_path / "model.ckpt")
    shutil.rmtree(tmp_path / "base")
    again = EntangledLM.load_from_checkpoint(tmp_path / "model.ckpt")
    xs = [r.x for r in RECORDS]
    assert again.generate(xs, max_new_tokens=5) == model.generate(xs, max_new_tokens=5)
    with pytest.raises(ValueError, match="cannot load a causal language model from"):
        EntangledLM.load_from_checkpoint(tmp_path / "model.ckpt", model=str(tmp_path / "base"))


def test_the_model_is_measured_where_it_was_trained(tmp_path, monkeypatch):
    """Lightning takes the module to the CPU before `on_fit_end`, where NCCL, for one, reduces nothing."""
    model, run, seen = EntangledLM(str(tmp_path / "out"), config=CONFIGS["llama"]), trainer(), []
    measure = entangled.measure_baseline
    monkeypatch.setattr(EntangledLM, "to", lambda self, device: seen.append(str(device)))
    monkeypatch.setattr(entangled, "measure_baseline", lambda *args: seen.append("measured") or measure(*args))
    run.fit(model, TinyData())
    assert run.strategy.root_device.type == "cpu"
    seen.clear()
    monkeypatch.setattr(type(run.strategy), "root_device", torch.device("cuda", 1))
    model.on_fit_end()
    assert seen == ["cuda:1", "measured", "cpu"]


def test_predictions_are_what_it_writes(tmp_path):
    model = EntangledLM(str(tmp_path / "out"), model=tiny_artifact(tmp_path / "start"))
    records = [*RECORDS, Record("7", "")]
    (rows,) = trainer().predict(model, DataLoader(records, batch_size=9, collate_fn=model.template.collate))
    assert [row["y"] for row in rows] == model.generate([record.x for record in records])
    for row, record in zip(rows, records, strict=True):
        assert row == {"index": record.index, "x": record.x, "y": row["y"], "target": record.y or None}


def test_what_cannot_be_measured_is_said_before_training(tmp_path):
    """The artifact holds the cost on a data module's validation split, and which data these were."""
    given = TinyData()
    model = EntangledLM(str(tmp_path / "out"), tiny_artifact(tmp_path / "base"))
    run = trainer()
    given.trainer = SimpleNamespace(lightning_module=model)
    loader = given.train_dataloader()
    for data in ((loader, loader), (Unmarked(),)):
        with pytest.raises(ValueError, match=r"measured on a data module with val_dataloader\(\) and fingerprint"):
            run.fit(model, *data)
    assert run.global_step == 0
    with pytest.raises(ValueError, match="measured on a data module"):
        trainer().validate(model, loader, verbose=False)
    losses = {"reconstruction_loss": ReconstructionLoss()}
    (tmp_path / "base/baseline.json").unlink()
    with pytest.raises(
        ValueError, match=r"holds no baseline\.json with c_base.* set model\.c_base, or give a data module"
    ):
        trainer().fit(SharedDiscreteCVAE(str(tmp_path / "base"), losses), loader, loader)


class Unmarked(L.LightningDataModule):
    """A user's own data module, that says nothing of its content."""

    def train_dataloader(self):
        raise AssertionError("training has begun")

    val_dataloader = train_dataloader


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("letters", ["abcdefghij", "abcdef"])
def test_a_checkpoint_keeps_its_tokens_whatever_the_data_are_now(tmp_path, letters):
    def model():
        return EntangledLM(str(tmp_path / "out"), config=CONFIGS["llama"])

    class Lettered(TinyData):
        def alphabet(self):
            return set(f"{letters};=")

    run, first = trainer(), model()
    run.fit(first, TinyData())
    run.save_checkpoint(tmp_path / "model.ckpt")
    nats, tokens = cost(tmp_path / "out", RECORDS)
    again = model()
    trainer().validate(again, Lettered(), ckpt_path=tmp_path / "model.ckpt", verbose=False)
    assert again.template.fingerprint() == first.template.fingerprint()
    assert Baseline.load(tmp_path / "out").c_base == pytest.approx(nats / tokens, rel=1e-5)
    resumed = model()
    trainer(max_steps=4).fit(resumed, Lettered(), ckpt_path=tmp_path / "model.ckpt")
    assert resumed.template.fingerprint() == first.template.fingerprint()
    assert cost(tmp_path / "out", RECORDS)[0] == pytest.approx(
        Baseline.load(tmp_path / "out").c_base * tokens, rel=1e-5
    )


def test_a_foreign_model_gets_rows_for_the_markers_and_keeps_its_own(tmp_path):
    lm, _ = tiny_lm("qwen2")
    tokenizer = tiny_tokenizer()  # knows no marker
    known = len(tokenizer)
    lm.resize_token_embeddings(known)
    lm.save_pretrained(tmp_path / "foreign")
    tokenizer.save_pretrained(tmp_path / "foreign")
    model = EntangledLM(str(tmp_path / "out"), model=str(tmp_path / "foreign"))
    tables = (model.lm.get_input_embeddings().weight, model.lm.get_output_embeddings().weight)
    for table, own in zip(tables, (lm.get_input_embeddings().weight, lm.get_output_embeddings().weight), strict=True):
        assert table.shape[0] == known + 6
        assert torch.equal(table[:known], own)
        assert len({tuple(row.tolist()) for row in table[known:]}) == 6
    trainer(max_steps=1).fit(model, TinyData())
    nats, tokens = cost(tmp_path / "out", RECORDS)
    assert Baseline.load(tmp_path / "out").c_base == pytest.approx(nats / tokens, rel=1e-5)


@pytest.mark.parametrize("std", [0.0, 1.0])
def test_markers_within_a_padded_table_start_at_its_mean_plus_noise(tmp_path, std):
    lm, _ = tiny_lm("qwen2")
    tokenizer = tiny_tokenizer()  # knows no marker
    known = len(tokenizer)
    lm.resize_token_embeddings(known)
    lm.resize_token_embeddings(known + 9, mean_resizing=False)
    lm.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    model = EntangledLM(str(tmp_path / "out"), model=str(tmp_path / "padded"), new_token_std=std)
    for table in (model.lm.get_input_embeddings().weight, model.lm.get_output_embeddings().weight):
        own, new = table.detach()[:known], table.detach()[known : known + 6]
        assert len(table) == known + 9
        assert float((new - own.mean(0)).std()) == pytest.approx(std * float(own.std()), rel=0.3, abs=1e-5)


def test_generation_stops_where_the_positions_of_the_model_end(tmp_path):
    model = EntangledLM(str(tmp_path / "out"), model=tiny_artifact(tmp_path / "start", "gpt2"))
    (text,) = model.generate(["1" * 50], max_new_tokens=500)
    assert len(text) <= 64 - 54


def test_a_record_longer_than_the_positions_is_named(tmp_path):
    model = EntangledLM(str(tmp_path / "out"), model=tiny_artifact(tmp_path / "start", "gpt2"))
    data = TinyData([*RECORDS, Record("8" * 60, "1", 0, 5)], batch_size=6)
    with pytest.raises(
        ValueError, match=r"begins with '8+' takes 70 tokens, more than the model's 64 positions: set model\."
    ):
        trainer().fit(model, data)


def test_a_gap_that_overruns_the_positions_is_named(tmp_path):
    """A record of 54 tokens fits beside a latent section, and not beside a gap of 20 positions."""
    model = EntangledLM(str(tmp_path / "out"), model=tiny_artifact(tmp_path / "start", "gpt2"), max_gap=20)
    batch = model.template.collate([Record("1" * 23, "2" * 22, 0, 0)])
    model.eval()
    model.watch_length(batch)
    model.train()
    with pytest.raises(ValueError, match=r"takes 71 tokens, more than the model's 64 positions: .*max_length to 47 "):
        model.training_step(batch, 0)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_bad_construction_names_what_is_wrong(tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match=r"exactly one of `model` .* and `config`"):
        EntangledLM(out)
    with pytest.raises(ValueError, match=r"exactly one of `model` .* and `config`"):
        EntangledLM(out, model="a", config={})
    with pytest.raises(ValueError, match="needs 'model_type'"):
        trainer().fit(EntangledLM(out, config={"hidden_size": 16}), TinyData())
    with pytest.raises(ValueError, match=r"no model_type 'lama'; did you mean .*llama"):
        trainer().fit(EntangledLM(out, config={"model_type": "lama"}), TinyData())
    with pytest.raises(ValueError, match="not a multiple of the number of attention heads"):
        trainer().fit(EntangledLM(out, config=CONFIGS["llama"] | {"num_attention_heads": 3}), TinyData())
    scratch, batches = EntangledLM(out, config=CONFIGS["llama"]), [PromptTemplate(tiny_tokenizer()).collate(RECORDS)]
    with pytest.raises(ValueError, match="needs a data module of cvae_lightning"):
        trainer(limit_val_batches=0).fit(scratch, train_dataloaders=batches)
    assert not (tmp_path / "out").exists()


def test_output_folder_that_cannot_be_written_fails_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    model = EntangledLM(str(tmp_path / "file/out"), model=tiny_artifact(tmp_path / "start"))
    with pytest.raises(OSError, match="file"):
        trainer().fit(model, TinyData())
    assert json.loads((tmp_path / "start/baseline.json").read_text())["c_base"] == 1.5
