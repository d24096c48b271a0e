"""Torchmetrics classes: sum-reduced sufficient statistics, exact for uneven batches and under DDP."""

from cvae_lightning.metrics.alignment import StrategyAlignment
from cvae_lightning.metrics.contribution import LossContribution
from cvae_lightning.metrics.controlled import ControlledAlignment
from cvae_lightning.metrics.coverage import LocalStrategyCoverage
from cvae_lightning.metrics.evidence import Evidence
from cvae_lightning.metrics.reconstruction import ReconstructionRatio
from cvae_lightning.metrics.router import RouterCalibration
from cvae_lightning.metrics.usage import LatentUsage
from cvae_lightning.metrics.weighted_means import WeightedMeans

__all__ = [
    "ControlledAlignment",
    "Evidence",
    "LatentUsage",
    "LocalStrategyCoverage",
    "LossContribution",
    "ReconstructionRatio",
    "RouterCalibration",
    "StrategyAlignment",
    "WeightedMeans",
]
