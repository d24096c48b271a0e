import math
from types import SimpleNamespace

import pytest
import torch

from cvae_lightning.callbacks.epoch_results import contingency, dead_latents, logged, metric_result
from cvae_lightning.metrics import LatentUsage, StrategyAlignment


@pytest.mark.parametrize("nested", [False, True])
def test_metrics_are_found_on_the_module_or_in_its_metrics(nested):
    parts = SimpleNamespace(usage=LatentUsage(4), alignment=StrategyAlignment(2, 2))
    module = SimpleNamespace(metrics=parts) if nested else parts
    assert metric_result(module, "usage") is None  # nothing seen yet
    assert contingency(module) is None
    log_probs = torch.tensor([[0.5, 0.48, 0.02, 0.0]]).log()
    parts.usage.update(log_probs, log_probs)
    parts.alignment.update(torch.tensor([0, 1, 1]), torch.tensor([1, 0, -1]))
    assert dead_latents(metric_result(module, "usage")) == [2, 3]  # below 0.1 / 4
    assert contingency(module).tolist() == [[0, 1], [1, 0]]


def test_absent_things():
    assert metric_result(SimpleNamespace(), "usage") is None
    assert dead_latents(None) == []
    unlabelled = SimpleNamespace(alignment=StrategyAlignment(2, 2))
    unlabelled.alignment.update(torch.tensor([0]), torch.tensor([-1]))
    assert contingency(unlabelled) is None
    assert math.isnan(logged({}, "val/x"))
    assert logged({"val/x": torch.tensor(2.0)}, "val/x") == 2.0
