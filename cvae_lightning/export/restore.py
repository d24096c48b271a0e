"""A module from its checkpoint for use alone: weights and shapes, none of the code that a checkpoint may name."""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cvae_lightning.losses import FreeEnergyLoss, LossCallback
from cvae_lightning.modules import ContinuousCVAE, SharedDiscreteCVAE
from cvae_lightning.trust import read_checkpoint, rebuild

KINDS: dict[str, type[SharedDiscreteCVAE] | type[ContinuousCVAE]] = {
    "discrete": SharedDiscreteCVAE,
    "continuous": ContinuousCVAE,
}
TRAINING_STATE = ("losses.", "contributions.", "metrics.", "seeded", "seed_counts", "seed_ways")
"""Beginnings of the names of what a checkpoint holds besides the model."""


@dataclass(frozen=True)
class Restored:
    """What a checkpoint holds.

    Args:
        module: the model, on the CPU.
        kind: ``discrete`` or ``continuous``.
        config: the hyperparameters, without the description of the language model.
        steps: optimizer steps of the training.
        notes: what could not be taken along.
    """

    module: SharedDiscreteCVAE | ContinuousCVAE
    kind: str
    config: dict[str, Any]
    steps: int
    notes: list[str]


def restore(path: str | Path) -> Restored:
    """Return the model of a checkpoint.

    A subclass comes back as the class of this package that it derives from: its own code is not part of a checkpoint.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint of a model with latents.
    """
    source = str(path)
    content = read_checkpoint(path, "cpu")
    state, given = content.get("state_dict"), content.get("hyper_parameters")
    if not isinstance(state, dict) or not isinstance(given, dict):
        raise ValueError(f"cannot read checkpoint {source}: expected hyper_parameters and state_dict as mappings")
    if not any(name.startswith("posterior_network.") for name in state):
        raise ValueError(
            f"{source} holds no model with latents; the folder that an entangled model is trained into is a plain "
            "Hugging Face model already"
        )
    kind = "continuous" if "router_head.weight" in state else "discrete"
    cls, notes = KINDS[kind], []
    own = given.get("_class_path")  # None where the model was built in Python: it may be of any class
    is_ours = str(own).startswith("cvae_lightning.")
    if own is not None and not is_ours:
        notes.append(f"the model was trained as {own}; what that class overrides is code, and is not exported")
    losses: dict[str, LossCallback | None] = {}
    with contextlib.suppress(ValueError):  # a loss of the user's own
        losses = rebuild(given.get("losses"), source) or {}
    losses = losses or {"free_energy_loss": FreeEnergyLoss()}  # losses play no part in using the model
    known = inspect.signature(cls.__init__).parameters.keys() - {"self", "losses", "seeding"}
    arguments = {name: value for name, value in given.items() if name in known}
    if "lora" in arguments:
        arguments["lora"] = rebuild(arguments["lora"], source)
    try:
        module = cls(losses=losses, **arguments)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{source} does not describe a {cls.__name__}: {error}") from error
    module.on_load_checkpoint(content)
    mismatch = module.load_state_dict(
        {name: value for name, value in state.items() if not name.startswith(TRAINING_STATE)}, strict=False
    )
    wrong = [k for k in mismatch.missing_keys if not k.startswith(TRAINING_STATE)]
    if is_ours:
        wrong = [*mismatch.unexpected_keys, *wrong]
    elif mismatch.unexpected_keys:
        listed = ", ".join(mismatch.unexpected_keys[:3]) + (", ..." if mismatch.unexpected_keys[3:] else "")
        notes.append(f"weights that no {cls.__name__} has are left out: {listed}")
    if wrong:
        more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
        raise ValueError(f"{source} does not fit the {cls.__name__} that it describes: {wrong[0]}{more}")
    config = {name: value for name, value in given.items() if name not in ("_instantiator", "entangled")}
    return Restored(module.eval(), kind, config, int(content.get("global_step") or 0), notes)
