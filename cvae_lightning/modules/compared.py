"""What a CVAE knows of the frozen entangled model it is compared with: its costs of every token, and their mean."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from cvae_lightning.backbones.adaptation import sharing_copy
from cvae_lightning.backbones.artifact import Baseline, check_c_base
from cvae_lightning.backbones.causal_lm import load_causal_lm, load_tokenizer
from cvae_lightning.modules.adapted import AdaptedModule
from cvae_lightning.modules.entangled import measure_baseline
from cvae_lightning.modules.frozen_baseline import FrozenBaseline
from cvae_lightning.modules.language_model import rebuild_lm
from cvae_lightning.outputs import PairBatch


class ComparedModule(AdaptedModule):
    """A module that is compared with the frozen entangled model it started from.

    The entangled model is loaded when its costs are first asked for, and let go of once they are all on disk.
    """

    artifact: Baseline | None
    c_base: float | None

    def take_entangled(
        self,
        entangled: str | dict[str, str],
        c_base: float | str,
        baseline: Literal["frozen", "dynamic"],
        baseline_cache: bool | str,
    ) -> tuple[Any, Any]:
        """Take the entangled model of a folder or hub name, or its description in a checkpoint; return (lm, tokenizer).

        Raises:
            ValueError: for a ``c_base`` that is neither 'auto' nor a positive number.
        """
        self.entangled = entangled
        self.baseline_policy = baseline
        if isinstance(entangled, str):
            lm, tokenizer = load_causal_lm(entangled), load_tokenizer(entangled)
            self.artifact = Baseline.load(entangled)
        else:
            (lm, tokenizer), self.artifact = rebuild_lm(entangled), None
        if not isinstance(c_base, str):
            self.c_base = check_c_base(c_base, "model.c_base")
        elif c_base == "auto":
            self.c_base = self.artifact.c_base if self.artifact else None
        else:
            raise ValueError(f"c_base must be 'auto' or a positive number of nats per token, got {c_base!r}")
        self.frozen_baseline = FrozenBaseline(baseline_cache, lm if isinstance(entangled, str) else None)
        return lm, tokenizer

    @property
    def has_reference(self) -> bool:
        """Whether the frozen entangled model is at hand (it is not after loading a checkpoint on its own)."""
        return bool(self._reference) or isinstance(self.entangled, str)

    def reference(self) -> Any:
        """Return the frozen entangled model: loaded when it is first needed, or what has been adapted, as it was."""
        if not self._reference:
            if not isinstance(self.entangled, str):
                raise ValueError(
                    "a loss needs the entangled model's NLL, but this module was restored from a checkpoint alone: "
                    "give model.entangled as a folder or hub name"
                )
            lm = load_causal_lm(self.entangled).eval().requires_grad_(False)
            self._add_marker_rows(lm)
            self._reference.append(lm)
        if self._frozen or self._reference[0].device != self.device:  # shared weights move by themselves, buffers not
            self._reference[0].to(self.device)
        return self._reference[0]

    def entangled_copy(self) -> Any:
        """Return a copy of the entangled model to be trained: as the generator is, but without latents."""
        if self.adaptation == "full":
            return deepcopy(self.reference()).requires_grad_(True)
        lm = sharing_copy(self.reference())
        self._adapt(lm, latents=False)
        return lm

    @torch.no_grad()
    def baseline_nll(self, batch: PairBatch) -> Tensor:
        """Return b_t = -log p_ref(y_t|x,y_<t), [B, T]: of the frozen entangled model, or of the backbone without z."""
        if self.baseline_policy == "dynamic" and self.training:
            return self.free_token_nll(self.lm, batch)
        cache = self.frozen_baseline.cache(self)
        if cache is None:
            return self.free_token_nll(self.reference(), batch)
        return cache.rows(batch.index, batch.y_mask, lambda: self.free_token_nll(self.reference(), batch))

    def on_train_epoch_end(self) -> None:
        """Let go of the entangled model once its costs are known."""
        self.frozen_baseline.fill(self)
        self._release_reference()

    def on_validation_end(self) -> None:
        """Let go of the entangled model once its costs are known."""
        self._release_reference()

    def _release_reference(self) -> None:
        if self._reference and not self._frozen and self.frozen_baseline.done(self):
            self._reference.clear()

    def setup(self, stage: str) -> None:
        """Compare the artifact with the data it is now used on."""
        self.frozen_baseline.caches.clear()
        data = getattr(self.trainer, "datamodule", None)
        if self.artifact and data is not None and hasattr(data, "fingerprint"):
            found = {"data": data.fingerprint("val"), "template": self.template.fingerprint()}
            for what, now in found.items():
                if getattr(self.artifact, what) != now:
                    rank_zero_warn(
                        f"c_base was measured with {what} fingerprint {getattr(self.artifact, what)} "
                        f"({self.entangled}/baseline.json), this run has {now}: rho_recon compares unlike things. "
                        "Measure it on this data, with the config that the entangled model was trained by, "
                        f"`cvae-lightning validate --config ENTANGLED --model.init_args.model {self.entangled} "
                        "--model.init_args.config null`, or set model.c_base"
                    )

    def on_fit_start(self) -> None:
        """Measure c_base where the artifact holds none."""
        self.ensure_c_base()

    def on_validation_start(self) -> None:
        """Measure c_base where the artifact holds none."""
        self.ensure_c_base()

    def on_test_start(self) -> None:
        """Measure c_base where the artifact holds none."""
        self.ensure_c_base()

    def ensure_c_base(self) -> None:
        """Measure c_base on the validation split if it was neither given nor found in the artifact.

        Raises:
            ValueError: if there is no data module to measure it on.
        """
        if self.c_base is None and self.has_reference:
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            if data is None:
                raise ValueError(
                    f"{self.entangled} holds no baseline.json with c_base, the entangled model's cost per token, and "
                    "there is no data module to measure it on: set model.c_base, or give a data module"
                )
            loader = data.val_dataloader()
            self.c_base = measure_baseline(self, self.reference(), loader)[0]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint self-contained: config, tokenizer and c_base among the hyperparameters."""
        super().on_save_checkpoint(checkpoint)
        if self.c_base is not None:
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]["c_base"] = self.c_base
