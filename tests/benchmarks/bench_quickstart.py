"""The quickstart: its training step and forced answers against a full sequence for every latent; prompts are short."""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import torch
import yaml
from bench_generation import LENGTH, separate
from jsonargparse import ArgumentParser
from measure import Figure, options, report, seconds
from setting import plain_step
from torch import Tensor

from cvae_lightning.backbones.artifact import Baseline, save_artifact
from cvae_lightning.backbones.branches import BranchOutput
from cvae_lightning.backbones.causal_lm import build_causal_lm, head_of
from cvae_lightning.backbones.tokenizer import build_tokenizer
from cvae_lightning.data import SyntheticDataModule
from cvae_lightning.modules import SharedDiscreteCVAE
from cvae_lightning.outputs import PairBatch
from cvae_lightning.recipes import find_recipe
from cvae_lightning.template import PromptTemplate


class Repeating(SharedDiscreteCVAE):
    """The same model, the prompt read K times and all logits of a step made at once."""

    def generator(self, branches: BranchOutput, batch: PairBatch, need_jsd: bool) -> tuple[Tensor, Tensor | None]:
        """Return the token costs [B, K, T] by way of log-probabilities of the whole vocabulary."""
        logits = head_of(self.lm).logits(branches.hidden[:, :, self.template.prefix_length + 1 :])
        targets = batch.y_ids[:, None, :, None].expand(-1, self.num_latents, -1, -1)
        return -logits.log_softmax(-1).gather(-1, targets).squeeze(-1) * batch.y_mask[:, None], None


def recipe(name: str) -> dict[str, Any]:
    """Return a shipped recipe."""
    return yaml.safe_load(find_recipe(name).read_text())


def untrained(folder: str, alphabet: str) -> None:
    """Write the quickstart's entangled model before any training: a step takes as long."""
    template = PromptTemplate(build_tokenizer(sorted(set(alphabet)), "char"))
    torch.manual_seed(0)
    config = recipe("quickstart_entangled")["model"]["init_args"]["config"]
    lm = build_causal_lm(config, len(template), template.pad_id)
    save_artifact(folder, lm, template.tokenizer, Baseline(3.0, 1, "benchmark-val", template.fingerprint()))


def main() -> None:
    """Measure and report."""
    warnings.filterwarnings("ignore")
    given = options(__doc__ or "")
    parser = ArgumentParser()
    parser.add_argument("--data", type=SyntheticDataModule)
    parser.add_argument("--model", type=SharedDiscreteCVAE)
    config = {part: recipe("quickstart_discrete")[part] for part in ("data", "model")}
    sides: dict[str, SharedDiscreteCVAE] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = parser.instantiate(parser.parse_object({"data": config["data"]})).data
        untrained(folder, data.task.alphabet)
        for kind, method in ((Repeating, "repeat"), (SharedDiscreteCVAE, "auto")):
            config["model"]["class_path"] = f"{kind.__module__}.{kind.__name__}"
            config["model"]["init_args"] |= {"entangled": folder, "branch_method": method}
            torch.manual_seed(1)
            sides[method] = parser.instantiate(parser.parse_object({"model": config["model"]})).model
    ours, naive = sides["auto"], sides["repeat"]
    records = [data.records("train")[i] for i in range(4 if given.quick else data.batch_size)]
    batch = ours.template.collate(records)
    with torch.no_grad():
        costs = [module.compute_outputs(batch, frozenset()).token_nll for module in (ours, naive)]
    torch.testing.assert_close(*costs, rtol=1e-4, atol=1e-4)
    best = seconds({name: plain_step(module.train(), batch) for name, module in sides.items()}, given.repeat)
    note = f"{1000 * best['repeat']:.0f} ms / {1000 * best['auto']:.0f} ms"
    figures = [Figure("training step", best["repeat"] / best["auto"], note=note)]
    ours.eval(), naive.eval()
    xs = [record.x for record in records[:16]]
    answers = {
        "separate": lambda: separate(naive, xs),
        "ours": lambda: ours.generate_all(xs, max_new_tokens=LENGTH),
    }
    texts = answers["ours"]()
    assert texts == answers["separate"]()
    best = seconds(answers, given.repeat)
    length = sum(len(y) for row in texts for y in row) / sum(map(len, texts))
    note = f"{best['separate']:.2f} s / {best['ours']:.2f} s; {length:.0f} characters on average"
    figures.append(Figure("forced answers", best["separate"] / best["ours"], note=note))
    report("The quickstart, one sequence for every latent / ours", figures, given)


if __name__ == "__main__":
    main()
