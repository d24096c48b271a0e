"""Fixtures of the tests of modules."""

import pytest

from cvae_lightning.modules import solution_clusters


@pytest.fixture
def few_divisions(monkeypatch):
    """What is planted is found soon, and runs need not look long for what tiny models do not have."""
    monkeypatch.setattr(solution_clusters, "STARTS", 1)
    monkeypatch.setattr(solution_clusters, "REFINED", 4)
