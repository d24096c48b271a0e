"""Synthetic tasks: a generator and a verifier each."""

from cvae_lightning.data.tasks.base import Ceiling, Task
from cvae_lightning.data.tasks.base_conversion import BaseConversion
from cvae_lightning.data.tasks.grid_pathfinding import GridPathfinding
from cvae_lightning.data.tasks.integer_multiplication import IntegerMultiplication
from cvae_lightning.data.tasks.linear_equations import LinearEquations
from cvae_lightning.data.tasks.multidigit_addition import MultidigitAddition
from cvae_lightning.data.tasks.sorting_algorithms import SortingAlgorithms

__all__ = [
    "BaseConversion",
    "Ceiling",
    "GridPathfinding",
    "IntegerMultiplication",
    "LinearEquations",
    "MultidigitAddition",
    "SortingAlgorithms",
    "Task",
]
