"""Warns when the latent stops carrying information, names the likely cause and the recipe to try."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from cvae_lightning.callbacks.epoch_results import dead_latents, logged, metric_result


class CollapseWarning(UserWarning):
    """The latent carries little or no information."""


class CollapseAlarm(Callback):
    """Reads the diagnostics of every validation and warns once per cause.

    Causes for a continuous latent: ``inactive`` (no active dimension). For a discrete one: ``dead`` (latents that the
    posterior hardly uses), ``usage`` (usage perplexity far below K), ``posterior`` (prior KL near zero while no
    aggregate-posterior balance term acts: the posterior ignores y; it is read from a loss named ``kl_prior_loss``, for
    which weight 0 will do) and ``generator`` (inter-latent JSD near zero: every z writes the same text).

    Args:
        usage_fraction: lowest healthy usage perplexity, as a fraction of K; in (0, 1].
        kl_floor: prior KL below which the posterior counts as equal to the router; nats per example.
        jsd_floor: mean inter-latent JSD below which the latents count as equal; nats per token.
        grace_validations: first validations that are not judged, because every run starts without structure.
        stop: stop training at the first alarm.

    Raises:
        ValueError: if ``usage_fraction`` is outside (0, 1] or a floor is negative.
    """

    def __init__(
        self,
        usage_fraction: float = 0.5,
        kl_floor: float = 0.01,
        jsd_floor: float = 0.001,
        grace_validations: int = 1,
        stop: bool = False,
    ) -> None:
        if not 0 < usage_fraction <= 1:
            raise ValueError(f"CollapseAlarm: usage_fraction must be in (0, 1], got {usage_fraction}")
        for name, value in (("kl_floor", kl_floor), ("jsd_floor", jsd_floor)):
            if value < 0:
                raise ValueError(f"CollapseAlarm: {name} must be >= 0 nats, got {value}")
        self.usage_fraction = usage_fraction
        self.kl_floor = kl_floor
        self.jsd_floor = jsd_floor
        self.grace_validations = grace_validations
        self.stop = stop
        self.raised: set[str] = set()
        """Causes warned about so far."""
        self._validations = 0
        self._dead: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the causes warned about and the number of validations seen."""
        return {"raised": sorted(self.raised), "validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.raised = set(state_dict["raised"])
        self._validations = state_dict["validations"]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the latent usage on every rank, before the module can reset it."""
        self._dead = dead_latents(metric_result(pl_module, "usage"))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the validation that ended; never the sanity check."""
        if trainer.sanity_checking:
            return
        self._validations += 1
        if self._validations <= self.grace_validations:
            return
        for cause, message in self.causes(trainer.callback_metrics, pl_module).items():
            if cause in self.raised:
                continue
            self.raised.add(cause)
            rank_zero_warn(f"step {trainer.global_step}: {message}", category=CollapseWarning)
            if self.stop:
                trainer.should_stop = True

    def causes(self, metrics: Mapping[str, Any], pl_module: Any) -> dict[str, str]:
        """Return ``{cause: message}`` for one set of logged metrics."""
        k = int(getattr(pl_module, "num_latents", 0) or 0)
        perplexity = logged(metrics, "val/diagnostics/latent_usage_perplexity")
        kl = logged(metrics, "val/diagnostics/prior_kl")  # itself, where the loss is of another form
        if math.isnan(kl):
            kl = logged(metrics, "val/kl_prior_loss")
        jsd = logged(metrics, "val/diagnostics/inter_latent_jsd/weighted_mean")
        acting, idle = _balances(pl_module)
        balanced = any(loss.weight != 0 for loss in acting)
        spread = (
            "raise the weight of the balance term"
            if balanced
            else "give the AggregatePosteriorBalanceLoss no prior: with `ways` it is 0, as every way has one latent"
            if idle
            else "add an AggregatePosteriorBalanceLoss (weight 1 is a good start)"
        )
        exact = "a FreeEnergyLoss with posterior: exact and posterior_temperature: 0.3"
        found: dict[str, str] = {}
        if logged(metrics, "val/diagnostics/active_units") == 0:
            delta = logged(metrics, "val/diagnostics/active_units_delta")
            found["inactive"] = (
                f"no latent dimension is active: posterior means vary by less than {delta:.3g} over the records. "
                "Likely cause: the model predicts y as well without z, so the KL wins. Try: posterior: importance "
                "with a PosteriorDistillationLoss, a lower posterior_temperature, or a lower weight of kl_prior_loss."
            )
        if self._dead and k > 1:
            names = ", ".join(f"z{i}" for i in self._dead)
            found["dead"] = (
                f"{len(self._dead)} of {k} latents are dead ({names}): hardly any solution is assigned to them. Likely "
                f"cause: other latents explained their solutions first. Try: {spread} and a RouterSupportLoss; if "
                "there are fewer strategies than latents, lower num_latents."
            )
        if k > 1 and perplexity < self.usage_fraction * k:
            found["usage"] = (
                f"usage perplexity is {perplexity:.2f} of {k} latents. Likely cause: most solutions share a few "
                f"latents. Try: {spread}; a RouterMarginalKLLoss keeps the router spread as well."
            )
        if k > 1 and kl < self.kl_floor and not balanced:
            found["posterior"] = (
                f"the prior KL is {kl:.4f} nats and no balance term acts: the posterior ignores y"
                f"{_entropies(metrics, k)}. Likely cause: the model predicts y as well without z, so the KL wins. Try: "
                f"{spread}, and {exact}."
            )
        if k > 1 and jsd < self.jsd_floor:
            found["generator"] = (
                f"the inter-latent JSD is {jsd:.5f} nats per token: every latent writes the same text. Likely cause: "
                f"the generator ignores its latent token. Try: {exact}, LatentSeeding, or a larger latent_token_std."
            )
        return found


def _balances(pl_module: Any) -> tuple[list[Any], list[Any]]:
    """Return the balance terms that can act, and those of each way's latents that are 0 as every way has one latent.

    By class name, because callbacks import no losses.
    """
    losses = (getattr(pl_module, "losses", None) or {}).values()
    name, ways = "AggregatePosteriorBalanceLoss", getattr(pl_module, "seed_ways", None)
    found = [loss for loss in losses if any(base.__name__ == name for base in type(loss).__mro__)]
    single = ways is not None and len(ways.unique()) == len(ways)
    idle = [loss for loss in found if single and getattr(loss, "prior", None) == "ways"]
    return [loss for loss in found if loss not in idle], idle


def _entropies(metrics: Mapping[str, Any], num_latents: int) -> str:
    parts = [
        f"{name} entropy {value:.2f}"
        for name in ("posterior", "router")
        if not math.isnan(value := logged(metrics, f"val/diagnostics/{name}_entropy"))
    ]
    return f" ({', '.join(parts)} of at most {math.log(num_latents):.2f} nats)" if parts else ""
