"""A task, data and modules so small that every score can be worked out by hand."""

from __future__ import annotations

import lightning as L
import torch
from torch.utils.data import DataLoader

from cvae_lightning.outputs import Record

INPUTS = ("12", "34", "11", "56")


class MirrorTask:
    """y is x as it stands (``keep``) or reversed (``turn``), then ``=`` and the largest digit; palindromes coincide."""

    name = "mirror"
    strategies = ("keep", "turn")
    alphabet = "0123456789="

    def solve(self, x: str, strategy: str) -> str:
        return f"{x if strategy == 'keep' else x[::-1]}={max(x)}"

    def groups(self, x: str) -> list[int]:
        return [0, 0] if x == x[::-1] else [0, 1]

    def is_correct(self, x: str, y: str) -> bool:
        return y.endswith(f"={max(x)}")

    def compatible_strategies(self, x: str, y: str) -> frozenset[str]:
        return frozenset(s for s in self.strategies if self.solve(x, s) == y)


class FakeData(L.LightningDataModule):
    def __init__(self, task: MirrorTask | None = None, inputs: tuple[str, ...] = INPUTS) -> None:
        super().__init__()
        self.task = task
        self.inputs = inputs
        self.strategy_names = list(MirrorTask.strategies)

    def records(self, split: str) -> list[Record]:
        return [Record(x, MirrorTask().solve(x, "keep"), 0, i) for i, x in enumerate(self.inputs)]

    def alignment_ceiling(self, split: str) -> float | None:
        return None if self.task is None else 0.875

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(4, 1), batch_size=2)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(2, 1), batch_size=1)

    test_dataloader = val_dataloader


class FakeModule(L.LightningModule):
    """Latent 0 keeps, latent 1 turns; ``wrong`` lists (x, k) that come out as a wrong answer.

    The router gives latent 0 the probability ``router``. Generation consumes random numbers, as sampling does.
    """

    def __init__(self, num_latents: int = 2, router: float = 1.0, wrong: tuple[tuple[str, int], ...] = (("56", 1),)):
        super().__init__()
        self.num_latents = num_latents
        self.router = router
        self.wrong = wrong
        self.losses = torch.nn.ModuleDict()
        self.layer = torch.nn.Linear(1, 1)
        self.dropout = torch.nn.Dropout(0.5)
        self.calls: list[dict] = []
        self.to_log: dict[str, float] = {}

    def generate(
        self,
        x,
        z="router",
        *,
        do_sample=False,
        temperature=1.0,
        max_new_tokens=None,
        generator_seed=None,
        batch_size=256,
    ):
        assert not self.training
        self.calls.append({"z": z, "do_sample": do_sample, "generator_seed": generator_seed, "limit": max_new_tokens})
        torch.rand(3)
        latents = z if isinstance(z, list) else [0] * len(x)
        ys = [MirrorTask().solve(a, MirrorTask.strategies[k % 2]) for a, k in zip(x, latents, strict=True)]
        return [f"{a}=?" if (a, k) in self.wrong else y for a, k, y in zip(x, latents, ys, strict=True)]

    def route(self, x):
        rest = (1 - self.router) / max(1, self.num_latents - 1)
        return torch.tensor([[self.router] + [rest] * (self.num_latents - 1)] * len(x)).log()

    def training_step(self, batch, batch_idx):
        return self.dropout(self.layer(batch) + torch.randn(())).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def on_validation_epoch_end(self):
        self.log_dict({f"val/{key}": value for key, value in self.to_log.items()})

    def test_step(self, batch, batch_idx):
        pass

    def on_test_epoch_end(self):
        self.log_dict({f"test/{key}": value for key, value in self.to_log.items()})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(*callbacks, logger=False, **options) -> L.Trainer:
    quiet: dict[str, object] = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    quiet["log_every_n_steps"] = 1
    return L.Trainer(
        accelerator="cpu", **{"devices": 1, "logger": logger, "callbacks": list(callbacks), **quiet, **options}
    )
