"""Entry point ``cvae-lightning``. Heavy packages are imported only by the commands that need them."""

from __future__ import annotations

import argparse
import os
import pickle
import select
import signal
import sys
from collections.abc import Sequence

from cvae_lightning.launch import said_once, world_size
from cvae_lightning.recipes import describe, find_recipe, recipe_folder, recipe_names

USAGE = """\
usage: cvae-lightning COMMAND [options]

  fit         train:     cvae-lightning fit --config RECIPE_OR_FILE [--config MORE] [--model.init_args.NAME VALUE ...]
  validate    evaluate on the validation split:  cvae-lightning validate --config ... --ckpt_path FILE
  test        evaluate on the test split:        cvae-lightning test --config ... --ckpt_path FILE
  predict     predict:                           cvae-lightning predict --config ... --ckpt_path FILE
  export      write a checkpoint as a Hugging Face folder: cvae-lightning export --ckpt FILE --out DIR
  recipes     list the shipped recipes, or print one:  cvae-lightning recipes [NAME]
  quickstart  train and evaluate a small example from end to end (a few minutes on two CPU cores)
  benchmark   compare recipes over tasks and seeds: cvae-lightning benchmark --config NAME_OR_FILE [--smoke] [--list]
  sweep       search for a recipe's options:     cvae-lightning sweep --config NAME_OR_FILE [--trials N]

`cvae-lightning COMMAND --help` documents every option. Set CVAE_LIGHTNING_TRACEBACK=1 to see where an error came from.
"""
TRAINING = ("fit", "validate", "test", "predict")
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "NCCL communicator was aborted")
"""What gloo and NCCL say when the process at the other end is gone."""


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; what a user got wrong ends in one message on stderr.

    Of several processes that were launched together and meet the same error, one shows it.

    Args:
        args: the words after ``cvae-lightning``; None takes them from ``sys.argv``.
    """
    words = list(sys.argv[1:] if args is None else args)
    try:
        code = _exit_code(words)
        if sys.stdout is not None:  # it is None where it was closed
            sys.stdout.flush()
        return code
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 128 + signal.SIGPIPE
        with said_once(f"{type(error).__name__}: {error}") as first:  # the other processes of the launch meet it too
            if first and (os.environ.get("CVAE_LIGHTNING_TRACEBACK") == "1" or not _is_user_error(error)):
                raise
            if first:
                print(f"cvae-lightning: error: {_message(error)}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, argparse.ArgumentError) else 1


def _exit_code(words: list[str]) -> int:
    try:
        return _run(words)
    except KeyboardInterrupt:  # Ctrl-C while a child runs, or before Lightning listens to it
        return 128 + signal.SIGINT
    except SystemExit as stop:
        if type(stop).__name__ == "SIGTERMException":  # Lightning's; its code says success
            return 128 + signal.SIGTERM
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        raise


def _nobody_reads() -> bool:
    """Return whether the reader of stdout is gone, as `head` is when it has its lines; if so, drop what is left."""
    output = select.poll()
    output.register(sys.stdout, 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _run(words: list[str]) -> int:
    command = words[0] if words else "--help"
    if command in ("-h", "--help"):
        print(USAGE, end="")
    elif command == "--version":
        from importlib.metadata import version

        print(version("cvae-lightning"))
    elif command == "recipes":
        _recipes(words[1:])
    elif command == "quickstart":
        from cvae_lightning.quickstart import quickstart

        return quickstart(words[1:])
    elif command == "benchmark":
        from cvae_lightning.benchmark.command import benchmark

        return benchmark(words[1:])
    elif command == "sweep":
        from cvae_lightning.sweep.command import sweep

        return sweep(words[1:])
    elif command == "export":
        from cvae_lightning.export.command import export

        return export(words[1:])
    elif command in TRAINING:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # so that class_path finds the user's own file
        from cvae_lightning.lightning_cli import run

        run(words)
    else:
        known = (*TRAINING, "export", "recipes", "quickstart", "sweep")
        raise ValueError(f"unknown command {command!r}; expected {', '.join(known)} or benchmark")
    return 0


def _recipes(names: list[str]) -> None:
    """Print the named recipes, or list all of them."""
    if names and names[0] in ("-h", "--help"):
        print("usage: cvae-lightning recipes [NAME]\n\nlist the shipped recipes, or print the one named")
    elif names:
        for name in names:
            print(find_recipe(name).read_text(encoding="utf-8"), end="")
    else:
        paths = [recipe_folder() / f"{name}.yaml" for name in recipe_names()]
        width = max((len(path.stem) for path in paths), default=0)
        for path in paths:
            print(f"{path.stem:{width}}  {describe(path)}".rstrip())


def _is_user_error(error: Exception) -> bool:
    """Return whether the message says all: the user's input, a file or the disk is at fault, not the code."""
    if isinstance(error, ValueError | OSError | argparse.ArgumentError | pickle.UnpicklingError):
        return True
    if isinstance(error, ModuleNotFoundError):
        return True
    if type(error).__name__ == "MisconfigurationException":  # Lightning's; not imported here, it is slow
        return True
    return isinstance(error, RuntimeError) and ("Error(s) in loading state_dict" in str(error) or _lost_peer(error))


def _lost_peer(error: Exception) -> bool:
    """Return whether the only thing wrong is that another process has ended, which has said why."""
    return world_size() > 1 and any(sign in str(error) for sign in LOST_PEER)


def _message(error: Exception) -> str:
    """Return the message of an error, with its type where it has none."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = str(error).strip() or type(error).__name__
    if _lost_peer(error):
        return "another process of this run has ended; what it said before says why"
    if "Error(s) in loading state_dict" in text:
        first, *more = [line.strip() for line in text.splitlines()[1:] if line.strip()] or [text]
        rest = f" (and {len(more)} more)" if more else ""
        text = f"the checkpoint does not fit the model that the config describes: {first:.300}{rest}"
    return text


if __name__ == "__main__":
    sys.exit(main())
