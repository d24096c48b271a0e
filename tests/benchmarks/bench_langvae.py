"""V1: training steps of the continuous model against those of LangVAE 0.6.13 as shipped, as sentence autoencoders.

Both start from the same small GPT-2 and read the same sentences; x is empty, as LangVAE has none. Its encoder, a frozen
BERT, is as large as our posterior network, and run once per sentence (cached), as in its README. LangVAE trains the
projections of z into a frozen model that generates freely; we train generator and posterior network whole, with the
right y before every token. So this compares what a step costs, not what it learns. LANGVAE_PYTHON names the interpreter
of an environment with LangVAE: `python -m venv E && E/bin/pip install langvae==0.6.13`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import Figure, clock, extra_megabytes, options, report
from setting import Sentences, artifact, plain_step, through_lightning
from transformers import BertConfig, BertModel

from cvae_lightning import losses as terms
from cvae_lightning.modules import ContinuousCVAE

LATENT, WORDS, BATCH = 128, 32, 16


class LangVAE:
    """A process of the other environment that takes steps on demand."""

    def __init__(self, models: tuple[str, str], sentences: list[str], batch_size: int, give_back: bool) -> None:
        given = {
            "decoder": models[0],
            "encoder": models[1],
            "output": str(Path(models[0]).parent / "trained"),
            "sentences": sentences,
            "length": WORDS,
            "latent": LATENT,
            "batch_size": batch_size,
            "give_back": give_back,
        }
        script = Path(__file__).parent / "langvae_side.py"
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [os.environ["LANGVAE_PYTHON"], str(script), json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def ask(self, what: str) -> float:
        """Return the seconds of a ``step``, or the extra megabytes of one (``memory``)."""
        assert self._process.stdin
        assert self._process.stdout
        print(what, file=self._process.stdin, flush=True)
        if not (answer := self._process.stdout.readline()):
            self._log.seek(0)
            raise SystemExit(f"LangVAE stopped:\n{self._log.read()[-2000:]}")
        return float(answer)

    def close(self) -> None:
        """Let it go."""
        self._process.communicate("")


def build(folder: str) -> ContinuousCVAE:
    """Build the model with one sample per sentence and the plain ELBO, as LangVAE's."""
    torch.manual_seed(1)
    losses = {"reconstruction_loss": terms.ReconstructionLoss(), "kl_prior_loss": terms.PriorKLLoss(weight=0.1)}
    return ContinuousCVAE(folder, losses, latent_dim=LATENT, posterior="reparameterized").train()  # type: ignore[arg-type]


def for_transformers_4(folder: str, width: int, layers: int) -> tuple[str, str]:
    """Return a copy of an artifact whose tokenizer the older library reads, and a random BERT of the same size."""
    decoder = shutil.copytree(folder, Path(folder) / "decoder")
    path = decoder / "tokenizer_config.json"
    known = json.loads(path.read_text())
    del known["extra_special_tokens"]  # a list now, a mapping then; tokenizer.json has them
    path.write_text(json.dumps(known | {"tokenizer_class": "PreTrainedTokenizerFast"}))

    encoder = shutil.copytree(decoder, Path(folder) / "encoder", ignore=shutil.ignore_patterns("*.safetensors"))
    config = BertConfig(
        vocab_size=json.loads((decoder / "config.json").read_text())["vocab_size"],
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
    )
    BertModel(config).save_pretrained(encoder)
    return str(decoder), str(encoder)


def main() -> None:
    """Measure and report."""
    warnings.filterwarnings("ignore")
    given = options(__doc__ or "")
    if "LANGVAE_PYTHON" not in os.environ:
        raise SystemExit("set LANGVAE_PYTHON to the interpreter of an environment with langvae==0.6.13")
    width, layers, vocab, batch_size = (64, 2, 2000, 4) if given.quick else (256, 4, 50257, BATCH)
    with tempfile.TemporaryDirectory() as folder:
        source = artifact(folder, "gpt2", width, layers, vocab)
        models = for_transformers_4(source, width, layers)
        data = Sentences(4, WORDS + 2, 2 * batch_size, vocab, batch_size)  # </y> and <eos> make it two more
        assert not any(record.x for record in data.all)
        sentences = [record.y for record in data.all]

        def side() -> Callable[[], Any]:
            module = build(source)
            return plain_step(module, module.template.collate(data.all[:batch_size]))

        ours = extra_megabytes(side)

        peer = LangVAE(models, sentences, batch_size, give_back=False)
        for _ in range(3):
            peer.ask("step")  # compiles its loss, and fills its caches in the first epoch
        best = through_lightning(build(source), data, {"langvae": lambda: peer.ask("step")}, clock, given.repeat)
        peer.close()

        peer = LangVAE(models, sentences, batch_size, give_back=True)
        for _ in range(3):
            peer.ask("step")
        needs = peer.ask("memory")
        peer.close()

    rates = {name: batch_size / seconds for name, seconds in best.items()}
    note = f"{rates['lightning']:.1f} / {rates['langvae']:.1f} sequences per second"
    figures = [
        Figure("V1 speed, ours / LangVAE", rates["lightning"] / rates["langvae"], 2, 5, note),
        Figure("V1 memory, LangVAE / ours", needs / ours, 2, 4, f"{needs:.0f} MB / {ours:.0f} MB"),
    ]
    report(f"Against LangVAE 0.6.13, {WORDS} words a sentence, batches of {batch_size}", figures, given)


if __name__ == "__main__":
    sys.exit(main())
