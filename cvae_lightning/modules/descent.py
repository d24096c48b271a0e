"""A short training of a network on its own, before a run's first step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cvae_lightning.progress import progress


def descend(
    network: nn.Module, loss: Callable[[], Tensor], learning_rate: float, steps: int, title: str, bar: bool
) -> None:
    """Train the parameters of a network that need gradients, by AdamW, and leave none of the gradients.

    The learning rate falls to zero: at the edges of the inputs a network stays wrong with one that does not.

    Args:
        network: trained in place.
        loss: draws a batch and returns what is to fall.
        learning_rate: of the first step.
        steps: number of steps.
        title: of the progress bar.
        bar: whether it is shown.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps)
    for _ in progress(range(steps), title, bar):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
