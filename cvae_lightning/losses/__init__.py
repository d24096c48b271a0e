"""One class per term of the objective."""

from cvae_lightning.losses.base import LossCallback
from cvae_lightning.losses.divergence import (
    FreeEnergyLoss,
    InterLatentDivergenceLoss,
    PosteriorDistillationLoss,
    PosteriorEntropyLoss,
    PosteriorVarianceLoss,
    PriorKLLoss,
    RouterSupportLoss,
)
from cvae_lightning.losses.marginal import AggregatePosteriorBalanceLoss, RouterMarginalKLLoss
from cvae_lightning.losses.reconstruction import (
    BaselineNormalizedReconstructionLoss,
    ReconstructionLoss,
    TokenWeightedReconstructionLoss,
)

__all__ = [
    "AggregatePosteriorBalanceLoss",
    "BaselineNormalizedReconstructionLoss",
    "FreeEnergyLoss",
    "InterLatentDivergenceLoss",
    "LossCallback",
    "PosteriorDistillationLoss",
    "PosteriorEntropyLoss",
    "PosteriorVarianceLoss",
    "PriorKLLoss",
    "ReconstructionLoss",
    "RouterMarginalKLLoss",
    "RouterSupportLoss",
    "TokenWeightedReconstructionLoss",
]
