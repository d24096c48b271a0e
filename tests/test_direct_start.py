"""From a plain pretrained checkpoint, which has never seen the markers, and from inputs alone."""

import json

import lightning as L
import pytest
import torch
from tiny import QUIET
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from user_folder import failure, write_rows

from cvae_lightning import SharedDiscreteCVAE, cli
from cvae_lightning.data import PairsDataModule, SelfGeneration
from cvae_lightning.losses import FreeEnergyLoss
from cvae_lightning.template import MARKERS, latent_token

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*fingerprint.*",
    "ignore:most solutions.*",
    "ignore::cvae_lightning.callbacks.CollapseWarning",
    "ignore:.*exists and is not empty.*",
)
PROMPTS = [{"x": f"What is {i} + {i * i}?"} for i in range(60)]
DRAWN = {"num_solutions": 4, "max_new_tokens": 40, "prompt": "Question: {x}\nAnswer:", "stop": ["\n", "e", "a", "."]}
FIT = {
    "trainer.callbacks": "null",
    "trainer.max_steps": 2,
    "trainer.val_check_interval": 2,
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": False,
    "trainer.enable_model_summary": False,
    "trainer.log_every_n_steps": 1,
    "data.init_args.train_path": "prompts.jsonl",
    "data.init_args.batch_size": 8,
}


def plain_tokenizer(family):
    """A byte-level tokenizer as GPT-2 has it, or as Llama 3 has it, which writes a beginning of text by itself."""
    special = ["<|endoftext|>"] if family == "gpt2" else ["<|begin_of_text|>", "<|end_of_text|>"]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["Question: What is 1 + 2? Answer: 3"] * 3, trainer)
    if family == "llama":
        inner.post_processor = processors.TemplateProcessing(
            single=f"{special[0]} $A", special_tokens=[(special[0], 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=special[0], eos_token=special[-1])


@pytest.fixture(params=["gpt2", "llama"])
def plain(request, tmp_path, monkeypatch):
    """A folder with inputs alone and, in ``plain``, a model as Hugging Face saves it."""
    monkeypatch.chdir(tmp_path)
    tokenizer = plain_tokenizer(request.param)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    if request.param == "gpt2":
        config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=128, **ends)
        lm = GPT2LMHeadModel(config)
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes, **ends)
        lm = LlamaForCausalLM(config)
    lm.save_pretrained("plain")
    tokenizer.save_pretrained("plain")
    write_rows(tmp_path / "prompts.jsonl", PROMPTS)
    return tmp_path


def fit(recipe, **options):
    words = {name: value if isinstance(value, str) else json.dumps(value) for name, value in (FIT | options).items()}
    return ["fit", "--config", recipe, *(word for name, text in words.items() for word in (f"--{name}", text))]


def solved(folder, split="*"):
    """(x, y) of all that was drawn for a split."""
    paths = sorted(folder.glob(f"{split}-*/*.jsonl"))
    return [(row["x"], row["y"]) for path in paths for row in map(json.loads, path.read_text().splitlines())]


def direct(**options):
    model = {"model.init_args.entangled": "plain", "model.init_args.seeding": "null"}
    return fit("discrete_pairs", **model | {"data.init_args.self_generated": DRAWN} | options)


def nats_per_token(lm, template, records):
    """The cost of the solutions after ``<bos> <x> x </x> <y>``, one record at a time."""
    nats = tokens = 0
    for prefix, y in template.segments(records):
        ids = torch.tensor([[*prefix, template.marker_ids["<y>"], *y]])
        log_probs = lm.eval()(ids).logits[0].double().log_softmax(-1)
        nats -= sum(float(log_probs[len(prefix) + t, token]) for t, token in enumerate(y))
        tokens += len(y)
    return nats / tokens


def test_a_plain_checkpoint_and_inputs_alone_are_enough(plain):
    assert cli.main(direct()) == 0
    root = plain / "runs/pairs/discrete"
    pairs = solved(root / "self_generated")
    assert {x for x, _ in pairs} <= {row["x"] for row in PROMPTS}
    assert len({x for x, _ in pairs}) > 40
    assert not any(stop in y for _, y in pairs for stop in DRAWN["stop"])
    assert all(y == y.strip() != "" for _, y in pairs)

    model = SharedDiscreteCVAE.load_from_checkpoint(root / "checkpoints/last.ckpt")
    old = AutoTokenizer.from_pretrained("plain")
    new = {*MARKERS, *(latent_token(k) for k in range(4))}
    assert {*model.template.tokenizer.get_vocab()} - {*old.get_vocab()} == new
    assert all(model.template.tokenizer.convert_tokens_to_ids(t) >= len(old) for t in new)
    assert model.template.tokenizer("2 + 2 = 4").input_ids == old("2 + 2 = 4").input_ids
    assert model.lm.get_input_embeddings().weight.shape[0] == len(old) + len(new)

    ys = model.generate([PROMPTS[0]["x"]], "all", max_new_tokens=5)[0]
    assert len(ys) == 4
    assert cli.main(["export", "--ckpt", str(root / "checkpoints/last.ckpt"), "--out", "out"]) == 0
    assert AutoModelForCausalLM.from_pretrained("out").config.model_type == model.lm.config.model_type


def test_c_base_is_the_cost_of_what_was_drawn_for_validation(plain):
    model = SharedDiscreteCVAE("plain", {"free_energy_loss": FreeEnergyLoss()}, num_latents=3)
    options = SelfGeneration(**DRAWN | {"stop": tuple(DRAWN["stop"])})
    data = PairsDataModule("prompts.jsonl", batch_size=8, self_generated=options)
    L.Trainer(**QUIET, max_steps=1, default_root_dir="run").fit(model, data)
    records = data.records("val")
    assert 0 < len(records) == len(solved(plain / "run/self_generated", "val"))
    assert model.c_base == pytest.approx(nats_per_token(model.reference(), model.template, records), rel=1e-5)
    old = AutoModelForCausalLM.from_pretrained("plain").get_input_embeddings().weight
    assert torch.equal(model.reference().get_input_embeddings().weight[: len(old)], old)


@pytest.mark.parametrize("plain", ["gpt2"], indirect=True)
def test_an_entangled_model_may_learn_the_markers_from_what_it_drew_itself(plain):
    """Stage one: the plain model on its own solutions. Stage two: what it has become solves behind the markers."""
    options = {"model.init_args.model": "plain", "model.init_args.config": "null", "trainer.max_steps": 3}
    assert cli.main(fit("entangled_pairs", **options | {"data.init_args.self_generated": DRAWN})) == 0
    first = solved(plain / "runs/pairs/entangled/training/self_generated", "train")
    assert len(first) > 40
    baseline = json.loads((plain / "runs/pairs/entangled/baseline.json").read_text())
    assert baseline["c_base"] > 0
    options = {"data.init_args.self_generated": {"num_solutions": 16, "max_new_tokens": 60}}
    assert cli.main(fit("discrete_pairs", **{"model.init_args.seeding": "null"} | options)) == 0
    second = solved(plain / "runs/pairs/discrete/self_generated", "train")
    assert {x for x, _ in second} <= {row["x"] for row in PROMPTS}
    assert second != first


def test_without_the_option_inputs_alone_are_refused(plain, capfd):
    message = failure(capfd, *direct(**{"data.init_args.self_generated": "null"}))
    assert "prompts.jsonl:1: no column 'y'; the columns are 'x'" in message
    assert "self_generated" in message
