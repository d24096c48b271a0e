"""Solutions on disk, in parts that are whole or not there: a killed run goes on with the part it was at."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from cvae_lightning.atomic_write import write_text
from cvae_lightning.data.loader import hash_int
from cvae_lightning.progress import progress

Draw = Callable[[Sequence[str], int], list[str | None]]
"""(inputs, seed) to the solutions of each input in a row; None for one that did not end."""


class SolutionParts:
    """The solutions of one split on disk: parts of JSONL, each whole or not there, named by the hash of its content.

    A part is a function of the fingerprint and its number, so that it does not matter which run has drawn it.

    Args:
        folder: where folders of fingerprints lie.
        name: of the split.
        fingerprint: of all that the solutions depend on; other ones have other folders.
        xs: the inputs.
        size: inputs of a part.
        seed: of sampling.
    """

    def __init__(self, folder: Path, name: str, fingerprint: str, xs: Sequence[str], size: int, seed: int) -> None:
        self.folder, self.name, self._seed = folder / f"{name}-{fingerprint}", name, seed
        self._inputs = [xs[start : start + size] for start in range(0, len(xs), size)]

    def read(self) -> list[list[tuple[str, str]] | None]:
        """Return (x, y) of every part; None for one that is not there, or whose content is not what was written."""
        parts: list[list[tuple[str, str]] | None] = [None] * len(self._inputs)
        for path in sorted(self.folder.glob("*.jsonl")):
            number, _, digest = path.stem.partition("-")
            if not number.isdigit() or int(number) >= len(parts) or parts[int(number)] is not None:
                continue
            content = path.read_bytes()
            if content_hash(content) == digest:
                rows = map(json.loads, content.decode().splitlines())
                parts[int(number)] = [(row["x"], row["y"]) for row in rows]
            else:
                rank_zero_warn(f"{path} is not whole: its solutions are drawn again")
        return parts

    def fill(self, draw: Draw, bar: bool) -> list[tuple[str, str]]:
        """Return (x, y) of all solutions, in the order of the inputs, after drawing the parts that are missing.

        Args:
            draw: draws the solutions of some inputs.
            bar: whether a progress bar shows the time left.
        """
        parts = self.read()
        missing = [number for number, part in enumerate(parts) if part is None]
        done = len(parts) - len(missing)
        title = f"solutions for {self.name}"
        for number in progress(missing, title, bar, initial=done, total=len(parts)):
            self._draw(number, draw)
        if missing:  # another run may have drawn a part meanwhile, with other rounding: all take what `read` takes
            return self.load()
        return [pair for part in parts for pair in part or ()]

    def load(self) -> list[tuple[str, str]]:
        """Return (x, y) of all solutions, which another process has drawn.

        Raises:
            ValueError: if some are not there.
        """
        parts = self.read()
        if None in parts:
            raise ValueError(
                f"{self.folder} lacks solutions that rank zero has drawn: data.self_generated.folder must be one and "
                "the same folder for all processes"
            )
        return [pair for part in parts for pair in part or ()]

    def _draw(self, number: int, draw: Draw) -> None:
        xs = self._inputs[number]
        ys = draw(xs, hash_int(f"{self._seed}/{self.name}/{number}"))
        times = len(ys) // len(xs)
        pairs = [(xs[i // times], y) for i, y in enumerate(ys) if y is not None]
        text = "".join(json.dumps({"x": x, "y": y}) + "\n" for x, y in pairs)
        write_text(self.folder / f"{number:06d}-{content_hash(text.encode())}.jsonl", text)


def content_hash(content: bytes) -> str:
    """Return a short hash of some bytes."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()
