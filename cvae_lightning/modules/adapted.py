"""What is trained of the language models of a CVAE, and which of their weights its checkpoints hold."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from cvae_lightning.backbones.adaptation import Adaptation, sharing_copy, train_rows
from cvae_lightning.backbones.causal_lm import add_token_rows
from cvae_lightning.modules.base_weights import FORMAT_KEY, MARKERS, WEIGHTS, check_base, describe_base
from cvae_lightning.modules.language_model import LanguageModule, describe_lm
from cvae_lightning.modules.lora import LoRA


class AdaptedModule(LanguageModule):
    """A module around an entangled model of which all, adapters and token rows, or token rows alone are trained.

    Without ``full`` adaptation, generator, posterior and entangled model are three sets of modules around one set of
    weights: what is trained stands beside it, and the entangled model is the generator without that.
    """

    entangled: str | dict[str, str]

    def adapt(self, lm: Any, adaptation: Adaptation, lora: LoRA | None, keep_frozen: bool) -> None:
        """Take ``lm``, the entangled model as it was loaded, for the generator.

        Raises:
            ValueError: for an unknown adaptation, or a ``lora`` that it has no use for.
        """
        if adaptation not in ("full", "lora", "frozen"):
            raise ValueError(f"adaptation must be 'full', 'lora' or 'frozen', got {adaptation!r}")
        if lora is not None and adaptation != "lora":
            raise ValueError(f"lora has no effect with adaptation={adaptation}: set that to lora, or lora to null")
        self.lm = lm
        self.adaptation = adaptation
        self.lora = LoRA() if adaptation == "lora" and lora is None else lora
        self.keep_frozen = keep_frozen
        self._reference: list[Any] = []  # a list keeps the entangled model out of parameters() and checkpoints
        self._frozen: list[nn.Parameter] = []
        self._base: dict[str, str] = {}
        self._new_markers = [i for i in self.template.added_ids if i in self.template.marker_ids.values()]
        if adaptation == "full":
            return
        if isinstance(self.entangled, str):
            self._base = describe_base(self.entangled, lm) | {MARKERS: json.dumps(self._new_markers)}
        else:  # of a checkpoint, whose tokenizer has the markers that its base lacks
            self._base = {name: text for name, text in self.entangled.items() if name.startswith("base_")}
            self._new_markers = json.loads(self._base.get(MARKERS, "[]"))
        self._add_marker_rows(lm)
        self._reference.append(sharing_copy(lm).eval())
        self._frozen = list(lm.parameters())
        self.freeze_entangled()

    def freeze_entangled(self) -> None:
        """Leave the entangled model's own weights untrained, unless the adaptation is ``full``."""
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def add_rows(self, std: float) -> None:
        """Give the generator rows for all tokens of the template; without ``full`` adaptation beside its weights."""
        if self.adaptation == "full":
            add_token_rows(self.lm, len(self.template), std, added=self.template.added_ids)
        else:
            self._adapt(self.lm)

    def posterior_backbone(self) -> Any:
        """Return the model that the posterior network starts from; without ``full`` adaptation on the same weights."""
        if self.adaptation == "full":
            return deepcopy(self.lm)
        lm = sharing_copy(self._reference[0]).train()
        self._adapt(lm)
        return lm

    def _adapt(self, lm: Any, latents: bool = True) -> None:
        if self.lora is not None:
            self.lora.add_to(lm)
        rows, size = list(self.template.marker_ids.values()), 0  # of these the entangled model has all
        if latents:
            rows, size = rows + self.template.all_latent_ids, len(self.template)
        train_rows(lm, rows, size)

    def _add_marker_rows(self, lm: Any) -> None:
        """Give a foreign model rows for the markers, the same ones whenever it is loaded.

        Latents get none: they would take probability from y.
        """
        rows = max(self.template.marker_ids.values()) + 1
        add_token_rows(lm, rows, 1.0, torch.Generator().manual_seed(0), self._new_markers)

    def _frozen_names(self) -> list[str]:
        frozen = {id(parameter) for parameter in self._frozen}
        return [name for name, value in self.named_parameters(remove_duplicate=False) if id(value) in frozen]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Describe model and tokenizer among the hyperparameters, and leave out weights that are found elsewhere."""
        super().on_save_checkpoint(checkpoint)
        hyperparameters = dict(checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {}))
        hyperparameters["entangled"] = describe_lm(self.lm, self.template.tokenizer)
        if self._base and not self.keep_frozen:
            hyperparameters["entangled"] |= self._base
            for name in self._frozen_names():
                checkpoint["state_dict"].pop(name, None)
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = hyperparameters

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put this model's frozen weights where the checkpoint has left them out.

        Raises:
            ValueError: if they are not those that it was trained on, or it was trained with another adaptation.
        """
        super().on_load_checkpoint(checkpoint)
        given = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY) or {}
        described = given.get("entangled")
        trained = given.get("adaptation", self.adaptation if FORMAT_KEY in checkpoint else "full")
        if trained != self.adaptation:
            raise ValueError(
                f"the checkpoint was trained with adaptation={trained}, this model has {self.adaptation}: set "
                f"model.adaptation to {trained}"
            )
        if isinstance(described, dict) and WEIGHTS in described:
            name = self.entangled if isinstance(self.entangled, str) else "this model"
            check_base(self._base.get(WEIGHTS), described[WEIGHTS], name)
            own = self.state_dict()
            checkpoint["state_dict"] |= {name: own[name] for name in self._frozen_names()}
