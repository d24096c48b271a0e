"""Controlled and sampled generation at the end of every validation and test, verified by the data's task."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from cvae_lightning.callbacks.examples import different_inputs
from cvae_lightning.metrics import ControlledAlignment, LocalStrategyCoverage
from cvae_lightning.outputs import Record


class Generation(NamedTuple):
    """One generated solution: input ``x``, latent ``k``, text ``y``, and what the verifier says (None without one)."""

    x: str
    k: int
    y: str
    correct: bool | None = None
    strategies: tuple[str, ...] = ()


class StrategyEvaluation(Callback):
    """Generates under every forced latent and from the router, and scores what comes out.

    Controlled: the first ``num_examples`` inputs of the split, every z_k forced, greedy decoding. Sampled: z drawn
    from the router and tokens sampled, and once more with the router's most probable z and greedy decoding.
    With a verifier (``datamodule.task``) it logs, under ``val/`` or ``test/``,
    ``controlled/alignment_one_to_one``, ``controlled/alignment_ceiling``, ``controlled/local_strategy_coverage_mean``,
    ``controlled/local_strategy_full_coverage_rate``, ``controlled/final_answer_accuracy``,
    ``sampled/final_answer_accuracy`` and ``greedy/final_answer_accuracy``. With or without one it logs
    ``controlled/distinct_fraction`` (share of distinct outputs among the K of an x: 0 all equal, 1 all different),
    ``controlled/mean_distance`` (mean Jaccard distance of word bigrams between two latents' outputs) and, without
    one, ``controlled/mean_length/z<k>`` (words). A module without latents is only sampled.

    Under DDP every rank generates for its own share of the records; all sums are reduced, so every rank logs the same
    numbers. Neither the random state nor the train mode of the module is disturbed.

    Args:
        num_examples: different inputs of the split to generate for, the first ones.
        every_n_validations: generate at every n-th validation of a fit.
        sampled: also generate from the router.
        max_new_tokens: longest generation in tokens; None = the module's default.
        batch_size: sequences generated at once.
        seed: seed of the sampled latents and tokens.

    Raises:
        ValueError: if ``num_examples``, ``every_n_validations`` or ``batch_size`` is below 1.
    """

    def __init__(
        self,
        num_examples: int = 64,
        every_n_validations: int = 1,
        sampled: bool = True,
        max_new_tokens: int | None = None,
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        for name, value in (
            ("num_examples", num_examples),
            ("every_n_validations", every_n_validations),
            ("batch_size", batch_size),
        ):
            if value < 1:
                raise ValueError(f"StrategyEvaluation: {name} must be at least 1, got {value}")
        self.num_examples = num_examples
        self.every_n_validations = every_n_validations
        self.sampled = sampled
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.seed = seed
        self.controlled: list[Generation] = []
        """This rank's generations under forced latents, K in a row for each x."""
        self.samples: list[Generation] = []
        """This rank's generations with z from the router."""
        self.matrix: Tensor | None = None
        """[K, S] controlled alignment A[k, s] of the last evaluation."""
        self.distance: Tensor | None = None
        """[K, K] mean distance between the outputs of two latents."""
        self.scores: dict[str, float] = {}
        """What the last evaluation logged, without the stage."""
        self.is_fresh = False
        """Whether the last evaluation is of the validation or test at hand, not of an earlier one."""
        self._validations = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the number of validations so far, so that a resumed run keeps its rhythm."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of validations."""
        self._validations = state_dict["validations"]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate on the validation split; never in the sanity check."""
        if trainer.sanity_checking:
            return
        if trainer.state.fn == "fit":
            self._validations += 1
            if self._validations % self.every_n_validations:
                self.is_fresh = False
                return
        self.is_fresh = True
        self._evaluate(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate on the test split."""
        self.is_fresh = True
        self._evaluate(trainer, pl_module, "test")

    def _evaluate(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "records"):
            rank_zero_warn("StrategyEvaluation needs a data module with records(split): nothing was generated")
            return
        chosen = different_inputs(data, stage, self.num_examples)
        examples = len(chosen)
        self.controlled, self.samples, self.matrix, self.distance, self.scores = [], [], None, None, {}
        if examples == 0:
            return
        mine = range(trainer.global_rank, examples, trainer.world_size)
        share = [chosen[i] for i in mine]
        uniform = torch.rand(examples, generator=torch.Generator().manual_seed(self.seed))[list(mine)]
        task = getattr(data, "task", None)
        with undisturbed(pl_module):
            if getattr(pl_module, "num_latents", 0):
                self._controlled(trainer, pl_module, share, task)
            if self.sampled:
                self._sampled(trainer, pl_module, share, task, uniform)
        # equal on every rank already; sync_dist only tells Lightning so
        pl_module.log_dict({f"{stage}/{key}": value for key, value in self.scores.items()}, sync_dist=True)

    def _controlled(self, trainer: Trainer, module: Any, share: Sequence[Record], task: Any) -> None:
        latents = module.num_latents
        forced = [(record.x, k) for record in share for k in range(latents)]
        if hasattr(module, "generate_all"):  # reads every x once for all latents
            options = {"max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size}
            ys = [y for row in module.generate_all([record.x for record in share], **options) for y in row]
            self.controlled = [_judge(task, x, k, y) for (x, k), y in zip(forced, ys, strict=True)]
        else:
            self.controlled = self._generate(module, [x for x, _ in forced], [k for _, k in forced], task)
        rows = [self.controlled[i : i + latents] for i in range(0, len(self.controlled), latents)]
        sums = torch.zeros(3 + latents + latents * latents)
        for row in rows:
            features = [_bigrams(g.y) for g in row]
            distance = [[_jaccard_distance(a, b) for b in features] for a in features]
            distinct = (len({g.y for g in row}) - 1) / max(1, latents - 1)
            lengths = [len(_words(g.y)) for g in row]
            correct = sum(bool(g.correct) for g in row)
            sums += torch.tensor([1.0, distinct, correct, *lengths, *(d for line in distance for d in line)])
        sums = _reduce_sum(trainer, module, sums)
        count, distinct, correct = sums[:3].tolist()
        self.distance = (sums[3 + latents :] / count).view(latents, latents)
        self.scores["controlled/distinct_fraction"] = distinct / count
        self.scores["controlled/mean_distance"] = float(self.distance.sum()) / max(1, latents * (latents - 1))
        if task is None:
            lengths = (sums[3 : 3 + latents] / count).tolist()
            self.scores |= {f"controlled/mean_length/z{k}": length for k, length in enumerate(lengths)}
            return
        self.scores["controlled/final_answer_accuracy"] = correct / (count * latents)
        self._verify(module, rows, task)

    def _verify(self, module: Any, rows: Sequence[Sequence[Generation]], task: Any) -> None:
        names: tuple[str, ...] = tuple(task.strategies)
        alignment = ControlledAlignment(module.num_latents, len(names)).to(module.device)
        ideal = ControlledAlignment(len(names), len(names)).to(module.device)
        coverage = LocalStrategyCoverage().to(module.device)
        for row in rows:
            compatible = torch.tensor([[name in g.strategies for name in names] for g in row], device=module.device)
            groups = torch.tensor(task.groups(row[0].x), device=module.device)
            alignment.update(torch.arange(len(row), device=module.device), compatible)
            ideal.update(torch.arange(len(names), device=module.device), groups[:, None] == groups[None])
            coverage.update(compatible, groups)
        aligned, reachable, covered = alignment.compute(), ideal.compute(), coverage.compute()
        best = reachable["matrix"].diagonal().sort(descending=True).values[: module.num_latents]
        self.matrix = aligned["matrix"].detach().cpu()
        self.scores["controlled/alignment_one_to_one"] = float(aligned["one_to_one"])
        self.scores["controlled/alignment_ceiling"] = float(best.mean())
        self.scores["controlled/local_strategy_coverage_mean"] = float(covered["mean"])
        self.scores["controlled/local_strategy_full_coverage_rate"] = float(covered["full_rate"])

    def _sampled(self, trainer: Trainer, module: Any, share: Sequence[Record], task: Any, uniform: Tensor) -> None:
        xs = [record.x for record in share]
        drawn: list[int] | None = None
        greedy: Any = None
        if getattr(module, "num_latents", 0):
            greedy = "argmax"
            if xs:
                parts = [module.route(xs[i : i + self.batch_size]) for i in range(0, len(xs), self.batch_size)]
                cumulative = torch.cat(parts).float().exp().cumsum(-1).cpu()
                drawn = (cumulative < uniform[:, None]).sum(-1).clamp_max(module.num_latents - 1).tolist()
        self.samples = self._generate(
            module,
            xs,
            drawn,
            task,
            do_sample=True,
            generator_seed=self.seed + 1 + trainer.global_rank,  # z has `seed`
        )
        if task is None:
            return
        best = self._generate(module, xs, greedy, task, generator_seed=self.seed + 1 + trainer.global_rank)
        counts = [len(xs), *(sum(bool(g.correct) for g in table) for table in (self.samples, best))]
        count, sampled, argmax = _reduce_sum(trainer, module, torch.tensor(counts, dtype=torch.float32)).tolist()
        self.scores["sampled/final_answer_accuracy"] = sampled / count
        self.scores["greedy/final_answer_accuracy"] = argmax / count

    def _generate(self, module: Any, xs: list[str], z: Any, task: Any, **options: Any) -> list[Generation]:
        if not xs:
            return []
        given = () if z is None else (z,)
        ys = module.generate(xs, *given, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size, **options)
        latents = z if isinstance(z, list) else [-1] * len(xs)
        return [_judge(task, x, k, y) for x, k, y in zip(xs, latents, ys, strict=True)]


def _judge(task: Any, x: str, k: int, y: str) -> Generation:
    if task is None:
        return Generation(x, k, y)
    compatible = task.compatible_strategies(x, y)
    return Generation(x, k, y, task.is_correct(x, y), tuple(name for name in task.strategies if name in compatible))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def _bigrams(text: str) -> frozenset[tuple[str, str]]:
    words = ["", *_words(text), ""]
    return frozenset(itertools.pairwise(words))


def _jaccard_distance(a: frozenset[Any], b: frozenset[Any]) -> float:
    return 1.0 - len(a & b) / len(a | b)


def _reduce_sum(trainer: Trainer, module: LightningModule, values: Tensor) -> Tensor:
    total = trainer.strategy.reduce(values.to(module.device), reduce_op="sum")
    return total.cpu()


@contextlib.contextmanager
def undisturbed(module: LightningModule) -> Iterator[None]:
    """Run in eval mode without gradient, and restore modes and random state afterwards."""
    modes = {part: part.training for part in module.modules()}
    devices = [module.device] if module.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        module.eval()
        try:
            yield
        finally:
            for part, training in modes.items():
                part.training = training
