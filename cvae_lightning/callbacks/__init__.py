"""Lightning callbacks: schedules, evaluation, TensorBoard, alarms, and what makes runs resumable."""

from cvae_lightning.callbacks.checkpoint_io import AtomicCheckpointIO
from cvae_lightning.callbacks.collapse_alarm import CollapseAlarm, CollapseWarning
from cvae_lightning.callbacks.continuous_evaluation import ContinuousEvaluation
from cvae_lightning.callbacks.epoch_ends import EpochEnds
from cvae_lightning.callbacks.evaluation import Generation, StrategyEvaluation
from cvae_lightning.callbacks.latent_panels import LatentPanels
from cvae_lightning.callbacks.nan_guard import NanGuard
from cvae_lightning.callbacks.partial_gradients import PartialGradients
from cvae_lightning.callbacks.predictions import PredictionWriter
from cvae_lightning.callbacks.report import Report
from cvae_lightning.callbacks.save_at_end import SaveAtEnd
from cvae_lightning.callbacks.save_at_termination import SaveAtTermination
from cvae_lightning.callbacks.schedules import WeightSchedule
from cvae_lightning.callbacks.step_seed import StepSeed
from cvae_lightning.callbacks.tensorboard import TensorBoardFigures

__all__ = [
    "AtomicCheckpointIO",
    "CollapseAlarm",
    "CollapseWarning",
    "ContinuousEvaluation",
    "EpochEnds",
    "Generation",
    "LatentPanels",
    "NanGuard",
    "PartialGradients",
    "PredictionWriter",
    "Report",
    "SaveAtEnd",
    "SaveAtTermination",
    "StepSeed",
    "StrategyEvaluation",
    "TensorBoardFigures",
    "WeightSchedule",
]
