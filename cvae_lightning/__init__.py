"""From an entangled language model p(y|x) to a router p(z|x), a generator p(y|x,z) and a posterior q(z|x,y)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cvae_lightning.export.loading import load_export
    from cvae_lightning.losses import LossCallback
    from cvae_lightning.modules import ContinuousCVAE, CVAEModule, EntangledLM, LatentSeeding, LoRA, SharedDiscreteCVAE
    from cvae_lightning.outputs import ContinuousOutputs, DiscreteOutputs, PairBatch, Record
    from cvae_lightning.template import PromptTemplate

__version__ = "0.1.0"

__all__ = [
    "CVAEModule",
    "ContinuousCVAE",
    "ContinuousOutputs",
    "DiscreteOutputs",
    "EntangledLM",
    "LatentSeeding",
    "LoRA",
    "LossCallback",
    "PairBatch",
    "PromptTemplate",
    "Record",
    "SharedDiscreteCVAE",
    "load_export",
]

_HOME = {"LossCallback": "losses", "PromptTemplate": "template", "load_export": "export.loading"}
_HOME |= dict.fromkeys(
    ("CVAEModule", "ContinuousCVAE", "EntangledLM", "LatentSeeding", "LoRA", "SharedDiscreteCVAE"), "modules"
)
_HOME |= dict.fromkeys(("ContinuousOutputs", "DiscreteOutputs", "PairBatch", "Record"), "outputs")


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that light commands do not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
