"""A short form of the fuzzing; ``run.py`` beside this file is the long one."""

import pytest
from fuzz.targets import SHARES, TARGETS
from hypothesis import HealthCheck, Phase, given, settings


@pytest.mark.parametrize("name", TARGETS)
def test_any_input_is_taken_or_refused_with_a_message(name):
    strategy, target = TARGETS[name]

    @settings(
        max_examples=60 * min(3, SHARES[name]) + 20,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )
    @given(strategy)
    def run(value):
        assert target(value) in ("accepted", "refused")

    run()
