"""How much token weighting amplifies the gradient that reaches the posterior, against T / t0, with a figure.

Under teacher forcing only some t0 of the T tokens of y depend on the strategy, so that the uniform mean dilutes what
tells the latents apart by t0 / T. Weights w_t = b_t (the entangled model's NLL) undo it. Per record, at a uniform q:
the gradient of R = sum_k q_k R(z_k) in the logits of q is q_k (R(z_k) - R); amplification is the ratio of its norms,
weighted over uniform; t0 = exp(entropy of w / sum w) counts the tokens that carry the weight.

    python tests/benchmarks/token_weighting.py CHECKPOINT:ENTANGLED TASK [CHECKPOINT:ENTANGLED TASK ...] [--write]

CHECKPOINT is one of a ``SharedDiscreteCVAE``, ENTANGLED the folder of its entangled model, TASK the class name of its
task: ``last.ckpt:runs/sorting_algorithms/entangled SortingAlgorithms``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch

from cvae_lightning import SharedDiscreteCVAE
from cvae_lightning.backbones.causal_lm import load_causal_lm
from cvae_lightning.data import SyntheticDataModule, tasks
from cvae_lightning.functional import masked_token_mean

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

RESULTS = Path(__file__).parent / "results"


@torch.no_grad()
def amplification(checkpoint: str, entangled: str, task: str, records: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (T / t0, ratio of the gradient norms), [records] each."""
    module = SharedDiscreteCVAE.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    reference = load_causal_lm(entangled).eval()
    data = SyntheticDataModule(getattr(tasks, task)(), train_size=1, val_size=records, eval_batch_size=64)
    data.template = module.template
    predicted, measured = [], []
    for batch in data.val_dataloader():
        outputs = module.compute_outputs(batch, frozenset())
        weights = module.free_token_nll(reference, batch)  # [B, T]
        share = weights / weights.sum(-1, keepdim=True)
        predicted.append(batch.y_mask.sum(-1) / torch.special.entr(share).sum(-1).exp())
        norms = []
        for w in (weights, None):
            cost = masked_token_mean(outputs.token_nll, batch.y_mask, w)  # [B, K]
            norms.append((cost - cost.mean(-1, keepdim=True)).norm(dim=-1))
        measured.append(norms[0] / norms[1])
    return torch.cat(predicted), torch.cat(measured)


def main() -> None:
    """Measure every checkpoint, print a table, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", metavar="CHECKPOINT:ENTANGLED TASK")
    parser.add_argument("--write", action="store_true", help="write table and figure to tests/benchmarks/results")
    given = parser.parse_args()
    lines = [
        "| task | T / t0, median | amplification, median | their ratio, median | correlation of logs |",
        "|---|---:|---:|---:|---:|",
    ]
    figure, ax = plt.subplots(figsize=(6, 5))
    for source, task in zip(given.pairs[::2], given.pairs[1::2], strict=True):
        checkpoint, entangled = source.split(":")
        predicted, measured = amplification(checkpoint, entangled, task)
        correlation = torch.corrcoef(torch.stack([predicted, measured]).log())[0, 1]
        values = (predicted.median(), measured.median(), (measured / predicted).median())
        lines.append(f"| {task} | " + " | ".join(f"{v:.2f}" for v in values) + f" | {correlation:.2f} |")
        ax.loglog(predicted, measured, ".", markersize=4, alpha=0.6, label=task)
    low, high = ax.get_xlim()
    ax.plot([low, high], [low, high], color="black", linewidth=1, label="equal")
    ax.set(xlabel="T / t0", ylabel="amplification of the posterior's gradient")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(FixedLocator([2, 3, 5, 10, 20, 40]))
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_locator(NullLocator())
    ax.legend(fontsize=8)
    print("\n".join(lines))
    if given.write:
        (RESULTS / "token_weighting.md").write_text("\n".join(lines) + "\n")
        figure.savefig(RESULTS / "token_weighting.png", dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
