"""The LightningCLI behind ``cvae-lightning fit|validate|test|predict``: what it adds, and what it sets by default."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

import cvae_lightning.callbacks
import cvae_lightning.data
import cvae_lightning.losses
import cvae_lightning.modules
from cvae_lightning.callbacks.checkpoint_io import AtomicCheckpointIO
from cvae_lightning.callbacks.checkpoint_step import CheckpointStep
from cvae_lightning.callbacks.epoch_ends import EpochEnds
from cvae_lightning.callbacks.nan_guard import NanGuard
from cvae_lightning.callbacks.partial_gradients import PartialGradients
from cvae_lightning.callbacks.predictions import PredictionWriter
from cvae_lightning.callbacks.save_at_end import SaveAtEnd
from cvae_lightning.callbacks.save_at_termination import SaveAtTermination
from cvae_lightning.callbacks.step_seed import StepSeed
from cvae_lightning.config_merge import MergeConfig, rewrite_nulls
from cvae_lightning.data import SelfGeneration, tasks
from cvae_lightning.data.tasks.base import Task
from cvae_lightning.entangle_first import train_entangled_first
from cvae_lightning.losses.base import LossCallback
from cvae_lightning.modules import CVAEModule, EntangledLM
from cvae_lightning.modules.lora import LoRA
from cvae_lightning.modules.seeding import LatentSeeding
from cvae_lightning.option_errors import condense, explain


class CVAELightningCLI(LightningCLI):
    """LightningCLI with recipes by name, losses merged by name, and runs that resume exactly.

    Always present and configurable: ``checkpoint`` (ModelCheckpoint with ``last.ckpt``), ``step_seed``, ``nan_guard``,
    ``partial_gradients``, ``epoch_ends``, ``save_at_termination``, ``save_at_end``, ``checkpoint_step`` and
    ``predictions``. ``trainer.plugins`` holds AtomicCheckpointIO unless given. All files of a run lie in
    ``trainer.default_root_dir``, unless ``checkpoint.dirpath`` or the path of a callback names another folder, as the
    shipped recipes do. The config always beats the hyperparameters that a checkpoint remembers.
    """

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Build a parser that raises its errors, with the merging ``--config``."""
        kwargs.setdefault("exit_on_error", False)
        kwargs.setdefault("dump_header", ["cvae_lightning"])
        parser = self.parser_class(**kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action=MergeConfig,
            help="YAML file, or name of a shipped recipe; repeatable: later files win, `losses` merge by name.",
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks that every run has, and their defaults."""
        parser.add_argument(
            "--entangled_config",
            type=str | None,
            default=None,
            help="Recipe or file that trains the entangled model; `fit` runs it first, on the same data, if "
            "`model.entangled` is the folder that it writes and holds no trained model yet.",
        )
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(StepSeed, "step_seed")
        parser.add_lightning_class_args(NanGuard, "nan_guard")
        parser.add_lightning_class_args(PartialGradients, "partial_gradients")
        parser.add_lightning_class_args(EpochEnds, "epoch_ends")
        parser.add_lightning_class_args(SaveAtTermination, "save_at_termination")
        parser.add_lightning_class_args(SaveAtEnd, "save_at_end")
        parser.add_lightning_class_args(CheckpointStep, "checkpoint_step")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        plugin = f"{AtomicCheckpointIO.__module__}.{AtomicCheckpointIO.__qualname__}"
        parser.set_defaults(
            {
                "checkpoint.save_last": True,
                "checkpoint.enable_version_counter": False,
                "trainer.plugins": [{"class_path": plugin}],
                "trainer.default_root_dir": "runs/unnamed",
            }
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands, without the option to load pickled objects from checkpoints."""
        return {name: skip | {"weights_only"} for name, skip in LightningCLI.subcommands().items()}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and explain what could not be parsed."""
        try:
            self.config = parser.parse_args(rewrite_nulls(sys.argv[1:] if args is None else list(args)))
        except argparse.ArgumentError as error:
            raise ValueError(explain(str(error), self._subcommand_parsers["fit"])) from error

    def _parse_ckpt_path(self) -> None:
        """Leave the config alone: it beats the hyperparameters stored in ``--ckpt_path``."""

    def before_instantiate_classes(self) -> None:
        """Check the output folders before anything is built, and keep the config of each subcommand apart."""
        trainer = self._get(self.config, "trainer")
        checkpoint, model = self._get(self.config, "checkpoint"), self._get(self.config, "model")
        if not trainer.get("default_root_dir"):
            raise ValueError(
                "trainer.default_root_dir: expected the folder of the run's files, got null; give one, or leave the "
                "option out for runs/unnamed"
            )
        output_dir = model.get("init_args.output_dir")
        for folder in filter(None, (trainer.get("default_root_dir"), checkpoint.get("dirpath"), output_dir)):
            check_writable(folder)
        recipe = self._get(self.config, "entangled_config")
        if self.subcommand == "fit" and recipe:
            self._dump_config()
            train_entangled_first(recipe, self.config_dump)
        if self.subcommand != "fit":
            self.save_config_kwargs["config_filename"] = f"config_{self.subcommand}.yaml"

    def before_test(self) -> None:
        """Refuse to test a model that has not been trained."""
        self._check_is_trained()

    def before_predict(self) -> None:
        """Refuse a model that has not been trained; keep no prediction in memory: PredictionWriter writes them all."""
        self._check_is_trained()
        self.config_init["predict"]["return_predictions"] = False

    def _check_is_trained(self) -> None:
        """Raise if the model is new and no checkpoint is given, or ``last`` where there is none.

        Raises:
            ValueError: naming the checkpoint that is probably meant.
        """
        given, model = self.config_init[self.subcommand].get("ckpt_path"), self.model
        is_new = isinstance(model, CVAEModule) or (isinstance(model, EntangledLM) and model.lm is None)
        if not is_new or model.from_checkpoint or given not in (None, "last"):
            return
        saving = [c for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        if given == "last" and any(c._find_last_checkpoints(self.trainer) for c in saving):
            return
        folder = next((c.dirpath for c in saving if c.dirpath), Path(self.trainer.default_root_dir) / "checkpoints")
        with contextlib.suppress(ValueError):
            folder = Path(folder).relative_to(Path.cwd())
        meant = Path(folder) / "last.ckpt"
        known = f"--ckpt_path {meant}" + ("" if meant.exists() else ", once `fit` has written it")
        raise ValueError(
            f"{self.subcommand} would use a {type(model).__name__} that has not been trained: expected a checkpoint, "
            f"got --ckpt_path {given or 'null'}; give {known}"
        )

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; an error in a constructor comes without jsonargparse's wrapping."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise ValueError(condense(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer; unless a logger is given, TensorBoard writes into ``default_root_dir`` itself."""
        config = self._get(self.config_init, "trainer")
        if config.get("logger") is None or config.get("logger") is True:
            folder = config["default_root_dir"]
            kwargs["logger"] = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
        checkpoint = self._get(self.config_init, "checkpoint")
        if (
            isinstance(checkpoint, ModelCheckpoint)
            and checkpoint.dirpath is None
            and "://" not in str(config["default_root_dir"])
        ):  # not beside a logger's files, whose folder may be another one for every run
            checkpoint.dirpath = str(Path(config["default_root_dir"]) / "checkpoints")
        keys = self._parser(self.subcommand).callback_keys
        if config.get("enable_checkpointing") is False and "checkpoint" in keys:
            keys.remove("checkpoint")
        return super().instantiate_trainer(**kwargs)


def check_writable(folder: str | Path) -> None:
    """Raise if files cannot be written in this folder, without creating it.

    Raises:
        OSError: naming the folder and the reason.
    """
    target = Path(folder)
    if "://" in str(folder):
        return
    try:
        existing = next(path for path in (target, *target.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot write to the output folder {target}: {reason}") from error


def class_help() -> str:
    """Return the options of every shipped model, data module, task, loss and callback, and of what they are made of."""
    sections = []
    for title, package, base in (
        ("models (model.class_path)", cvae_lightning.modules, LightningModule),
        (
            "where the latents of a discrete model begin (model.init_args.seeding)",
            cvae_lightning.modules,
            LatentSeeding,
        ),
        ("low-rank adaptation (model.init_args.lora)", cvae_lightning.modules, LoRA),
        ("data modules (data.class_path)", cvae_lightning.data, LightningDataModule),
        ("tasks (data.init_args.task)", tasks, Task),
        ("solutions that are drawn (data.init_args.self_generated)", cvae_lightning.data, SelfGeneration),
        ("losses (model.init_args.losses.<name>.class_path)", cvae_lightning.losses, LossCallback),
        ("callbacks (trainer.callbacks)", cvae_lightning.callbacks, Callback),
    ):
        classes = [c for _, c in sorted(vars(package).items()) if isinstance(c, type) and issubclass(c, base)]
        for cls in classes:
            if getattr(cls, "__abstractmethods__", None):
                continue
            parser = ArgumentParser(prog=cls.__name__, usage=argparse.SUPPRESS, add_help=False)
            parser.add_class_arguments(cls, "init_args", fail_untyped=False)
            sections.append(f"\n=== {title}: {package.__name__}.{cls.__name__}\n{parser.format_help()}")
    return "".join(sections)


def quieten() -> None:
    """Leave out what the libraries say to their own developers, their advertisements, and bars of tiny files."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    tips = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    tips.addFilter(lambda record: "litlogger" not in record.getMessage())


def run(args: list[str] | None = None) -> None:
    """Parse the command line and run the subcommand."""
    quieten()
    try:
        CVAELightningCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=1,
            save_config_kwargs={"overwrite": True},
            args=args,
        )
    except SystemExit:
        words = sys.argv[1:] if args is None else args
        if "-h" in words or "--help" in words:
            with contextlib.suppress(BrokenPipeError):
                print(class_help())
        raise
