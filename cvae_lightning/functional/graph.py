"""The graph that autograd keeps of a result."""

from collections.abc import Iterator

from torch import Tensor
from torch.autograd.graph import Node


def leaves(result: Tensor) -> Iterator[Tensor]:
    """Yield the leaves that a result depends on and that get a gradient."""
    seen: set[Node] = set()
    waiting = [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting.extend(following for following, _ in node.next_functions)
