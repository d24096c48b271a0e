"""A training step asks the device for no value, so the host can run ahead: tensors of "meta" have none to give."""

import dataclasses

import pytest
import torch
import transformers.masking_utils
from tiny import RECORDS, all_losses, continuous_losses, tiny_artifact

from cvae_lightning.modules import ContinuousCVAE, LatentSeeding, SharedDiscreteCVAE


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("artifact"))


def discrete(artifact, **options):
    return SharedDiscreteCVAE(artifact, all_losses(), num_latents=3, **options)


def continuous(artifact, **options):
    return ContinuousCVAE(artifact, continuous_losses(), latent_dim=2, num_samples=2, injection="both", **options)


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (discrete, {"posterior": "exact", "norm_dim": 4}),
        (discrete, {"posterior": "amortized"}),
        (discrete, {"posterior": "exact", "seeding": LatentSeeding()}),
        (discrete, {"posterior": "exact", "branch_method": "grouped"}),
        (discrete, {"posterior": "exact", "num_latent_chunk": 2}),
        (continuous, {}),
    ],
)
def test_step(artifact, build, options, monkeypatch):
    module = build(artifact, **options).train()
    batch = module.template.collate(RECORDS)
    module._step(batch, "train")  # the one-time check of the branch method looks at values
    costs = module.baseline_nll(batch)  # on disk in a run
    # transformers looks whether there is padding, and leaves the mask out where there is none
    monkeypatch.setattr(transformers.masking_utils, "_ignore_causal_mask_sdpa", lambda *_, **__: False)
    module._is_seeded = hasattr(module, "seeded")  # read before the first step
    module.to("meta")
    module.baseline_nll = lambda batch: costs.to("meta")
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    module.log = module.log_dict = lambda *_, **__: None
    moved = dataclasses.replace(batch, **{name: value.to("meta") for name, value in tensors.items()})
    module.training_step(moved, 0).backward()
    missing = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
