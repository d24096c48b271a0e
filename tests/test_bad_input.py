"""What a user can get wrong ends with an exit code, one clear message, no traceback, and nothing half-written."""

import json
import re

import pytest
from user_folder import ROWS, enter_user_folder, failure, files, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*fingerprint.*", "ignore:.*are in train_path too.*")


@pytest.fixture
def here(tmp_path, monkeypatch):
    return enter_user_folder(tmp_path, monkeypatch)


def set_row(here, number, **changes):
    rows = [dict(row) for row in ROWS]
    rows[number] |= changes
    write_rows(here / "train.jsonl", [{k: v for k, v in row.items() if v is not None} for row in rows])


def break_json(here):
    lines = (here / "train.jsonl").read_text().splitlines()
    lines[4] = '{"x": "1", "y": '
    (here / "train.jsonl").write_text("\n".join(lines))


def change_baseline(here, **changes):
    path = here / "artifact/baseline.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def nothing(here):
    pass


ARGS = "model.init_args"
CASES = {
    "missing file": (nothing, ["--data.train_path", "no.jsonl"], r"^train_path: cannot read 'no\.jsonl': No such file"),
    "broken JSON": (break_json, [], r"^train\.jsonl:5: broken JSON: "),
    "missing column": (nothing, ["--data.y_column", "z"], r"^train\.jsonl:1: no column 'z'; the columns are 'x', 'y'"),
    "column missing in one row": (lambda h: set_row(h, 6, y=None), [], r"^train\.jsonl:7: no column 'y'"),
    "empty x": (lambda h: set_row(h, 2, x=" "), [], r"^train\.jsonl:3: column 'x' is empty"),
    "empty y": (lambda h: set_row(h, 2, y=""), [], r"^train\.jsonl:3: column 'y' is empty"),
    "y is a number": (lambda h: set_row(h, 2, y=7), [], r"^train\.jsonl:3: column 'y' must be a text, got int 7"),
    "empty file": (lambda h: (h / "val.jsonl").write_text("\n"), [], r"^val_path: 'val\.jsonl' holds no records"),
    "record too long": (
        nothing,
        [f"--{ARGS}.max_length", "12"],
        r"^train\.jsonl:1: |^train\.jsonl:\d+ is longer than max_length=12 tokens: raise max_length, or set",
    ),
    "one latent": (nothing, [f"--{ARGS}.num_latents", "1"], r"^num_latents must be at least 2 .* got 1$"),
    "latents are no number": (nothing, [f"--{ARGS}.num_latents", "two"], r"num_latents.*two"),
    "typo in a key": (
        nothing,
        [f"--{ARGS}.num_latent", "2"],
        r"'num_latent' is not accepted.*did you mean 'num_latents'",
    ),
    "typo in a data key": (
        nothing,
        ["--data.init_args.x_colum", "x"],
        r"'x_colum' is not accepted.*did you mean 'x_column'",
    ),
    "typo in a loss key": (
        nothing,
        [f"--{ARGS}.losses.kl_prior_loss.init_args.free_nat", "1"],
        r"'free_nat' is not accepted.*did you mean 'free_nats'",
    ),
    "typo in a loss name": (
        nothing,
        [f"--{ARGS}.losses.kl_prior.init_args.weight", "1"],
        r"kl_prior.* a new entry needs its own class_path",
    ),
    "typo in a loss class": (
        nothing,
        [f"--{ARGS}.losses.mine", "cvae_lightning.losses.PriorKLLos"],
        r"PriorKLLos'.*did you mean 'PriorKLLoss'",
    ),
    "typo in the model class": (
        nothing,
        ["--model", "cvae_lightning.SharedDiscreteCVEA"],
        r"SharedDiscreteCVEA'.*did you mean 'SharedDiscreteCVAE'",
    ),
    "a loss that is no loss": (nothing, [f"--{ARGS}.losses.mine", "torch.nn.Linear"], r"losses\.mine|LossCallback"),
    "a loss named like a method": (
        nothing,
        [f"--{ARGS}.losses.update", "cvae_lightning.losses.PriorKLLoss"],
        r"'update' cannot name a loss",
    ),
    "no losses": (
        nothing,
        [f"--{ARGS}.losses.free_energy_loss", "null", f"--{ARGS}.losses.kl_prior_loss", "null"],
        r"^`losses` is empty: name at least one loss",
    ),
    "all weights 0": (
        nothing,
        [f"--{ARGS}.losses.free_energy_loss.init_args.weight", "0", f"--{ARGS}.losses.kl_prior_loss", "null"],
        r"every loss has weight 0",
    ),
    "artifact without c_base": (
        lambda h: change_baseline(h, c_base=None),
        [],
        r"^artifact/baseline\.json: it has no key 'c_base'; run `cvae-lightning validate`",
    ),
    "c_base of the artifact is 0": (
        lambda h: change_baseline(h, c_base=0.0),
        [],
        r"^artifact/baseline\.json: c_base must be a positive number of nats per token, got 0\.0",
    ),
    "baseline.json is broken": (
        lambda h: (h / "artifact/baseline.json").write_text("{"),
        [],
        r"^artifact/baseline\.json: ",
    ),
    "c_base is negative": (nothing, [f"--{ARGS}.c_base", "-0.5"], r"c_base must be a positive number .* got -0\.5"),
    "c_base is a word": (nothing, [f"--{ARGS}.c_base", "none"], r"c_base.*none"),
    "no such model": (nothing, [f"--{ARGS}.entangled", "runs/none/here"], r"cannot load .* from 'runs/none/here'"),
    "a model folder without a model": (
        lambda h: (h / "artifact/model.safetensors").unlink(),
        [],
        r"cannot load a causal language model from 'artifact'",
    ),
    "a truncated model": (
        lambda h: (h / "artifact/model.safetensors").write_bytes(b"12345678{"),
        [],
        r"cannot load a causal language model from 'artifact'",
    ),
    "no baseline for a loss that needs one": (
        nothing,
        ["--config", "alone.yaml", f"--{ARGS}.losses.mine", "cvae_lightning.losses.TokenWeightedReconstructionLoss"],
        r"a loss needs the entangled model's NLL",
    ),
    "no c_base for a loss that needs one": (nothing, ["--config", "alone.yaml"], r"outputs\.c_base"),
    "output below a file": (
        nothing,
        ["--trainer.default_root_dir", "file/out"],
        r"cannot write to the output folder file/out",
    ),
    "output in /proc": (
        nothing,
        ["--trainer.default_root_dir", "/proc/out"],
        r"cannot write to the output folder /proc/out",
    ),
    "checkpoints below a file": (
        nothing,
        ["--checkpoint.dirpath", "file/checkpoints"],
        r"cannot write to the output folder file/checkpoints",
    ),
    "unknown schedule target": (
        nothing,
        ["--config", "{trainer: {callbacks: [{class_path: WeightSchedule, init_args: {loss: kl}}]}}"],
        r"WeightSchedule: no loss named 'kl'; the module has free_energy_loss, kl_prior_loss",
    ),
    "no such checkpoint": (nothing, ["--ckpt_path", "no.ckpt"], r"no\.ckpt"),
    "a checkpoint that is none": (nothing, ["--ckpt_path", "train.jsonl"], r"cannot read checkpoint train\.jsonl"),
}


@pytest.mark.parametrize("case", CASES)
def test_fit_ends_in_one_message_and_writes_nothing(here, capfd, case):
    spoil, words, pattern = CASES[case]
    spoil(here)
    before = files(here)
    message = failure(capfd, "fit", "--config", "run.yaml", *words)
    assert re.search(pattern, message), message
    new = {name for name in files(here) - before if not name.startswith("__pycache__")}
    assert {re.sub(r"events\..*", "events", name) for name in new} <= {
        "out/config.yaml",
        "out/hparams.yaml",
        "out/events",
    }


ENTANGLED_CASES = {
    "model and config": (["--model.init_args.model", "artifact"], r"exactly one of `model` .* and `config`"),
    "no model type": (["--model.init_args.config", "{hidden_size: 16}"], r"model\.config needs 'model_type'"),
    "unknown model type": (
        ["--model.init_args.config", "{model_type: lama}"],
        r"no model_type 'lama'; did you mean .*llama",
    ),
    "heads do not divide": (
        ["--model.init_args.config.num_attention_heads", "3"],
        r"cannot build a model of type 'llama'",
    ),
    "artifact below a file": (["--model.init_args.output_dir", "file/a"], r"cannot write to the output folder file/a"),
    "batch of none": (["--data.init_args.batch_size", "0"], r"^data\.batch_size must be at least 1, got 0"),
    "unknown tokenizer": (["--model.init_args.tokenizer", "chars"], r"tokenizer.*chars"),
}


@pytest.mark.parametrize("case", ENTANGLED_CASES)
def test_training_the_entangled_model_too(here, capfd, case):
    words, pattern = ENTANGLED_CASES[case]
    before = files(here)
    message = failure(capfd, "fit", "--config", "base.yaml", *words)
    assert re.search(pattern, message), message
    new = {re.sub(r"events\..*", "events", name) for name in files(here) - before}
    assert new <= {"out/config.yaml", "out/hparams.yaml", "out/events"}
