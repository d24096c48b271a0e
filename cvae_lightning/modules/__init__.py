"""LightningModules: the entangled model and the conditional VAEs built on it."""

from cvae_lightning.modules.base import CVAEModule
from cvae_lightning.modules.continuous import ContinuousCVAE
from cvae_lightning.modules.discrete import SharedDiscreteCVAE
from cvae_lightning.modules.entangled import EntangledLM
from cvae_lightning.modules.lora import LoRA
from cvae_lightning.modules.seeding import LatentSeeding

__all__ = ["CVAEModule", "ContinuousCVAE", "EntangledLM", "LatentSeeding", "LoRA", "SharedDiscreteCVAE"]
