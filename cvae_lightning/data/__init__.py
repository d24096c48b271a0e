"""Data modules: synthetic tasks with verifiers, and the user's own pairs of texts."""

from cvae_lightning.data.base import RecordDataModule
from cvae_lightning.data.loader import EpochSampler, ResumableLoader
from cvae_lightning.data.pairs import PairsDataModule
from cvae_lightning.data.self_generated import SelfGeneration
from cvae_lightning.data.synthetic import SyntheticDataModule

__all__ = [
    "EpochSampler",
    "PairsDataModule",
    "RecordDataModule",
    "ResumableLoader",
    "SelfGeneration",
    "SyntheticDataModule",
]
