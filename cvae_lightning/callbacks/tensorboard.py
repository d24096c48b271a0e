"""Pictures, texts and hyperparameters in TensorBoard."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from torch import Tensor

from cvae_lightning.callbacks import figures
from cvae_lightning.callbacks.dashboard import CONTRIBUTION, FINAL_METRICS, hyperparameter_summaries, layout
from cvae_lightning.callbacks.epoch_results import contingency, dead_below, logged, metric_result
from cvae_lightning.callbacks.evaluation import Generation, StrategyEvaluation


class TensorBoardFigures(Callback):
    """Draws what scalars cannot show, at the end of every validation and test; needs a ``TensorBoardLogger``.

    Figures under ``{stage}/figures/``: ``alignment_posterior``, ``alignment_controlled``, ``latent_usage``,
    ``token_strip``, ``latent_distance`` and, during a fit, ``loss_contributions``. Text under
    ``{stage}/generations/``: ``controlled`` and ``sampled``. Where a fit starts, ``train/figures/seeds`` of a module
    that seeds its latents, and a custom-scalars layout; where it ends, the hyperparameters with the final metrics (give
    the logger ``default_hp_metric: false``, or TensorBoard keeps its placeholder metric). With any other logger it does
    nothing.

    Args:
        num_sequences: sequences in the token strip.
        num_inputs: inputs whose generations are written as text.
        max_tokens: tokens of a sequence drawn in the token strip.

    Raises:
        ValueError: if an argument is below 1.
    """

    def __init__(self, num_sequences: int = 3, num_inputs: int = 4, max_tokens: int = 40) -> None:
        for name, value in (("num_sequences", num_sequences), ("num_inputs", num_inputs), ("max_tokens", max_tokens)):
            if value < 1:
                raise ValueError(f"TensorBoardFigures: {name} must be at least 1, got {value}")
        self.num_sequences = num_sequences
        self.num_inputs = num_inputs
        self.max_tokens = max_tokens
        self.steps: list[int] = []
        """Optimizer steps at which contributions were recorded."""
        self.contributions: dict[str, list[float]] = {}
        """One value per step and loss term."""
        self._usage: dict[str, Tensor] | None = None
        self._table: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the history of the loss contributions, so that a resumed run draws all of it."""
        return {"steps": self.steps, "contributions": self.contributions}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history of the loss contributions."""
        self.steps, self.contributions = state_dict["steps"], state_dict["contributions"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the custom-scalars layout."""
        if (writer := tensorboard_writer(trainer)) is not None:
            writer.add_custom_scalars(layout(bool(getattr(pl_module, "num_latents", 0))))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the seeds of the latents, once; ``on_train_start`` of the module, where they are sown, comes before."""
        writer, seeding = tensorboard_writer(trainer), cast(Any, getattr(pl_module, "seeding", None))
        points = getattr(seeding, "points", None)
        if writer is not None and points is not None and trainer.global_step == 0:
            writer.add_figure("train/figures/seeds", figures.seed_scatter(points, seeding.clusters), 0)
            writer.flush()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the module's metrics on every rank, before the module can reset them."""
        self._usage, self._table = metric_result(pl_module, "usage"), contingency(pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the module's metrics on every rank, before the module can reset them."""
        self.on_validation_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write figures and texts; never in the sanity check."""
        if trainer.sanity_checking:
            return
        if trainer.state.fn == "fit":
            self._record_contributions(trainer)
        self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write figures and texts of the test split."""
        self._write(trainer, pl_module, "test")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the hyperparameters, and which scalars stand beside them: TensorBoard takes their last value."""
        writer = tensorboard_writer(trainer)
        final = [key for key in FINAL_METRICS if not math.isnan(logged(trainer.callback_metrics, key))]
        if writer is not None and final:
            for summary in hyperparameter_summaries(pl_module.hparams, final):
                writer._get_file_writer().add_summary(summary, trainer.global_step)

    def _record_contributions(self, trainer: Trainer) -> None:
        metrics = trainer.callback_metrics
        stage = "train/" if any(key.startswith(f"train/{CONTRIBUTION}") for key in metrics) else "val/"
        prefix = stage + CONTRIBUTION
        now = {k.removeprefix(prefix): float(v) for k, v in metrics.items() if k.startswith(prefix)}
        if not now:
            return
        for name in {**self.contributions, **now}:  # a term may come late: it contributed nothing before
            past = self.contributions.get(name, [0.0] * len(self.steps))
            self.contributions[name] = [*past, now.get(name, 0.0)]
        self.steps = [*self.steps, trainer.global_step]

    def _write(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        writer = tensorboard_writer(trainer)
        if writer is None:
            return
        evaluation = find_evaluation(trainer)
        if evaluation is not None and not evaluation.is_fresh:
            evaluation = None
        drawn = self._figures(trainer, pl_module, stage, evaluation)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # texts may hold any character
            for name, figure in drawn.items():
                writer.add_figure(f"{stage}/figures/{name}", figure, trainer.global_step)
        tables = {} if evaluation is None else {"controlled": evaluation.controlled, "sampled": evaluation.samples}
        for name, rows in tables.items():
            if rows:
                text = generation_table(rows, self.num_inputs)
                writer.add_text(f"{stage}/generations/{name}", text, trainer.global_step)
        writer.flush()

    def _figures(
        self, trainer: Trainer, pl_module: Any, stage: str, evaluation: StrategyEvaluation | None
    ) -> dict[str, Figure]:
        data: Any = getattr(trainer, "datamodule", None)
        names = list(getattr(data, "strategy_names", None) or [])
        drawn: dict[str, Figure] = {}
        if self._table is not None:
            drawn["alignment_posterior"] = figures.latent_strategy_heatmap(
                self._table,
                names or [str(s) for s in range(self._table.shape[1])],
                f"posterior argmax × strategy ({stage})",
                _known(logged(trainer.callback_metrics, f"{stage}/alignment/one_to_one")),
                data.alignment_ceiling(stage) if hasattr(data, "alignment_ceiling") else None,
            )
        if self._usage is not None:
            router, posterior = self._usage["aggregate_router"].cpu(), self._usage["aggregate_posterior"].cpu()
            drawn["latent_usage"] = figures.usage_bars(
                router, posterior, dead_below(len(router)), f"latent usage ({stage})"
            )
        if evaluation is not None and evaluation.matrix is not None:
            drawn["alignment_controlled"] = figures.latent_strategy_heatmap(
                evaluation.matrix,
                data.task.strategies,
                f"forced latent × strategy of its generations ({stage})",
                evaluation.scores["controlled/alignment_one_to_one"],
                evaluation.scores["controlled/alignment_ceiling"],
            )
        if evaluation is not None and evaluation.distance is not None:
            drawn["latent_distance"] = figures.latent_distance_heatmap(evaluation.distance)
        strip = self._token_strip(pl_module, names)
        if strip is not None:
            drawn["token_strip"] = strip
        if stage == "val" and self.steps:
            drawn["loss_contributions"] = figures.loss_contribution_stack(self.steps, self.contributions)
        return drawn

    def _token_strip(self, pl_module: Any, names: Sequence[str]) -> Figure | None:
        last = getattr(pl_module, "last_outputs", None)
        if not last:
            return None
        batch, outputs = last["batch"], last["outputs"]
        shown = range(min(self.num_sequences, len(batch)))
        lengths = [int(batch.y_mask[i].sum()) for i in shown]
        tokenizer = pl_module.template.tokenizer

        def rows(values: Tensor | None) -> list[Any] | None:
            if values is None:
                return None
            return [values[i, ..., :n].detach().float().cpu() for i, n in zip(shown, lengths, strict=True)]

        def heading(i: int) -> str:
            strategy = int(batch.strategy[i])
            label = f"   ({names[strategy]})" if 0 <= strategy < len(names) else ""
            return f"x = {batch.x[i]}{label}"

        return figures.token_weight_strip(
            [tokenizer.convert_ids_to_tokens(batch.y_ids[i, :n].tolist()) for i, n in zip(shown, lengths, strict=True)],
            rows(outputs.token_nll) or [],
            rows(outputs.baseline_nll),
            rows(outputs.inter_latent_jsd),
            [heading(i) for i in shown],
            self.max_tokens,
        )


def generation_table(rows: Sequence[Generation], num_inputs: int) -> str:
    """Return a Markdown table of the generations for the first ``num_inputs`` different x."""
    inputs = list(dict.fromkeys(g.x for g in rows))[:num_inputs]
    lines = ["| x | z | y | correct | strategy |", "|---|---|---|---|---|"]
    for x in inputs:
        for g in sorted({g for g in rows if g.x == x}, key=lambda g: (g.k, g.y)):  # records may share an x
            correct = {None: "", True: "yes", False: "**no**"}[g.correct]
            latent = "" if g.k < 0 else f"z{g.k}"
            cells = (escape_cell(x), latent, escape_cell(g.y), correct, escape_cell(", ".join(g.strategies)))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def find_evaluation(trainer: Trainer) -> StrategyEvaluation | None:
    """Return the trainer's evaluation callback, if there is one."""
    return next((c for c in trainer.callbacks if isinstance(c, StrategyEvaluation)), None)  # type: ignore[attr-defined]


def escape_cell(text: str) -> str:
    """Return ``text`` as literal text of a Markdown table cell."""
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"&#{ord(c)};" if c in "|\\`*_[]~" else c for c in flat)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _logger(trainer: Trainer) -> TensorBoardLogger | None:
    if not trainer.is_global_zero:
        return None
    return next((logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)


def tensorboard_writer(trainer: Trainer) -> Any:
    """Return the writer of the trainer's TensorBoard logger; None without one, and on other ranks than zero."""
    logger = _logger(trainer)
    return None if logger is None else logger.experiment
