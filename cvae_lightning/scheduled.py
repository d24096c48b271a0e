"""Values that a schedule has set on a module: how they are set, and how a checkpoint remembers them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

SCHEDULED = "scheduled"
"""Key of a checkpoint: a list of {loss, attribute, value}."""


def set_scheduled(module: nn.Module, loss: str | None, attribute: str | None, value: float) -> None:
    """Set the weight of a loss of the module, or one of its numeric attributes."""
    if loss is not None:
        losses: Any = module.losses
        losses[loss].weight = value
        return
    current = getattr(module, str(attribute))
    if isinstance(current, Tensor):
        with torch.no_grad():
            current.fill_(value)
    else:
        setattr(module, str(attribute), value)


def note_scheduled(module: Any, callbacks: Iterable[Any]) -> list[dict[str, Any]]:
    """Return the values that these callbacks have set on the module, of those that set one."""
    return [callback.scheduled_value(module) for callback in callbacks if hasattr(callback, "scheduled_value")]


def restore_scheduled(module: Any, checkpoint: Mapping[str, Any]) -> list[str]:
    """Set what schedules had set when the checkpoint was saved; what the module does not have is left out.

    Returns:
        What is now another value than the module's arguments say, one text each.
    """
    said = []
    for noted in checkpoint.get(SCHEDULED, ()):
        loss, attribute, value = noted["loss"], noted["attribute"], float(noted["value"])
        if loss is not None:
            if loss in getattr(module, "losses", {}):
                said += _differs(f"the weight of loss {loss!r}", module.losses[loss].weight, value)
                set_scheduled(module, loss, None, value)
        elif isinstance(getattr(module, attribute, None), int | float | Tensor):
            said += _differs(attribute, getattr(module, attribute), value)
            set_scheduled(module, None, attribute, value)
            if attribute in module.hparams:  # what an export says of it
                module.hparams[attribute] = value
    return said


def _differs(what: str, argument: Any, value: float) -> list[str]:
    if abs(float(argument) - value) < 1e-9:
        return []
    return [f"{what} is {value:.6g}, where its schedule had left it; the model's arguments say {argument:.6g}"]
