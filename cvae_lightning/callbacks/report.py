"""One table and one JSON file that say how good a model is."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from cvae_lightning.atomic_write import write_json
from cvae_lightning.callbacks.epoch_results import dead_latents, logged, metric_result
from cvae_lightning.callbacks.evaluation import Generation, StrategyEvaluation

SUMMARY_KEYS = {
    "final_answer_accuracy": "controlled/final_answer_accuracy",
    "sampled_final_answer_accuracy": "sampled/final_answer_accuracy",
    "greedy_final_answer_accuracy": "greedy/final_answer_accuracy",
    "alignment_one_to_one": "alignment/one_to_one",
    "alignment_ami": "alignment/ami",
    "alignment_purity": "alignment/purity",
    "alignment_amortized_one_to_one": "alignment_amortized/one_to_one",
    "controlled_alignment_one_to_one": "controlled/alignment_one_to_one",
    "controlled_alignment_ceiling": "controlled/alignment_ceiling",
    "local_strategy_coverage_mean": "controlled/local_strategy_coverage_mean",
    "local_strategy_full_coverage_rate": "controlled/local_strategy_full_coverage_rate",
    "router_cross_entropy": "router/cross_entropy",
    "router_expected_cross_entropy": "router/expected_cross_entropy",
    "router_true_cross_entropy": "router/true_cross_entropy",
    "router_calibration_error": "router/calibration_error",
    "distinct_fraction": "controlled/distinct_fraction",
    "rho_recon": "rho_recon",
    "marginal_nll": "marginal_nll",
    "baseline_nll": "baseline_nll",
    "usage_perplexity": "diagnostics/latent_usage_perplexity",
    "linear_probe_accuracy": "probe/posterior_accuracy",
    "router_probe_accuracy": "probe/router_accuracy",
    "linear_probe_floor": "probe/floor",
    "prior_kl": "diagnostics/prior_kl",
    "active_units": "diagnostics/active_units",
    "marginal_nll_standard_error": "marginal_nll_standard_error",
}
"""Summary key to log key (without the stage) of everything that is simply logged."""


class Report(Callback):
    """Prints one table when a test ends and writes its numbers as JSON.

    Rows: final-answer accuracy, alignment with its ceiling, rho_recon, NLL per token beside the entangled model's,
    latent usage, generations under every forced latent, and the TensorBoard command. Rows whose numbers do not exist,
    for instance without a verifier, are left out of the table and null in the file. ``final_answer_accuracy`` is the
    controlled one, and for a module without latents the greedy one.

    Args:
        path: JSON file to write; None = ``summary.json`` in the trainer's ``default_root_dir``.
        num_inputs: inputs whose generations are shown.
        width: longest text of a generation, in characters.

    Raises:
        ValueError: when a test starts and ``path`` cannot be written.
    """

    def __init__(self, path: str | None = None, num_inputs: int = 2, width: int = 80) -> None:
        self.path = path
        self.num_inputs = num_inputs
        self.width = width
        self.summary: dict[str, Any] = {}
        """What the last test wrote."""
        self._usage: dict[str, Tensor] | None = None

    def target(self, trainer: Trainer) -> Path:
        """Return the file to write."""
        return Path(self.path) if self.path is not None else Path(trainer.default_root_dir) / "summary.json"

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a path that cannot be written before any work is done; take the place of Lightning's own table."""
        if not trainer.is_global_zero:
            return
        trainer.test_loop.verbose = False
        folder = self.target(trainer).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(folder, os.W_OK)
        except OSError as error:
            raise ValueError(f"Report: cannot create folder {str(folder)!r} for path: {error.strerror}") from error
        if not writable or self.target(trainer).is_dir():
            raise ValueError(f"Report: path {str(self.target(trainer))!r} cannot be written: give a writable file name")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the latent usage on every rank, before the module can reset it."""
        self._usage = metric_result(pl_module, "usage")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table and write the file, on rank zero."""
        if not trainer.is_global_zero:
            return
        self.summary = self._summarise(trainer, pl_module)
        evaluation = next((c for c in trainer.callbacks if isinstance(c, StrategyEvaluation)), None)  # type: ignore[attr-defined]
        generations = [] if evaluation is None else evaluation.controlled or evaluation.samples
        path = self.target(trainer)
        write_json(path, self.summary)
        command = f"tensorboard --logdir {_log_folder(trainer)}"
        print(
            "",
            *table(self.summary),
            *generation_lines(generations, self.num_inputs, self.width),
            f"summary      {path}",
            f"figures      {command}",
            sep="\n",
            flush=True,
        )

    def _summarise(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        summary: dict[str, Any] = {
            name: logged(trainer.callback_metrics, f"test/{key}") for name, key in SUMMARY_KEYS.items()
        }
        data: Any = getattr(trainer, "datamodule", None)
        ceiling = data.alignment_ceiling("test") if hasattr(data, "alignment_ceiling") else None
        summary["alignment_ceiling"] = math.nan if ceiling is None else float(ceiling)
        summary["num_latents"] = int(getattr(pl_module, "num_latents", 0) or 0)
        if math.isnan(summary["final_answer_accuracy"]) and not summary["num_latents"]:
            summary["final_answer_accuracy"] = summary["greedy_final_answer_accuracy"]
        summary["nll_ratio"] = summary["marginal_nll"] / (summary["baseline_nll"] or math.nan)
        summary["usage"] = None if self._usage is None else self._usage["aggregate_posterior"].tolist()
        summary["router_usage"] = None if self._usage is None else self._usage["aggregate_router"].tolist()
        summary["dead_latents"] = dead_latents(self._usage)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in summary.items()}


def table(summary: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table; rows without a value are left out."""

    def ratio(value: Any, ceiling: Any) -> Any:
        return value / ceiling if value is not None and ceiling else None

    get = summary.get
    posterior, posterior_ceiling = get("alignment_one_to_one"), get("alignment_ceiling")
    controlled, controlled_ceiling = get("controlled_alignment_one_to_one"), get("controlled_alignment_ceiling")
    amortized = get("alignment_amortized_one_to_one")
    probe, floor = get("linear_probe_accuracy"), get("linear_probe_floor")
    rows: list[tuple[str, Sequence[Any]]] = [
        ("final-answer accuracy, every latent forced", [get("final_answer_accuracy")]),
        ("final-answer accuracy, router's best, greedy", [get("greedy_final_answer_accuracy")]),
        ("final-answer accuracy, router sampled", [get("sampled_final_answer_accuracy")]),
        ("alignment, posterior", [posterior, posterior_ceiling, ratio(posterior, posterior_ceiling)]),
        ("alignment, posterior network", [amortized, posterior_ceiling, ratio(amortized, posterior_ceiling)]),
        ("linear probe of the posterior means", [probe, posterior_ceiling, ratio(probe, posterior_ceiling)]),
        ("linear probe on permuted labels", [floor]),
        ("alignment, controlled", [controlled, controlled_ceiling, ratio(controlled, controlled_ceiling)]),
        ("alignment, posterior: adjusted mutual information", [get("alignment_ami")]),
        ("strategies reached per input, mean share", [get("local_strategy_coverage_mean")]),
        ("inputs with every strategy reached", [get("local_strategy_full_coverage_rate")]),
        ("distinct outputs among the latents of an input", [get("distinct_fraction")]),
        ("rho_recon (1 = as good as the entangled model)", [get("rho_recon")]),
        ("NLL, marginal over latents (nats per token)", [get("marginal_nll")]),
        ("NLL, entangled model (nats per token)", [get("baseline_nll")]),
        ("NLL, marginal / entangled", [get("nll_ratio")]),
        ("prior KL (nats per example)", [get("prior_kl")]),
        ("active latent dimensions", [get("active_units")]),
        ("latent usage perplexity", [get("usage_perplexity"), get("num_latents")]),
    ]
    if not summary.get("num_latents") and controlled is None:
        rows[0] = ("final-answer accuracy", rows[0][1])
        del rows[1]
    rows = [(name, values) for name, values in rows if values[0] is not None]
    width = max([len(name) for name, _ in rows] + [20])
    lines = [f"{'test split':<{width}}  {'value':>8}  {'ceiling':>8}  {'of it':>8}"]
    lines.append("-" * len(lines[0]))
    for name, values in rows:
        cells = "".join(f"  {'' if v is None else f'{v:.4f}' if isinstance(v, float) else v:>8}" for v in values)
        lines.append(f"{name:<{width}}{cells}".rstrip())
    for name, key in (("posterior", "usage"), ("router", "router_usage")):
        if get(key) is not None:
            shares = "  ".join(f"z{k} {share:.3f}" for k, share in enumerate(summary[key]))
            lines.append(f"{f'latent usage, {name}':<{width}}  {shares}")
    if get("dead_latents"):
        lines.append(f"{'dead latents':<{width}}  {', '.join(f'z{k}' for k in summary['dead_latents'])}")
    return [*lines, ""]


def generation_lines(rows: Sequence[Generation], num_inputs: int, width: int) -> list[str]:
    """Return the generations for the first ``num_inputs`` different x, one line per latent."""
    lines: list[str] = []
    for x in list(dict.fromkeys(g.x for g in rows))[:num_inputs]:
        lines.append(f"x = {_short(x, width)}")
        mine = list(dict.fromkeys(g for g in rows if g.x == x))  # records may share an x
        room = max(len(_short(g.y, width)) for g in mine)
        for g in sorted(mine, key=lambda g: g.k):
            verdict = {None: "", True: "correct", False: "WRONG"}[g.correct]
            latent = f"z{g.k}" if g.k >= 0 else "y"
            line = f"  {latent:<4}{_short(g.y, width):<{room}}  {verdict:<8}{', '.join(g.strategies)}"
            lines.append(line.rstrip())
        lines.append("")
    return lines


def _short(text: str, width: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def _log_folder(trainer: Trainer) -> str:
    """Return the folder to show in TensorBoard: the loggers' common root where there is one, else the root folder."""
    logger = next((logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)
    return str(logger.save_dir if logger is not None else trainer.default_root_dir)
