import warnings

import pytest
import torch
from callback_fakes import FakeData, FakeModule, make_trainer

from cvae_lightning.callbacks.collapse_alarm import CollapseAlarm, CollapseWarning
from cvae_lightning.losses import AggregatePosteriorBalanceLoss
from cvae_lightning.metrics import LatentUsage

HEALTHY = {
    "diagnostics/latent_usage_perplexity": 3.9,
    "kl_prior_loss": 1.2,
    "diagnostics/inter_latent_jsd/weighted_mean": 0.4,
    "diagnostics/posterior_entropy": 0.1,
    "diagnostics/router_entropy": 1.3,
}


class UsageModule(FakeModule):
    """Feeds ``usage`` one aggregate posterior per validation and resets it when the epoch ends."""

    def __init__(self, to_log=HEALTHY, posterior=(0.25, 0.25, 0.25, 0.25)):
        super().__init__(num_latents=4)
        self.usage = LatentUsage(4)
        self.to_log = dict(to_log)
        self.posterior = posterior

    def validation_step(self, batch, batch_idx):
        log_probs = torch.tensor([self.posterior]).log()
        self.usage.update(log_probs, log_probs)

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        self.usage.reset()


def messages(module, alarm=None, epochs=3) -> list[str]:
    """Fit and return the alarms that were raised."""
    trainer = make_trainer(alarm or CollapseAlarm(), max_epochs=epochs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, FakeData())
    return [str(w.message) for w in caught if issubclass(w.category, CollapseWarning)]


def test_healthy_run_is_silent():
    assert messages(UsageModule()) == []


def test_dead_latents_are_named_once():
    alarm = CollapseAlarm()
    (message,) = messages(UsageModule(posterior=(0.5, 0.02, 0.47, 0.01)), alarm)  # dead below 0.1 / 4
    assert "2 of 4 latents are dead (z1, z3)" in message
    assert "AggregatePosteriorBalanceLoss" in message
    assert alarm.raised == {"dead"}


def test_low_perplexity():
    (message,) = messages(UsageModule({**HEALTHY, "diagnostics/latent_usage_perplexity": 1.9}))
    assert "1.90 of 4 latents" in message
    assert messages(UsageModule({**HEALTHY, "diagnostics/latent_usage_perplexity": 2.1})) == []


@pytest.mark.parametrize(("weight", "alarms"), [(None, 1), (0.0, 1), (1.0, 0)])
def test_zero_prior_kl_matters_only_while_no_balance_acts(weight, alarms):
    module = UsageModule({**HEALTHY, "kl_prior_loss": 0.001})
    if weight is not None:
        module.losses["balance"] = AggregatePosteriorBalanceLoss(weight)
    raised = messages(module)
    assert len(raised) == alarms
    for message in raised:
        assert "the posterior ignores y (posterior entropy 0.10, router entropy 1.30 of at most 1.39 nats)" in message
        assert "add an AggregatePosteriorBalanceLoss (weight 1 is a good start)" in message


@pytest.mark.parametrize(("true", "alarms"), [(0.001, 1), (0.5, 0)])
def test_free_nats_and_targets_do_not_hide_a_prior_kl_of_zero(true, alarms):
    """The loss is at its floor then, or away from its target; the KL itself is logged beside it."""
    for loss in (0.5, 0.0):
        raised = messages(UsageModule({**HEALTHY, "kl_prior_loss": loss, "diagnostics/prior_kl": true}))
        assert len(raised) == alarms
        assert all("the posterior ignores y" in message for message in raised)


@pytest.mark.parametrize(("ways", "acts"), [([0, 1, 2, 3], False), ([0, 0, 1, 1], True), ([0, 0, 0, 0], True)])
def test_a_balance_of_the_latents_of_one_way_acts_where_a_way_has_several(ways, acts):
    module = UsageModule({**HEALTHY, "kl_prior_loss": 1e-4, "diagnostics/latent_usage_perplexity": 1.9})
    module.losses["balance"] = AggregatePosteriorBalanceLoss(1.0, prior="ways")
    module.seed_ways = torch.tensor(ways)
    found = messages(module)
    assert len(found) == (1 if acts else 2)
    assert all(
        ("raise the weight of the balance term" if acts else "no prior: with `ways` it is 0") in m for m in found
    )


def test_equal_latents():
    (message,) = messages(UsageModule({**HEALTHY, "diagnostics/inter_latent_jsd/weighted_mean": 1e-5}))
    assert "every latent writes the same text" in message
    assert "latent_token_std" in message


def test_every_cause_once_even_when_all_happen():
    nothing = dict.fromkeys(HEALTHY, 0.0)
    raised = messages(UsageModule(nothing, (1.0, 0.0, 0.0, 0.0)), epochs=5)
    assert len(raised) == 4


def test_grace_missing_keys_and_sanity_check():
    bad = UsageModule(dict.fromkeys(HEALTHY, 0.0))
    assert messages(bad, CollapseAlarm(grace_validations=3), epochs=3) == []
    assert messages(UsageModule({})) == []
    assert messages(FakeModule(num_latents=0)) == []


def test_stop_ends_the_run():
    alarm = CollapseAlarm(stop=True)
    trainer = make_trainer(alarm, max_epochs=10)
    with pytest.warns(CollapseWarning):
        trainer.fit(UsageModule({**HEALTHY, "kl_prior_loss": 0.0}), FakeData())
    assert trainer.current_epoch == 2


def test_state_survives_a_resume():
    alarm = CollapseAlarm()
    assert len(messages(UsageModule({**HEALTHY, "kl_prior_loss": 0.0}), alarm)) == 1
    resumed = CollapseAlarm()
    resumed.load_state_dict(alarm.state_dict())
    assert messages(UsageModule({**HEALTHY, "kl_prior_loss": 0.0}), resumed) == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"usage_fraction": 0.0}, "usage_fraction must be in"),
        ({"kl_floor": -1.0}, "kl_floor must be >= 0 nats, got -1"),
    ],
)
def test_bad_arguments(options, text):
    with pytest.raises(ValueError, match=text):
        CollapseAlarm(**options)


def test_a_continuous_latent_without_active_dimension_is_named():
    alarm = CollapseAlarm()
    metrics = {"val/diagnostics/active_units": torch.tensor(0.0), "val/diagnostics/active_units_delta": 0.01}
    assert set(alarm.causes(metrics, object())) == {"inactive"}
    assert "less than 0.01" in alarm.causes(metrics, object())["inactive"]
    assert not alarm.causes({"val/diagnostics/active_units": torch.tensor(1.0)}, object())
