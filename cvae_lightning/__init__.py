"""From an entangled language model p(y|x) to a router p(z|x), a generator p(y|x,z) and a posterior q(z|x,y)."""

from cvae_lightning.losses import LossCallback
from cvae_lightning.modules import CVAEModule, EntangledLM, SharedDiscreteCVAE
from cvae_lightning.outputs import ContinuousOutputs, DiscreteOutputs, PairBatch, Record
from cvae_lightning.template import PromptTemplate

__version__ = "0.1.0"

__all__ = [
    "CVAEModule",
    "ContinuousOutputs",
    "DiscreteOutputs",
    "EntangledLM",
    "LossCallback",
    "PairBatch",
    "PromptTemplate",
    "Record",
    "SharedDiscreteCVAE",
]
