"""What a continuous latent looks like, in TensorBoard: scatter, projector, traversals, router marginal, terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from cvae_lightning.callbacks import figures, latent_figures
from cvae_lightning.callbacks.continuous_evaluation import ContinuousEvaluation
from cvae_lightning.callbacks.epoch_results import logged, metric_result
from cvae_lightning.callbacks.evaluation import undisturbed
from cvae_lightning.callbacks.examples import different_inputs
from cvae_lightning.callbacks.tensorboard import escape_cell, tensorboard_writer


class LatentPanels(Callback):
    """Shows a continuous latent in TensorBoard, after every evaluation of :class:`ContinuousEvaluation`.

    Put it behind that callback. Figures under ``{stage}/figures/``: ``latent_scatter`` (posterior and router means, by
    strategy, with the clusters' centroids and their way so far), ``router_marginal`` (against N(0, I)),
    ``centroid_distances`` and ``alignment_clusters``. Texts: ``{stage}/latent/traversal`` (greedy outputs while one
    dimension moves) and ``{stage}/latent/terms`` (each term's raw value, weight, and whether it acts or is only a
    diagnostic). When a fit or a test ends, the posterior means go to the projector. Needs a ``TensorBoardLogger``;
    with any other logger it does nothing.

    Args:
        num_inputs: inputs in the traversal.
        num_steps: values of the moved dimension, evenly spaced over ``reach`` standard deviations about the mean.
        reach: half width of a traversal, in standard deviations of the posterior means.
        max_dimensions: dimensions in the traversal, those that vary most first.
        max_points: points in the projector and the scatter.

    Raises:
        ValueError: if a number is not positive, or ``num_steps`` is below 2.
    """

    def __init__(
        self,
        num_inputs: int = 2,
        num_steps: int = 5,
        reach: float = 1.5,
        max_dimensions: int = 4,
        max_points: int = 1000,
    ) -> None:
        for name, value, least in (
            ("num_inputs", num_inputs, 1),
            ("num_steps", num_steps, 2),
            ("max_dimensions", max_dimensions, 1),
            ("max_points", max_points, 1),
        ):
            if value < least:
                raise ValueError(f"LatentPanels: {name} must be at least {least}, got {value}")
        if reach <= 0:
            raise ValueError(f"LatentPanels: reach must be positive, got {reach}")
        self.num_inputs = num_inputs
        self.num_steps = num_steps
        self.reach = reach
        self.max_dimensions = max_dimensions
        self.max_points = max_points
        self.centroids: list[list[list[float]]] = []
        """Centroids [K, D] of every validation of the fit."""
        self._moments: dict[str, Tensor] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the centroids' way so far."""
        return {"centroids": self.centroids}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the centroids' way."""
        self.centroids = state_dict["centroids"]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the module's metrics on every rank, before the module resets them."""
        self._moments = metric_result(pl_module, "moments")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the module's metrics on every rank, before the module resets them."""
        self._moments = metric_result(pl_module, "moments")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write figures and texts; never in the sanity check."""
        if trainer.sanity_checking:
            return
        evaluation = _evaluation(trainer)
        if (
            trainer.state.fn == "fit"
            and evaluation is not None
            and evaluation.is_fresh
            and evaluation.clusters is not None
        ):
            self.centroids = [*self.centroids, evaluation.clusters.centroids.tolist()]
        self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write figures, texts and the projector's points of the test split."""
        self._write(trainer, pl_module, "test")
        self._project(trainer, "test")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the projector's points of the last validation."""
        self._project(trainer, "val")

    def _write(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        writer, evaluation = tensorboard_writer(trainer), _evaluation(trainer)
        if writer is None:
            return
        step = trainer.global_step
        writer.add_text(f"{stage}/latent/terms", terms_table(pl_module.losses, trainer.callback_metrics, stage), step)
        if evaluation is None or not evaluation.is_fresh or evaluation.points is None:
            return
        names = list(getattr(trainer.datamodule, "strategy_names", None) or [])  # type: ignore[attr-defined]
        points = {key: value[: self.max_points] for key, value in evaluation.points.items()}
        drawn = {}
        if bool(points["posterior_mean"].isfinite().all()):
            way = self.centroids if stage == "val" else []
            if evaluation.clusters is not None and not way:
                way = [evaluation.clusters.centroids.tolist()]
            drawn["latent_scatter"] = latent_figures.latent_scatter(
                points["posterior_mean"],
                points["router_mean"],
                points["strategy"].tolist(),
                names,
                way,
                f"latents at step {step} ({stage})",
            )
        if self._moments is not None:
            mean, variance = (self._moments[name].cpu().reshape(-1) for name in ("router_mean", "router_variance"))
            drawn["router_marginal"] = latent_figures.router_marginal(mean, variance, points["router_mean"])
        if evaluation.clusters is not None:
            distances, _ = evaluation.clusters.separation(evaluation.points["posterior_mean"])
            drawn["centroid_distances"] = latent_figures.centroid_distances(distances)
        if evaluation.contingency is not None:
            score = evaluation.scores.get("alignment/one_to_one")
            title = f"cluster of the posterior mean × strategy ({stage})"
            drawn["alignment_clusters"] = figures.latent_strategy_heatmap(evaluation.contingency, names, title, score)
        for name, figure in drawn.items():
            writer.add_figure(f"{stage}/figures/{name}", figure, step)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if hasattr(data, "records"):  # ContinuousEvaluation has said what is lacking where it has not
            xs = [record.x for record in different_inputs(data, stage, self.num_inputs)]
            with undisturbed(pl_module):
                text = self.traversal(pl_module, xs, evaluation.points["posterior_mean"])
            writer.add_text(f"{stage}/latent/traversal", text, step)
        writer.flush()

    def traversal(self, pl_module: Any, xs: list[str], points: Tensor) -> str:
        """Return a Markdown table of greedy outputs for each x: one dimension moves, the others stay at their mean."""
        mean, deviation = points.mean(0), points.std(0, correction=0)
        moved = deviation.argsort(descending=True)[: self.max_dimensions].tolist()
        offsets = torch.linspace(-self.reach, self.reach, self.num_steps)
        rows = [(x, d, float(mean[d] + t * deviation[d])) for x in xs for d in moved for t in offsets.tolist()]
        z = mean.repeat(len(rows), 1)
        for i, (_, d, value) in enumerate(rows):
            z[i, d] = value
        ys = pl_module.generate([x for x, _, _ in rows], z)
        lines = ["| x | dimension | value | y |", "|---|---|---|---|"]
        for (x, d, value), y in zip(rows, ys, strict=True):
            lines.append(f"| {escape_cell(x)} | d{d} | {value:.2f} | {escape_cell(y)} |")
        return "\n".join(lines)

    def _project(self, trainer: Trainer, stage: str) -> None:
        writer, evaluation = tensorboard_writer(trainer), _evaluation(trainer)
        if writer is None or evaluation is None or evaluation.points is None:
            return
        names = list(getattr(trainer.datamodule, "strategy_names", None) or [])  # type: ignore[attr-defined]
        points = {key: value[: self.max_points] for key, value in evaluation.points.items()}
        rows = [
            [names[s] if 0 <= s < len(names) else "unknown", str(i)]
            for s, i in zip(points["strategy"].tolist(), points["index"].tolist(), strict=True)
        ]
        if len(rows):
            means = points["posterior_mean"]
            writer.add_embedding(
                torch.nn.functional.pad(means, (0, max(0, 3 - means.shape[1]))),  # the projector draws nothing in 2-D
                metadata=rows,
                metadata_header=["strategy", "record"],
                global_step=trainer.global_step,
                tag=f"{stage}/posterior_mean",
            )
            writer.flush()


def terms_table(losses: Any, metrics: Mapping[str, Any], stage: str) -> str:
    """Return a Markdown table of every term: raw value, weight, whether it acts, and its share of the objective."""
    lines = ["| term | raw value | weight | state | share |", "|---|---|---|---|---|"]
    for name, loss in losses.items():
        state = "diagnostic only" if loss.weight == 0 else "active"
        raw, share = (logged(metrics, f"{stage}/{part}{name}") for part in ("", "loss_contrib/fraction_abs/"))
        lines.append(f"| {escape_cell(name)} | {raw:.5g} | {loss.weight:.5g} | {state} | {share:.3f} |")
    return "\n".join(lines)


def _evaluation(trainer: Trainer) -> ContinuousEvaluation | None:
    return next((c for c in trainer.callbacks if isinstance(c, ContinuousEvaluation)), None)  # type: ignore[attr-defined]
