"""Exported folders: what they hold, and that they are the checkpoint's model in a process without this package."""

import contextlib
import io
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from tiny import CONFIGS, QUIET, RECORDS, TinyData, tiny_artifact, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import cvae_lightning
from cvae_lightning import cli, load_export
from cvae_lightning import losses as losses_
from cvae_lightning.backbones.causal_lm import build_causal_lm
from cvae_lightning.export.folder import EXPORT_FILE, whole_folder, write_model
from cvae_lightning.export.samples import sample_inputs
from cvae_lightning.export.usage import plain_usage, string_prompt_is_exact
from cvae_lightning.modules import ContinuousCVAE, EntangledLM, SharedDiscreteCVAE
from cvae_lightning.template import PromptTemplate

XS, YS = [r.x for r in RECORDS], [r.y for r in RECORDS]
SUMMARY = {"final_answer_accuracy": 0.75, "alignment_one_to_one": 0.5, "alignment_ceiling": 0.625, "num_latents": 3}
SUMMARY |= {
    "usage": [0.5, 0.375, 0.125],
    "router_usage": [0.25, 0.25, 0.5],
    "dead_latents": [],
    "usage_perplexity": 2.5,
}
pytestmark = pytest.mark.filterwarnings("ignore:.*fingerprint.*")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def terms():
    return {"free_energy_loss": losses_.FreeEnergyLoss(), "distillation": losses_.PosteriorDistillationLoss()}


class OwnLoss(losses_.LossCallback):
    """A user's own."""

    def forward(self, outputs):
        return outputs.router_log_probs.exp().square().sum(-1)


class OwnModel(SharedDiscreteCVAE):
    """A user's own."""


def train(folder, cls=SharedDiscreteCVAE, family="llama", losses=None, **options):
    """A run of two steps in ``folder``: its model, and the checkpoint."""
    torch.manual_seed(2)
    artifact = tiny_artifact(folder / "artifact", family)
    model = cls(artifact, losses or terms(), baseline_cache=False, learning_rate=1e-2, **options)
    if model.norms is not None:
        for linear in model.norms.maps:
            torch.nn.init.normal_(linear.weight, std=0.3)
    trainer = L.Trainer(**QUIET | {"max_steps": 2, "default_root_dir": folder})
    trainer.fit(model, TinyData(batch_size=5))
    checkpoint = folder / "checkpoints/last.ckpt"
    trainer.save_checkpoint(checkpoint)
    return model.eval(), checkpoint


def export(*words):
    assert cli.main(["export", *map(str, words)]) == 0


def failing(capsys, *words):
    """The message of an export that is refused."""
    assert cli.main(["export", *map(str, words)]) == 1
    return capsys.readouterr().err


def code_blocks(folder):
    """The runnable blocks of a card, their placeholder inputs replaced by real ones."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    found = [re.subn(r"^xs = .*$", f"xs = {XS!r}", block, count=1, flags=re.MULTILINE) for block in blocks]
    assert all(count == 1 for _, count in found)
    return [block for block, _ in found]


def in_fresh_process(code, folder):
    """The lines that a program prints; it runs in the exported folder."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def in_this_process(code, folder):
    out = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out):
        exec(code, {})
    return out.getvalue().splitlines()


@pytest.mark.parametrize(("family", "length"), [("llama", 1), ("gpt2", 2)])
def test_a_plain_folder_is_the_checkpoint_without_this_package(tmp_path, family, length):
    model, checkpoint = train(tmp_path, family=family, num_latents=3, prefix_length=length)
    (tmp_path / "artifact").rename(tmp_path / "gone")
    export("--ckpt", checkpoint, "--out", tmp_path / "out")
    t, m = model.template, model.template.marker_ids
    records = []
    for x, y, k in zip(XS, YS, [0, 1, 2, 1, 0], strict=True):
        head = [*t.bos, m["<x>"], *t._ids([x])[0], m["</x>"], m["<z>"], *t.latent_prefixes[k], m["</z>"], m["<y>"]]
        records.append([*head, *t._ids([y])[0], t.end_id])
    code = code_blocks(tmp_path / "out")[0] + (
        f"\nimport sys, torch\nprint([model(torch.tensor([r])).logits[0].tolist() for r in {records!r}])"
        "\nprint(any(name.startswith(('cvae_lightning', 'lightning')) for name in sys.modules))"
    )
    ys, router, logits, imported = in_fresh_process(code, tmp_path / "out")
    assert imported == "False"
    assert eval(ys) == model.generate_all(XS)
    torch.testing.assert_close(torch.tensor(eval(router)), model.route(XS).exp(), **CLOSE)
    for record, found in zip(records, eval(logits), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(torch.tensor(found), model.lm(torch.tensor([record])).logits[0], **CLOSE)


def test_the_plain_folder_of_every_family_and_the_loader_of_this_package(tmp_path):
    model, checkpoint = train(tmp_path, family="qwen2", num_latents=2)  # with an untied head
    (tmp_path / "summary").touch()
    export("--ckpt", checkpoint, "--out", tmp_path / "out")
    plain, own = code_blocks(tmp_path / "out")
    ys, router = in_this_process(plain, tmp_path / "out")
    assert eval(ys) == model.generate_all(XS)
    torch.testing.assert_close(torch.tensor(eval(router)), model.route(XS).exp(), **CLOSE)
    first, every, router, posterior, evidence = map(eval, in_this_process(own, tmp_path / "out"))
    assert first == model.generate(XS, 0)
    assert every == model.generate_all(XS)
    best = model.generate(XS, "argmax")
    torch.testing.assert_close(torch.tensor(router), model.route(XS).exp(), **CLOSE)
    torch.testing.assert_close(torch.tensor(posterior), model.infer(XS, best).exp(), **CLOSE)
    torch.testing.assert_close(torch.tensor(evidence), model.log_evidence(XS, best), **CLOSE)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors", EXPORT_FILE),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "summary").stat().st_mode & 0o777}  # as any other file of this user


def test_conditioned_norms_come_along_and_the_card_and_the_terminal_say_so(tmp_path, capsys):
    model, checkpoint = train(tmp_path, num_latents=3, norm_dim=4)
    export("--ckpt", checkpoint, "--out", tmp_path / "out", "--posterior")
    shown = capsys.readouterr().out
    card = (tmp_path / "out/README.md").read_text()
    for text in (shown, card):
        assert (
            "This folder alone is not the whole model. The z-conditioned norms live in `latent_norms.safetensors`"
            in text
        )
        assert "load_export" in text
    assert "With `transformers` alone" not in card
    expected = torch.rand(2, generator=torch.Generator().manual_seed(4))
    torch.manual_seed(4)
    again = load_export(tmp_path / "out")
    assert torch.equal(torch.rand(2), expected)  # loading draws nothing from the global generator
    assert not again.training
    assert again.generate_all(XS) == model.generate_all(XS)
    torch.testing.assert_close(again.log_likelihood(XS, YS), model.log_likelihood(XS, YS), **CLOSE)
    for kind in ("exact", "amortized"):
        torch.testing.assert_close(again.infer(XS, YS, kind), model.infer(XS, YS, kind), **CLOSE)
    first, *_ = in_fresh_process(code_blocks(tmp_path / "out")[0], tmp_path / "out")
    assert eval(first) == model.generate(XS, 0)


def test_an_export_without_the_posterior_network_says_so(tmp_path):
    """It does not answer with another posterior, and does not say that the network was never trained."""
    model, checkpoint = train(tmp_path, posterior="amortized", num_latents=3)
    export("--ckpt", checkpoint, "--out", tmp_path / "small")
    export("--ckpt", checkpoint, "--out", tmp_path / "out", "--posterior")
    small, again = load_export(tmp_path / "small"), load_export(tmp_path / "out")
    torch.testing.assert_close(again.infer(XS, YS), model.infer(XS, YS), **CLOSE)
    for options in ({}, {"posterior": "amortized"}):
        with pytest.raises(ValueError, match="no posterior network: export the checkpoint again with --posterior"):
            small.infer(XS, YS, **options)
    torch.testing.assert_close(small.infer(XS, YS, "exact"), model.infer(XS, YS, "exact"), **CLOSE)
    posterior = in_this_process(code_blocks(tmp_path / "small")[-1], tmp_path / "small")[3]
    best = model.generate(XS, "argmax")
    torch.testing.assert_close(torch.tensor(eval(posterior)), model.infer(XS, best, "exact").exp(), **CLOSE)


@pytest.mark.parametrize(
    "options", [{"injection": "both", "prefix_length": 2, "prefix_hidden": 5}, {}], ids=["both", "prefix"]
)
def test_a_gaussian_latent_comes_back_whole(tmp_path, options):
    model, checkpoint = train(tmp_path, ContinuousCVAE, latent_dim=2, num_eval_samples=3, **options)
    export("--ckpt", checkpoint, "--out", tmp_path / "out", "--posterior")
    export("--ckpt", checkpoint, "--out", tmp_path / "small")
    again, small = load_export(tmp_path / "out"), load_export(tmp_path / "small")
    for expected, *others in zip(model.route(XS), again.route(XS), small.route(XS), strict=True):
        for found in others:
            torch.testing.assert_close(found, expected, **CLOSE)
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    assert model.generate(XS, z) == again.generate(XS, z) == small.generate(XS, z)
    torch.testing.assert_close(again.infer(XS, YS), model.infer(XS, YS), **CLOSE)
    torch.testing.assert_close(again.log_evidence(XS, YS), model.log_evidence(XS, YS), **CLOSE)
    with pytest.raises(ValueError, match="no posterior network: export the checkpoint again with --posterior"):
        small.infer(XS, YS)
    drawn, mean = in_this_process(code_blocks(tmp_path / "small")[0], tmp_path / "small")
    assert eval(drawn) == model.generate(XS, "router", generator_seed=0)
    assert eval(mean) == model.generate(XS, "mean")


def test_a_module_in_memory_is_left_as_it_is(tmp_path):
    model, _ = train(tmp_path, num_latents=2)
    own, before = model.lm.generation_config, model.template.tokenizer.padding_side
    (tmp_path / "out").mkdir()
    write_model(tmp_path / "out", model, "discrete")
    assert model.lm.generation_config is own
    assert model.template.tokenizer.padding_side == before
    assert load_export(tmp_path / "out").generate(XS, 1) == model.generate(XS, 1)


def test_the_card_shows_what_was_measured_and_written(tmp_path, capsys):
    model, checkpoint = train(tmp_path, num_latents=3)
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    splits = {"train": [("1", "2")], "val": [("2", "3")], "test": [(r.x, r.y) for r in RECORDS for _ in range(2)]}
    data = {f"{split}_path": str(tmp_path / f"{split}.jsonl") for split in splits}
    for split, pairs in splits.items():
        text = "".join(json.dumps({"x": x, "y": y}) + "\n" for x, y in pairs)
        (tmp_path / f"{split}.jsonl").write_text(text)
    config = {"data": {"class_path": "cvae_lightning.data.PairsDataModule", "init_args": data}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    export("--ckpt", checkpoint, "--out", tmp_path / "out", "--inputs", 2)
    card = (tmp_path / "out/README.md").read_text()
    assert "note:" not in capsys.readouterr().out
    assert "| 1 | `<z_1>` | 0.375 | 0.250 |" in card
    assert re.search(r"alignment, posterior +0\.5000 +0\.6250 +0\.8000", card)
    for x, ys in zip(XS[:2], model.generate_all(XS[:2]), strict=True):
        lines = [f"x   {json.dumps(x)}", *(f"z{k}  {json.dumps(y)}" for k, y in enumerate(ys))]
        assert "\n".join(lines) in card
    assert f"xs = {XS[:2]!r}" in card
    assert "generator  <bos><x>…</x><z><z_k></z><y>" in card
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers"
    shown = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)[-1])
    assert shown["num_latents"] == 3
    assert "entangled" not in shown
    assert "2 optimizer steps" in card


def test_sample_inputs_are_those_that_the_model_reads(tmp_path):
    rows = [("1" * 80, "1"), *((str(i // 2), "1") for i in range(8))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"x": x, "y": y}) + "\n" for x, y in rows))
    arguments = {f"{split}_path": str(tmp_path / "rows.jsonl") for split in ("train", "val")}
    config = {"data": {"class_path": "cvae_lightning.data.PairsDataModule", "init_args": arguments}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    template = PromptTemplate(tiny_tokenizer(), 2, max_length=64, on_overflow="skip")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*are in train_path too.*")
        assert sample_inputs(tmp_path / "config.yaml", 3, template) == ["0", "1", "2"]


def test_what_is_missing_is_said(tmp_path, capsys):
    _, checkpoint = train(tmp_path, OwnModel, losses={"own": OwnLoss()}, num_latents=2)
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["_class_path"] = "my_models.OwnModel"
    content["hyper_parameters"]["losses"]["own"]["class_path"] = "my_losses.Planted"
    torch.save(content, checkpoint)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"class_path": "planted_module.Data"}}))
    export("--ckpt", checkpoint, "--out", tmp_path / "out")
    shown = capsys.readouterr().out
    assert "note: the model was trained as my_models.OwnModel" in shown
    assert "note: no summary.json beside the run" in shown
    assert "note: the card has no sample outputs:" in shown
    assert "planted_module" in shown
    assert {"planted_module", "my_models", "my_losses"}.isdisjoint(sys.modules)
    card = (tmp_path / "out/README.md").read_text()
    assert "Not measured" in card
    assert "No sample was written" in card
    assert "not measured | not measured" in card


class WithHead(SharedDiscreteCVAE):
    """A user's own, with weights of its own."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.my_head = torch.nn.Linear(2, 2)


def test_weights_of_a_users_class_are_left_out_and_named(tmp_path, capsys):
    model, checkpoint = train(tmp_path, WithHead, num_latents=2)
    content = torch.load(checkpoint, weights_only=True)
    for number, path in enumerate((None, "my_models.WithHead")):  # built in Python, and by the command line
        if path:
            content["hyper_parameters"]["_class_path"] = path
            torch.save(content, checkpoint)
        export("--ckpt", checkpoint, "--out", tmp_path / f"out{number}", "--inputs", 0)
        said = "note: weights that no SharedDiscreteCVAE has are left out: my_head.weight, my_head.bias"
        assert said in capsys.readouterr().out
        assert load_export(tmp_path / f"out{number}").generate(XS, 1) == model.generate(XS, 1)


def test_weights_that_do_not_fit_are_refused(tmp_path, capsys):
    _, checkpoint = train(tmp_path, WithHead, num_latents=2)
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["_class_path"] = "cvae_lightning.SharedDiscreteCVAE"
    torch.save(content, checkpoint)
    words = ["export", "--ckpt", str(checkpoint), "--out", str(tmp_path / "out"), "--inputs", "0"]
    assert cli.main(words) == 1
    assert "does not fit the SharedDiscreteCVAE that it describes: my_head.weight and 1 more" in capsys.readouterr().err
    content["hyper_parameters"]["_class_path"] = "my_models.WithHead"
    del content["state_dict"]["longest_y"]
    torch.save(content, checkpoint)
    assert cli.main(words) == 1
    assert "does not fit the SharedDiscreteCVAE that it describes: longest_y" in capsys.readouterr().err


def test_nothing_is_overwritten_or_left_half_written(tmp_path, capsys, monkeypatch):
    _, checkpoint = train(tmp_path, num_latents=2)
    out = tmp_path / "out"
    words = ("--ckpt", checkpoint, "--out", out, "--inputs", 0)
    out.mkdir()
    export(*words)  # an empty folder is as good as none
    assert "holds an export already: name another, or give --force" in failing(capsys, *words)
    (out / "mark").touch()
    export(*words, "--force")
    assert not (out / "mark").exists()
    other = tmp_path / "precious"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    for extra in ((), ("--force",)):
        message = failing(capsys, "--ckpt", checkpoint, "--out", other, *extra)
        assert "this folder has other content" in message
    assert "expected a folder" in failing(capsys, "--ckpt", checkpoint, "--out", other / "thesis.tex")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def broken(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cvae_lightning.export.card.card", broken)
    assert "No space left" in failing(capsys, *words, "--force")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    with pytest.raises(FileExistsError), whole_folder(tmp_path / "new") as new:
        (new / "file").touch(exist_ok=False) or (new / "file").touch(exist_ok=False)
    assert not (tmp_path / "new").exists()


def test_bad_input_is_one_clear_error(tmp_path, capsys):
    _, checkpoint = train(tmp_path, num_latents=2, losses={"free_energy_loss": losses_.FreeEnergyLoss()})
    out = tmp_path / "out"
    assert "No such file" in failing(capsys, "--ckpt", tmp_path / "nowhere.ckpt", "--out", out)
    (tmp_path / "torn.ckpt").write_bytes(checkpoint.read_bytes()[:1000])
    assert "truncated, or not a checkpoint" in failing(capsys, "--ckpt", tmp_path / "torn.ckpt", "--out", out)
    assert "the posterior network of this model was not trained" in failing(
        capsys, "--ckpt", checkpoint, "--out", out, "--posterior"
    )
    (tmp_path / "report.json").write_text('{"a": 1}')
    message = failing(capsys, "--ckpt", checkpoint, "--out", out, "--report", tmp_path / "report.json")
    assert "report.json: expected the summary.json" in message
    (tmp_path / "report.json").write_text('{"rho_recon": "low"}')
    assert "rho_recon must be a number" in failing(
        capsys, "--ckpt", checkpoint, "--out", out, "--report", tmp_path / "report.json"
    )
    (tmp_path / "config.yaml").write_text("data: {class_path: planted_module.Data}")
    assert "planted_module" in failing(capsys, "--ckpt", checkpoint, "--out", out, "--config", tmp_path / "config.yaml")
    entangled = EntangledLM(str(tmp_path / "e"), model=tiny_artifact(tmp_path / "base"))
    trainer = L.Trainer(**QUIET | {"max_steps": 1})
    trainer.fit(entangled, TinyData(batch_size=5))
    trainer.save_checkpoint(tmp_path / "entangled.ckpt")
    assert "holds no model with latents" in failing(capsys, "--ckpt", tmp_path / "entangled.ckpt", "--out", out)
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"].pop("lm.model.norm.weight")
    torch.save(content, tmp_path / "other.ckpt")
    message = failing(capsys, "--ckpt", tmp_path / "other.ckpt", "--out", out)
    assert "does not fit the SharedDiscreteCVAE that it describes: lm.model.norm.weight" in message
    assert not out.exists()


def test_a_broken_export_is_refused_with_the_file_at_fault(tmp_path):
    from safetensors.torch import load_file, save_file

    _, checkpoint = train(tmp_path, num_latents=2, norm_dim=3)
    export("--ckpt", checkpoint, "--out", tmp_path / "out", "--inputs", 0)
    out = tmp_path / "out"
    path, good = out / EXPORT_FILE, json.loads((out / EXPORT_FILE).read_text())
    for change, message in (
        ({"format": 99}, "format 99 is of a later version"),
        ({"kind": "quantum"}, "kind must be discrete or continuous, got 'quantum'"),
        ({"longest_y": "8"}, "expected 'longest_y' to be of type int"),
        ({"arguments": {"entangled": "/elsewhere"}}, "unknown argument 'entangled'"),
        ({"arguments": good["arguments"] | {"num_latents": 3}}, "not the one that .* describes: size mismatch"),
        ({"arguments": good["arguments"] | {"norm_dim": 5}}, r"vectors\.weight has shape \[2, 3\], expected \[2, 5\]"),
        ({"arguments": good["arguments"] | {"num_latents": "two"}}, "'<' not supported"),
        ({"files": {}}, "cannot read"),
        ({"files": {"latent": "../../etc/hosts"}}, "cannot read .*/out/hosts"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=message):
            load_export(out)
    path.write_text("{")
    with pytest.raises(ValueError, match=rf"{EXPORT_FILE}: not valid JSON"):
        load_export(out)
    path.write_text(json.dumps(good))
    weights = load_file(out / "latent_norms.safetensors")
    weights.pop("latent_vectors.weight")
    save_file(weights, out / "latent_norms.safetensors")
    with pytest.raises(ValueError, match=r"latent_norms\.safetensors: latent_vectors\.weight is missing"):
        load_export(out)
    with pytest.raises(ValueError, match=f"has no {EXPORT_FILE}"):
        load_export(tmp_path / "artifact")


def test_a_tokenizer_that_treats_x_otherwise_between_markers_gets_a_snippet_that_does_not(tmp_path):
    words = ["<pad>", "<unk>", "<bos>", "<eos>", *"0123456789;=", *(f"▁{c}" for c in "0123456789;=")]
    backend = Tokenizer(models.BPE({w: i for i, w in enumerate([*words, "▁"])}, [("▁", c) for c in "0123456789;="]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    )
    template = PromptTemplate(tokenizer)
    lm = build_causal_lm(CONFIGS["llama"], len(template), template.pad_id)
    lm.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    model = SharedDiscreteCVAE(str(tmp_path / "base"), terms(), num_latents=2).eval()
    with torch.no_grad():
        for parameter in model.lm.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    assert not string_prompt_is_exact(model, [])
    model.longest_y.fill_(12)  # the snippet gives all prompts the room of the longest one
    (tmp_path / "out").mkdir()
    write_model(tmp_path / "out", model, "discrete")
    code = plain_usage(model, XS).split("```python\n")[1].split("```")[0]
    ys, router = in_this_process(code, tmp_path / "out")
    torch.testing.assert_close(torch.tensor(eval(router)), model.route(XS).exp(), **CLOSE)
    found = [[y.replace(" ", "") for y in row] for row in eval(ys)]
    assert found == [[y.replace(" ", "") for y in row] for row in model.generate_all(XS)]


def test_the_loader_is_public_and_light_commands_do_not_wait_for_it():
    assert "load_export" in cvae_lightning.__all__
    assert Path(cvae_lightning.__file__).parent.joinpath("export/loading.py").exists()
    code = "import sys; from cvae_lightning import cli; code = cli.main(['export', '--help']); "
    code += "sys.exit(code or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--ckpt FILE" in done.stdout
