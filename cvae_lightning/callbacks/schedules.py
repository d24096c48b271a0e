"""Schedules of loss weights, as true callbacks that are stateless in ``global_step`` and so resume for free."""

from __future__ import annotations

import math
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from cvae_lightning.progress import steps_of_run
from cvae_lightning.scheduled import set_scheduled

Kind = Literal["constant", "linear", "cosine", "cyclic"]

OPTIMIZER = ("learning_rate", "weight_decay")


def schedule_value(
    step: int,
    kind: Kind,
    start: float,
    end: float,
    begin: float,
    duration: float,
    cycles: int = 1,
    ramp: float = 0.5,
) -> float:
    """Return the value of a schedule at one optimizer step.

    With progress u = (step - begin) / duration, before u = 0 the value is ``start`` and from u = 1 on it is ``end``.
    Between, it is ``end`` (constant), start + (end - start) u (linear), start + (end - start) (1 - cos(pi u)) / 2
    (cosine), or, in each of ``cycles`` equal cycles, a linear rise over the first ``ramp`` of the cycle and then
    ``end`` (cyclic).
    Source: Fu et al. 2019, Eq. 6-7, arXiv:1903.10145, for cyclic; differs by counting steps from 0.

    Args:
        step: optimizer steps done so far, >= 0.
        kind: shape of the curve.
        start: value before the schedule begins.
        end: value that the schedule leads to.
        begin: optimizer steps before the schedule begins.
        duration: optimizer steps that it takes.
        cycles: cyclic only, number of cycles M.
        ramp: cyclic only, rising share R of each cycle, in (0, 1].

    Example:
        >>> [schedule_value(s, "linear", 0.0, 1.0, begin=2, duration=4) for s in (0, 2, 3, 4, 6, 9)]
        [0.0, 0.0, 0.25, 0.5, 1.0, 1.0]
        >>> [schedule_value(s, "cyclic", 0.0, 1.0, begin=0, duration=8, cycles=2) for s in range(9)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 1.0]
    """
    if step < begin:
        return start
    if kind == "constant" or step >= begin + duration:
        return end
    progress = (step - begin) / duration
    if kind == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    elif kind == "cyclic":
        progress = min((progress * cycles) % 1.0 / ramp, 1.0)
    return start + (end - start) * progress


class WeightSchedule(Callback):
    """Sets the weight of one loss, or one attribute of the module, before every training batch.

    Steps are optimizer steps. An integer ``begin`` or ``duration`` counts steps; a float is a fraction of the run. A
    checkpoint remembers the value that it was saved with: evaluation, inference and export use that.

    Args:
        loss: name of a term in the module's ``losses``; its ``weight`` is scheduled.
        attribute: instead of a loss, a numeric attribute of the module, such as ``posterior_temperature``.
        kind: ``constant`` (a step from start to end at ``begin``), ``linear``, ``cosine`` or ``cyclic``.
        start: value before the schedule begins.
        end: value from ``begin + duration`` on.
        begin: when it begins; optimizer steps (int, >= 0) or fraction of the run (float in [0, 1]).
        duration: how long it takes; optimizer steps (int, >= 0) or fraction of the run (float in [0, 1]).
        cycles: cyclic only: number of cycles within ``duration``.
        ramp: cyclic only: rising share of each cycle, in (0, 1]; the rest stays at ``end``.

    Raises:
        ValueError: if an argument is out of range, or the module has no such loss or attribute.
    """

    def __init__(
        self,
        loss: str | None = None,
        attribute: str | None = None,
        kind: Kind = "linear",
        start: float = 0.0,
        end: float = 1.0,
        begin: int | float = 0,
        duration: int | float = 1.0,
        cycles: int = 4,
        ramp: float = 0.5,
    ) -> None:
        if (loss is None) == (attribute is None):
            raise ValueError(f"WeightSchedule needs either `loss` or `attribute`, got {loss=}, {attribute=}")
        if kind not in ("constant", "linear", "cosine", "cyclic"):
            raise ValueError(f"WeightSchedule kind must be constant, linear, cosine or cyclic, got {kind!r}")
        for name, value in (("begin", begin), ("duration", duration)):
            if value < 0 or (isinstance(value, float) and value > 1):
                raise ValueError(
                    f"WeightSchedule {name} must be a number of optimizer steps (int >= 0) or a fraction of the run "
                    f"(float in [0, 1]), got {value}"
                )
        if cycles < 1 or not 0 < ramp <= 1:
            raise ValueError(f"WeightSchedule needs cycles >= 1 and 0 < ramp <= 1, got {cycles=}, {ramp=}")
        self.loss = loss
        self.attribute = attribute
        self.kind: Kind = kind
        self.start = float(start)
        self.end = float(end)
        self.begin = begin
        self.duration = duration
        self.cycles = cycles
        self.ramp = ramp
        self._begin_steps = 0.0
        self._duration_steps = 0.0

    def value(self, step: int) -> float:
        """Return the scheduled value at this optimizer step; fractions are resolved when fit starts."""
        return schedule_value(
            step, self.kind, self.start, self.end, self._begin_steps, self._duration_steps, self.cycles, self.ramp
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resolve fractions, check the name, and warn if the run stops before ``end`` is reached."""
        total = steps_of_run(trainer)
        self._check_target(pl_module)
        self._begin_steps = self._in_steps(self.begin, total)
        self._duration_steps = self._in_steps(self.duration, total)
        rise = {"constant": 0.0, "cyclic": self._duration_steps * self.ramp / self.cycles}
        reached = self._begin_steps + rise.get(self.kind, self._duration_steps)
        if reached > total:
            rank_zero_warn(
                f"the schedule of {self._target} reaches {self.end} at optimizer step {math.ceil(reached)}, but the "
                f"run ends at step {int(total)}, at {self.value(int(total) - 1):.4g}: shorten `begin` or `duration`, "
                "or train longer"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the value that belongs to ``global_step``."""
        set_scheduled(pl_module, self.loss, self.attribute, self.value(trainer.global_step))

    def scheduled_value(self, pl_module: Any) -> dict[str, Any]:
        """Return the value that training left, which the arguments of the module do not say, for its checkpoint."""
        value = getattr(pl_module, str(self.attribute)) if self.loss is None else pl_module.losses[self.loss].weight
        return {"loss": self.loss, "attribute": self.attribute, "value": float(value)}

    @property
    def _target(self) -> str:
        return f"loss {self.loss!r}" if self.loss is not None else f"attribute {self.attribute!r}"

    def _check_target(self, pl_module: LightningModule) -> None:
        if self.attribute in OPTIMIZER:
            raise ValueError(
                f"WeightSchedule: the optimizer has a copy of {self.attribute!r}, which a schedule of the attribute "
                "would not reach: use the module's own warmup_steps, or override configure_optimizers"
            )
        if self.loss is not None:
            names = sorted(getattr(pl_module, "losses", {}))
            if self.loss not in names:
                raise ValueError(f"WeightSchedule: no loss named {self.loss!r}; the module has {', '.join(names)}")
        elif not isinstance(getattr(pl_module, str(self.attribute), None), int | float | Tensor):
            raise ValueError(
                f"WeightSchedule: {type(pl_module).__name__} has no numeric attribute {self.attribute!r} to schedule"
            )

    @staticmethod
    def _in_steps(value: int | float, total: int | float) -> float:
        if isinstance(value, int):
            return float(value)
        if not 0 < total < math.inf:
            raise ValueError(
                "WeightSchedule: a fraction of the run needs a run of known length: set trainer.max_steps or "
                "trainer.max_epochs, or give `begin` and `duration` as a number of optimizer steps (int)"
            )
        return value * total
