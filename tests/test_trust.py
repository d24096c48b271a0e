"""Checkpoints and folders of strangers: what they name is never imported, what they hold is never run."""

import json
import os
import pickle
import shutil
import sys

import pytest
import torch
from lightning import Trainer
from tiny import QUIET, TinyData, tiny_artifact

from cvae_lightning import SharedDiscreteCVAE
from cvae_lightning.backbones.artifact import Baseline
from cvae_lightning.backbones.causal_lm import load_causal_lm, load_tokenizer
from cvae_lightning.losses import LossCallback, PriorKLLoss
from cvae_lightning.trust import find_class, rebuild


class Own(LossCallback):
    """A user's own loss."""

    def forward(self, outputs):
        return outputs.router_log_probs.sum(-1)


class WithOptions(SharedDiscreteCVAE):
    """A user's own module that hands on whatever it does not know."""

    def __init__(self, power: int = 2, **kwargs):
        super().__init__(**kwargs)
        self.power = power


class Bomb:
    """Runs a command where it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "ran"),)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("artifact"))


def save(artifact, path, cls=SharedDiscreteCVAE, **options):
    losses = {"kl_prior_loss": PriorKLLoss(1.0), "own": Own(0.5)}
    module = cls(entangled=artifact, num_latents=2, losses=losses, **options)
    trainer = Trainer(**QUIET, max_steps=0)
    trainer.fit(module, TinyData())
    trainer.save_checkpoint(path)
    return module


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A module on the path that leaves a trace when it is imported."""
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    (tmp_path / "planted_module.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "planted.yaml").write_text("class_path: planted_module.X\n")
    yield tmp_path
    assert "planted_module" not in sys.modules
    assert not (tmp_path / "ran").exists()


LOSSES = {
    "a class": {"kl": {"class_path": "planted_module.X"}},
    "a class inside another": {"kl": {"class_path": "cvae_lightning.losses.PriorKLLoss", "init_args": {"weight": [
        {"class_path": "planted_module.X"}]}}},
    "the text of a class": {"kl": "planted_module.X"},
    "YAML": "{kl: {class_path: planted_module.X}}",
    "YAML in a mapping": {"kl": "class_path: planted_module.X"},
    "a file": {"kl": "planted.yaml"},
    "a function": {"kl": {"class_path": "os.system", "init_args": {"command": "touch ran"}}},
    "a class that runs what it is given": {"kl": {"class_path": "subprocess.Popen", "init_args": {"args": "ls"}}},
    "a number": 3,
    "arguments that are none": {"kl": {"class_path": "cvae_lightning.losses.PriorKLLoss", "init_args": "x"}},
    "an argument too many": {"kl": {"class_path": "cvae_lightning.losses.PriorKLLoss", "init_args": {"wight": 1}}},
    "a class that is not there": {"kl": {"class_path": "cvae_lightning.losses.Nothing"}},
    "a module that is not there": {"kl": {"class_path": "cvae_lightning.nothing.Nothing"}},
    "a name without a module": {"kl": {"class_path": "PriorKLLoss"}},
}  # fmt: skip


@pytest.mark.parametrize("case", LOSSES)
def test_hyperparameters_of_a_stranger_run_nothing(artifact, planted, case):
    path = planted / "stranger.ckpt"
    save(artifact, path)
    stored = torch.load(path, weights_only=True)
    stored["hyper_parameters"]["losses"] = LOSSES[case]
    torch.save(stored, path)
    with pytest.raises(ValueError, match=r"stranger\.ckpt|losses\['kl'\] must be a LossCallback"):
        SharedDiscreteCVAE.load_from_checkpoint(path)


@pytest.mark.parametrize(
    "changes",
    [{"_class_path": "planted_module.X"}, {"_class_path": "torch.nn.Linear"}, {"nonsense": 1}, {"entangled": {}}],
    ids=str,
)
def test_a_class_of_another_kind_is_refused(artifact, planted, changes):
    path = planted / "stranger.ckpt"
    save(artifact, path)
    stored = torch.load(path, weights_only=True)
    stored["hyper_parameters"] |= changes
    torch.save(stored, path)
    with pytest.raises(ValueError, match=r"stranger\.ckpt"):
        SharedDiscreteCVAE.load_from_checkpoint(path)


@pytest.mark.parametrize("content", [[1], {"a": 1}, {"state_dict": {}, "hyper_parameters": [1]}, torch.zeros(2)])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "odd.ckpt")
    with pytest.raises(ValueError, match=r"cannot read checkpoint .*odd\.ckpt"):
        SharedDiscreteCVAE.load_from_checkpoint(tmp_path / "odd.ckpt")


def test_the_instantiator_that_a_checkpoint_names_is_not_called(artifact, planted):
    path = planted / "stranger.ckpt"
    save(artifact, path)
    stored = torch.load(path, weights_only=True)
    stored["hyper_parameters"]["_instantiator"] = "planted_module.X"
    torch.save(stored, path)
    assert SharedDiscreteCVAE.load_from_checkpoint(path).num_latents == 2


def test_own_classes_come_back_with_their_arguments(artifact, tmp_path):
    module = save(artifact, tmp_path / "own.ckpt", WithOptions, power=3, latent_token_std=0.5)
    found = WithOptions.load_from_checkpoint(tmp_path / "own.ckpt", dropout=0.1)
    assert (found.power, found.hparams["latent_token_std"], found.hparams["dropout"]) == (3, 0.5, 0.1)
    assert isinstance(found.losses["own"], Own)
    assert found.losses["own"].weight == 0.5
    for name, value in module.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_classes_are_found_where_they_are_and_nowhere_else():
    assert find_class("cvae_lightning.SharedDiscreteCVAE", SharedDiscreteCVAE, "a") is SharedDiscreteCVAE
    assert find_class(f"{Own.__module__}.Own", LossCallback, "a") is Own
    assert rebuild({"a": [1, {"b": None}], "class": "x.y"}, "a") == {"a": [1, {"b": None}], "class": "x.y"}
    with pytest.raises(ValueError, match=r"a names antigravity\.X, whose module is not imported.*`import antigravity`"):
        find_class("antigravity.X", LossCallback, "a")
    assert "antigravity" not in sys.modules


REMOTE = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
CODE = "from transformers import LlamaConfig as C, LlamaForCausalLM as M, PreTrainedTokenizerFast as T\n"


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def stranger(artifact, tmp_path):
    """A folder with a whole model, code of its own, and pickles of every kind."""
    folder = tmp_path / "stranger"
    shutil.copytree(artifact, folder)
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n{CODE}")
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "adapter_model.bin"):
        torch.save({"x": Bomb(tmp_path)}, folder / name)
    for name in ("baseline.pkl", "baseline.json.pkl", "tokenizer.pickle"):
        (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path)))
    yield folder
    assert not (tmp_path / "ran").exists()


def test_pickles_and_code_beside_a_model_are_left_alone(stranger):
    change(stranger / "config.json", auto_map=REMOTE)
    change(stranger / "tokenizer_config.json", auto_map=REMOTE)
    assert type(load_causal_lm(str(stranger))).__module__.startswith("transformers.")
    assert type(load_tokenizer(str(stranger))).__module__.startswith("transformers.")
    assert Baseline.load(stranger).c_base == 1.5


def test_a_model_of_pickles_alone_is_refused(stranger):
    (stranger / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot load a causal language model"):
        load_causal_lm(str(stranger))
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "pytorch_model.bin"}}
    (stranger / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="cannot load a causal language model"):
        load_causal_lm(str(stranger))
    shutil.copy(stranger / "pytorch_model.bin", stranger / "model.safetensors")
    (stranger / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="cannot load a causal language model"):
        load_causal_lm(str(stranger))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "evil", "auto_map": REMOTE},
        {"model_type": None, "auto_map": REMOTE},
        {"attn_implementation": "stranger/kernel"},
        {"_attn_implementation": {"": "stranger/kernel"}},
        {"hidden_size": "abc"},
        {"num_attention_heads": 0},
    ],
    ids=str,
)
def test_a_config_that_needs_remote_code_or_is_broken_is_refused(stranger, changes):
    change(stranger / "config.json", **changes)
    with pytest.raises(ValueError, match="cannot load a causal language model"):
        load_causal_lm(str(stranger))


@pytest.mark.parametrize(
    "broken", ["[]", "{", '{"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["e.T", "e.T"]}}']
)
def test_a_tokenizer_that_needs_remote_code_or_is_broken_is_refused(stranger, broken):
    (stranger / "tokenizer_config.json").write_text(broken)
    with pytest.raises(ValueError, match="cannot load a tokenizer"):
        load_tokenizer(str(stranger))


@pytest.mark.parametrize("name", ["config", "tokenizer"])
def test_a_checkpoint_that_describes_remote_code_is_refused_or_runs_none(artifact, planted, name):
    path = planted / "stranger.ckpt"
    save(artifact, path)
    stored = torch.load(path, weights_only=True)
    described = stored["hyper_parameters"]["entangled"]
    content = json.loads(described[name])
    remote = {"auto_map": {key: value for key, value in REMOTE.items() if key != "AutoTokenizer"}}
    if name == "config":
        content |= remote | {"_attn_implementation": "stranger/kernel"}
    else:
        evil = {"tokenizer_class": "Evil", "auto_map": REMOTE}
        content["tokenizer_config.json"] = json.dumps(json.loads(content["tokenizer_config.json"]) | evil)
        content["../planted_module.py"] = "outside"
    described[name] = json.dumps(content)
    torch.save(stored, path)
    with pytest.raises(ValueError, match=r"remote code is never run|cannot load a tokenizer"):
        SharedDiscreteCVAE.load_from_checkpoint(path)
