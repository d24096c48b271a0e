"""How TensorBoard arranges a run: the charts of its custom-scalars page and the columns of its hparams page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

CONTRIBUTION = "loss_contrib/fraction_abs/"
"""Part of a log key before the name of a loss term; its stage is ``train`` or, without one, ``val``."""

FINAL_METRICS = (
    "val/elbo",
    "val/rho_recon",
    "val/marginal_nll",
    "val/baseline_nll",
    "val/alignment/one_to_one",
    "val/alignment/ami",
    "val/controlled/alignment_one_to_one",
    "val/controlled/final_answer_accuracy",
    "val/sampled/final_answer_accuracy",
    "val/diagnostics/latent_usage_perplexity",
    "val/probe/posterior_accuracy",
)
"""Scalars whose last value stands beside the hyperparameters when a fit has ended."""

_FIRST = ("latent_dim", "learning_rate", "norm_dim", "num_latents", "posterior", "posterior_temperature")
_WITHOUT_EFFECT = (
    "baseline_cache",
    "branch_activations",
    "branch_method",
    "num_latent_chunk",
    "on_overflow",
    "padding_side",
)

_OBJECTIVE = {
    "contribution of each term": (f"train/{CONTRIBUTION}.*",),
    "weights": ("train/weight/.*",),
    "objective": ("train/loss", "val/loss"),
    "ELBO (nats per solution)": ("val/elbo",),
}
_REFERENCE = {
    "NLL (nats per token)": ("val/marginal_nll", "val/baseline_nll"),
    "rho_recon (1 = z carries nothing)": ("val/rho_recon",),
}
_ALIGNMENT = {
    "one-to-one, and its ceiling": ("val/alignment/one_to_one", "val/controlled/alignment_.*"),
    "information": ("val/alignment/(ami|nmi|homogeneity)",),
    "coverage": ("val/controlled/local_strategy_.*",),
    "final answer": ("val/(controlled|sampled|greedy)/final_answer_accuracy",),
}
_LATENTS = {
    "entropies (nats)": ("val/diagnostics/(posterior|router)_entropy",),
    "inter-latent JSD (nats per token)": ("val/diagnostics/inter_latent_jsd/.*",),
    "KL of posterior and router (nats)": ("val/kl_prior_loss", "val/diagnostics/prior_kl"),
}
_DISCRETE = {
    "usage perplexity": ("val/diagnostics/latent_usage_perplexity",),
    "posterior network": ("val/alignment_amortized/one_to_one",),
    "router (nats)": ("val/router/.*cross_entropy",),
}
_CONTINUOUS = {
    "linear probe": ("val/probe/.*",),
    "router marginal": ("val/router_marginal/.*",),
    "active units": ("val/diagnostics/active_units",),
    "posterior deviation": ("val/posterior_std/.*",),
}


def layout(discrete: bool) -> dict[str, dict[str, list[Any]]]:
    """Return the layout of TensorBoard's custom-scalars tab for a module with K latents, or with Gaussian ones."""
    charts = {
        "objective": _OBJECTIVE,
        "against the entangled model": _REFERENCE,
        "alignment": _ALIGNMENT,
        "latents": _LATENTS | (_DISCRETE if discrete else _CONTINUOUS),
    }
    # TensorBoard matches from the start of a tag only: without "$", val/loss would draw val/loss_contrib/... too
    return {
        title: {name: ["Multiline", [f"{tag}$" for tag in tags]] for name, tags in category.items()}
        for title, category in charts.items()
    }


def hyperparameter_summaries(given: Mapping[str, Any], metrics: Iterable[str]) -> list[Any]:
    """Return what TensorBoard's hparams page reads: columns of a run, and which scalars stand beside them.

    The page shows the first five columns until told otherwise, sorted by "differs between runs", then by name; so the
    choices that matter most are marked as differing.
    """
    experiment, start, end = hparams(readable_hyperparameters(given), dict.fromkeys(metrics, 0.0))
    written = experiment.value[0].metadata.plugin_data
    parsed = HParamsPluginData.FromString(written.content)
    for column in parsed.experiment.hparam_infos:
        column.differs = column.name in _FIRST
    written.content = parsed.SerializeToString()
    return [experiment, start, end]


def readable_hyperparameters(given: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Return nested hyperparameters by path, as ``losses/kl_prior_loss/weight``.

    Left out is what no result depends on: names that begin with ``_``, None, the classes of parts, how a step is
    computed. Long texts (a checkpoint's tokenizer) are cut.
    """
    flat: dict[str, bool | int | float | str] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, part in value.items():
                if key != "class_path":
                    add(name if key == "init_args" else f"{name}/{key}", part)
        elif isinstance(value, bool | int | float):
            flat[name] = value
        elif value is not None:
            text = str(value)
            flat[name] = text if len(text) <= 80 else text[:79] + "…"

    for key, value in given.items():
        if not key.startswith("_") and key not in _WITHOUT_EFFECT:
            add(key, value)
    return flat
