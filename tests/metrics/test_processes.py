"""Every metric: two processes with uneven data give the result of one."""

import pytest
import torch
from processes import run_in_processes

from cvae_lightning.metrics import (
    ControlledAlignment,
    Evidence,
    LatentUsage,
    LocalStrategyCoverage,
    LossContribution,
    ReconstructionRatio,
    StrategyAlignment,
    WeightedMeans,
)


def data():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, 3, generator=generator)
    return {
        "posterior": logits[0].log_softmax(-1),
        "router": logits[1].log_softmax(-1),
        "latents": logits[0].argmax(-1),
        "strategies": torch.tensor([0, 1, -1, 3, 2, 1, -1]),
        "follows": torch.rand(7, 4, generator=generator) < 0.5,
        "nll": torch.rand(7, generator=generator),
        "tokens": torch.randint(1, 9, (7,), generator=generator),
    }


CASES = {
    "alignment": (lambda: StrategyAlignment(3, 4), lambda m, d: m.update(d["latents"], d["strategies"])),
    "controlled": (lambda: ControlledAlignment(3, 4), lambda m, d: m.update(d["latents"], d["follows"])),
    "coverage": (LocalStrategyCoverage, lambda m, d: m.update(d["follows"], torch.tensor([0, 1, 1, 2]))),
    "recon": (lambda: ReconstructionRatio(0.5), lambda m, d: m.update(d["nll"], d["tokens"])),
    "evidence": (Evidence, lambda m, d: m.update(-d["nll"], d["nll"] * 2, d["tokens"])),
    "usage": (lambda: LatentUsage(3), lambda m, d: m.update(d["posterior"], d["router"])),
    "contribution": (lambda: LossContribution("ab"), lambda m, d: m.update({"a": d["nll"].sum(), "b": d["nll"][0]})),
    "means": (lambda: WeightedMeans("ab"), lambda m, d: m.update({"a": d["nll"], "b": d["nll"].mean()}, len(d["nll"]))),
}


def result(rank, batches):
    """Results of all metrics after a batch per record (rank 0, one process) or one batch (rank 1)."""
    results = {}
    for name, (build, update) in CASES.items():
        metric = build()
        for batch in batches:
            update(metric, {key: value[list(batch)] for key, value in data().items()})
        value = metric.compute()
        results[name] = value if isinstance(value, dict) else {"value": value}
        if rank == 0:
            metric.plot()  # on one process only: must not communicate
    return results


def test_two_processes_with_uneven_data_equal_one(tmp_path):
    batches = ([[0], [1], [2, 3, 4]], [[5, 6]])
    expected = result(None, [*batches[0], *batches[1]])
    for actual in run_in_processes(lambda rank: result(rank, batches[rank]), tmp_path):
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", CASES)
def test_updates_are_out_of_place(name):
    """Spawned processes may share the memory of the initial states."""
    build, update = CASES[name]
    metric = build()
    initial = [getattr(metric, state) for state in metric._defaults]
    update(metric, data())
    assert not any(state.any() for state in initial)
    assert all(getattr(metric, state).any() for state in metric._defaults)


@pytest.mark.parametrize("name", CASES)
def test_counts_are_integers_and_sums_double(name):
    metric = CASES[name][0]().half()
    assert {getattr(metric, state).dtype for state in metric._defaults} <= {torch.int64, torch.float64}
