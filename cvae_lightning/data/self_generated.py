"""Training data that the entangled model writes itself, from inputs alone: drawn once, and kept on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from cvae_lightning.backbones.baseline_cache import model_fingerprint
from cvae_lightning.backbones.solutions import draw_solutions
from cvae_lightning.data.solution_parts import SolutionParts, content_hash
from cvae_lightning.data.tasks.base import Task
from cvae_lightning.outputs import UNLABELLED, Record

if TYPE_CHECKING:
    from cvae_lightning.data.base import RecordDataModule, Split

FORMAT = 1  # of what is kept on disk


@dataclass(frozen=True)
class SelfGeneration:
    """Solutions that the entangled model draws for the inputs of the data, once, in place of given ones.

    Training reads these alone. Validation and test keep the solutions that they have; where they have none, theirs are
    drawn too. No label is used. The solutions lie in parts of JSONL; a killed run goes on with the part it was at.

    Args:
        num_inputs: inputs of a split that are solved, each input once; null = all.
        num_solutions: solutions drawn for each of them.
        temperature: divides the logits; 1 = the entangled model's own distribution.
        top_p: share of the probability that is drawn from; in (0, 1].
        max_new_tokens: longest solution, in tokens; a solution that has not ended by then is dropped.
        prompt: text in which ``{x}`` stands for the input, for a pretrained model that has never seen the package's
            markers; null = the markers. Its solutions end with the tokenizer's end of text or with a ``stop``.
        stop: texts that end a solution behind ``prompt``, such as a newline.
        keep: ``all``, or ``verified``: only what the task's verifier finds right.
        batch_size: solutions drawn at a time; they depend on it.
        seed: of sampling.
        folder: where the solutions are kept; null = below the trainer's ``default_root_dir``.

    Raises:
        ValueError: if an argument is out of range.
    """

    num_inputs: int | None = None
    num_solutions: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    prompt: str | None = None
    stop: tuple[str, ...] = ()
    keep: Literal["all", "verified"] = "all"
    batch_size: int = 512
    seed: int = 0
    folder: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_inputs", "num_solutions", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.self_generated.{name} must be at least 1, got {value}")
        if not self.temperature > 0:
            raise ValueError(f"data.self_generated.temperature must be above 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"data.self_generated.top_p must lie above 0 and not above 1, got {self.top_p}")
        if self.prompt is not None and "{x}" not in self.prompt:
            raise ValueError(
                "data.self_generated.prompt must hold {x}, where the input stands, got " + repr(self.prompt)[:60]
            )
        if self.stop and self.prompt is None:
            raise ValueError(
                "data.self_generated.stop ends what is drawn behind a plain prompt: give data.self_generated.prompt too"
            )
        if "" in self.stop:
            raise ValueError("data.self_generated.stop must hold texts that are not empty")

    def describe(self) -> dict[str, Any]:
        """Return the options that the drawn solutions depend on, as plain data."""
        return {name: value for name, value in asdict(self).items() if name not in ("keep", "folder")}


class DrawnRecords(Sequence[Record]):
    """Drawn solutions as records; the label is the one strategy that writes such a solution, if there is just one.

    Args:
        pairs: (x, y) of each record.
        task: whose verifier knows the strategies; None = no labels.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]], task: Task | None) -> None:
        self._pairs, self._task = pairs, task

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: Any) -> Any:
        """Return the record (or the records of a slice)."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        x, y = self._pairs[index]
        strategy = UNLABELLED
        if self._task is not None:
            names = self._task.compatible_strategies(x, y)
            if len(names) == 1:
                strategy = self._task.strategies.index(min(names))
        return Record(x, y, strategy, index % len(self))

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))


@torch.random.fork_rng([])  # reading the model draws numbers for rows that it then replaces
def draw_records(data: RecordDataModule, split: Split, options: SelfGeneration) -> DrawnRecords:
    """Return the solutions that the model of the data's trainer draws; rank zero draws them, the others read them.

    Raises:
        ValueError: if there is nothing to draw from, or no solution is left.
    """
    if options.keep == "verified" and data.task is None:
        raise ValueError(
            "data.self_generated.keep: without a task there is no verifier: expected 'all', got 'verified'"
        )
    trainer: Any = data.trainer
    module = trainer.lightning_module
    xs = list(islice(_different(record.x for record in data.given_records(split)), options.num_inputs))
    frozen = getattr(module, "frozen_baseline", None)  # knows the model without reading it again
    known = None if frozen is None else frozen.model
    model, template = known or model_fingerprint(source_model(module)), data.template
    layout = (template.fingerprint(), template.section_length, template.max_length, template.on_overflow)
    what = (FORMAT, model, layout, split, xs, sorted(options.describe().items()))
    root = Path(options.folder or Path(trainer.default_root_dir) / "self_generated")
    size = max(1, options.batch_size // options.num_solutions)
    parts = SolutionParts(root, split, content_hash(repr(what).encode()), xs, size, options.seed)

    @cache
    def source() -> Any:  # read and moved only if something is to be drawn, and then once
        return source_model(module).to(trainer.strategy.root_device)

    def draw(some: Sequence[str], seed: int) -> list[str | None]:
        return draw_solutions(
            source(),
            template,
            some,
            options.num_solutions,
            options.max_new_tokens,
            seed,
            temperature=options.temperature,
            top_p=options.top_p,
            prompt=options.prompt,
            stop=options.stop,
        )

    bar = trainer.progress_bar_callback is not None
    pairs = parts.fill(draw, bar) if trainer.is_global_zero else parts.load()
    total = len(xs) * options.num_solutions
    counts = {"inputs": len(xs), "solutions": total, "unended": total - len(pairs)}
    if options.keep == "verified" and data.task is not None:
        right = [pair for pair in pairs if data.task.is_correct(*pair)]
        counts["wrong"], pairs = len(pairs) - len(right), right
    data.drawn_counts[split] = counts
    dropped = f"{counts['unended']} did not end or are too long"
    dropped += f", {counts['wrong']} are wrong" if "wrong" in counts else ""
    if not pairs:
        raise ValueError(
            f"none of the {total} solutions drawn for split {split!r} can be used ({dropped}): raise "
            "data.self_generated.max_new_tokens; for a model that has never seen the markers, give "
            "data.self_generated.prompt and stop"
        )
    if counts["unended"] > total / 2:
        rank_zero_warn(
            f"most solutions drawn for split {split!r} were dropped ({dropped}): is the model trained on the package's "
            "markers? If not, give data.self_generated.prompt and stop; else raise data.self_generated.max_new_tokens"
        )
    rank_zero_info(
        f"{split}: {len(pairs)} solutions of {len(xs)} inputs, self-generated ({dropped}); kept in {parts.folder}"
    )
    return DrawnRecords(_in_turns(pairs), data.task)


def _different(texts: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for text in texts:
        if text not in seen:
            seen.add(text)
            yield text


def _in_turns(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the first solution of every input, then the second ones, ...: the first few records are of many inputs.

    Example:
        >>> _in_turns([("1", "a"), ("1", "b"), ("2", "c")])
        [('1', 'a'), ('2', 'c'), ('1', 'b')]
    """
    seen: Counter[str] = Counter()
    turns = []
    for pair in pairs:
        turns.append((seen[pair[0]], pair))
        seen[pair[0]] += 1
    return [pair for _, pair in sorted(turns, key=lambda turn: turn[0])]


def source_model(module: Any) -> Any:
    """Return the model that solutions are drawn from: the entangled one, or an entangled model to be trained on them.

    Raises:
        ValueError: if it is not at hand.
    """
    if not hasattr(module, "reference"):
        if module.lm is None:
            raise ValueError(
                "there are inputs without solutions, and a model from scratch cannot draw any: give "
                "model.init_args.model, a pretrained one"
            )
        return module.lm
    if not module.has_reference:
        raise ValueError(
            "self-generated data are drawn from the entangled model, but this module was restored from a checkpoint "
            "alone: give model.entangled as a folder or hub name"
        )
    return module.reference()
