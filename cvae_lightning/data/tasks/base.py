"""Task: a synthetic problem that several procedures solve, with the verifier that tells them apart."""

from __future__ import annotations

import math
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

from cvae_lightning.spec import HasSpec


@dataclass(frozen=True)
class Ceiling:
    """What a perfect latent reaches on a task whose strategies sometimes write the same trace.

    Args:
        one_to_one: best posterior alignment: E_x sum over groups G of equal traces of max_{s in G} p(s|x); in (0, 1].
            With fewer latents than strategies, over the strategies that get one, chosen for the best.
        controlled: best controlled alignment: E_x (number of groups of x) / S; in (0, 1].
        strategy_entropy: E_x H(group of s | x), nats per record: what the strategy explains of -log p(y|x), since y is
            a function of x and s. A generator that knows s can lower the NLL of an ideal entangled model by this much.
    """

    one_to_one: float
    controlled: float
    strategy_entropy: float


class Task(HasSpec, ABC):
    """One problem family: inputs, named strategies, traces and their verifier.

    A trace is ``steps + "=" + final answer``. A subclass gives ``name``, ``strategies``, ``alphabet`` and four methods:
    ``sample_input``, ``parse`` (text to problem), ``steps`` (problem and strategy to the text before the last ``=``)
    and ``result`` (problem to final answer). No symbol of a trace may name its strategy.
    """

    name: ClassVar[str]
    """Name of the task, as in the recipes: ``sorting_algorithms``, ..."""
    strategies: tuple[str, ...]
    """Names of the S strategies; a record's ``strategy`` indexes this tuple."""
    alphabet: ClassVar[str]
    """All characters that inputs and traces may use."""
    answer_pattern: ClassVar[re.Pattern[str]] = re.compile("[0-9]{1,32}")
    """What a well-formed final answer looks like."""

    def __init__(self) -> None:
        """Tasks without arguments need no constructor of their own."""

    @abstractmethod
    def sample_input(self, rng: random.Random) -> str:
        """Return a random input text, drawn with ``rng`` alone."""

    @abstractmethod
    def parse(self, x: str) -> Any:
        """Return the problem that ``x`` states, or raise ValueError if ``x`` is not an input of this task."""

    @abstractmethod
    def steps(self, problem: Any, strategy: str) -> str:
        """Return the steps that ``strategy`` writes for a parsed problem, without the final answer."""

    @abstractmethod
    def result(self, problem: Any) -> str:
        """Return the final answer of a parsed problem, computed without any strategy."""

    def solve(self, x: str, strategy: str) -> str:
        """Return the whole trace of ``strategy`` on ``x``.

        Raises:
            ValueError: if ``strategy`` is unknown or ``x`` is not an input of this task.
        """
        if strategy not in self.strategies:
            raise ValueError(
                f"{self.name} has no strategy {strategy!r}; its strategies are {', '.join(self.strategies)}"
            )
        problem = self.parse(x)
        return f"{self.steps(problem, strategy)}={self.result(problem)}"

    def traces(self, x: str) -> tuple[str, ...]:
        """Return the S traces of ``x``, in the order of ``strategies``."""
        return tuple(self.solve(x, strategy) for strategy in self.strategies)

    def final_answer(self, y: str) -> str | None:
        """Return what follows the last ``=`` of any text ``y``, or None if that is not a well-formed answer."""
        _, equals, tail = y.rpartition("=")
        return tail if equals and self.answer_pattern.fullmatch(tail) else None

    def answer(self, x: str) -> str:
        """Return the correct final answer of ``x``."""
        return self.result(self.parse(x))

    def is_correct(self, x: str, y: str) -> bool:
        """Return whether ``y`` ends in the correct answer of ``x``; any two texts are accepted."""
        try:
            return self.final_answer(y) == self.answer(x)
        except ValueError:
            return False

    def compatible_strategies(self, x: str, y: str) -> frozenset[str]:
        """Return the strategies whose trace of ``x`` equals ``y``; any two texts are accepted."""
        try:
            traces = self.traces(x)
        except ValueError:
            return frozenset()
        return frozenset(s for s, trace in zip(self.strategies, traces, strict=True) if trace == y)

    def groups(self, x: str) -> list[int]:
        """Return a group id per strategy: strategies with equal traces of ``x`` share the id of the first of them."""
        traces = self.traces(x)
        return [traces.index(trace) for trace in traces]

    def ceiling(
        self,
        strategy_probs: Callable[[str], Sequence[float]] | None = None,
        samples: int = 2000,
        seed: int = 0,
    ) -> Ceiling:
        """Return the ceilings of alignment over random inputs, from the verifier alone.

        Args:
            strategy_probs: p(s|x) as a function of x; None = uniform.
            samples: number of random inputs; the standard error falls as ``samples ** -0.5``.
            seed: seed of the inputs.
        """
        rng = random.Random(seed)
        return self.ceiling_over([self.sample_input(rng) for _ in range(samples)], strategy_probs)

    def ceiling_over(
        self,
        xs: Sequence[str],
        strategy_probs: Callable[[str], Sequence[float]] | None = None,
        num_latents: int | None = None,
    ) -> Ceiling:
        """Return the ceilings of alignment over the given inputs.

        Args:
            xs: inputs.
            strategy_probs: p(s|x) as a function of x; None = uniform.
            num_latents: K; None = as many as there are strategies, or more.

        Raises:
            ValueError: if there is no input.
        """
        if not xs:
            raise ValueError("a ceiling is a mean over inputs, and there is none")
        size = len(self.strategies)
        chosen = list(combinations(range(size), min(num_latents or size, size)))  # strategies that get a latent
        best, distinct, entropy = [0.0] * len(chosen), 0.0, 0.0
        for x in xs:
            probs, groups = strategy_probs(x) if strategy_probs else [1 / size] * size, self.groups(x)
            for i, strategies in enumerate(chosen):
                largest: dict[int, float] = {}
                for s in strategies:
                    largest[groups[s]] = max(largest.get(groups[s], 0.0), probs[s])
                best[i] += sum(largest.values())
            masses = [sum(p for p, own in zip(probs, groups, strict=True) if own == group) for group in {*groups}]
            distinct += len(masses) / size
            entropy -= sum(p * math.log(p) for p in masses if p > 0)
        return Ceiling(min(1.0, max(best) / len(xs)), distinct / len(xs), max(0.0, entropy / len(xs)))


def check_range(name: str, value: int, low: int, high: int) -> int:
    """Return a constructor argument that lies in [low, high].

    Raises:
        ValueError: if it does not, or is not an integer.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, got {value!r}")
    return value


def match(pattern: re.Pattern[str], x: str, task: str) -> tuple[str, ...]:
    """Return the groups of a pattern that must match all of ``x``.

    Raises:
        ValueError: if it does not.
    """
    found = pattern.fullmatch(x)
    if found is None:
        raise ValueError(f"{x!r:.60} is not an input of {task}: expected the form {pattern.pattern}")
    return found.groups()
