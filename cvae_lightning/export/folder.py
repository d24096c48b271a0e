"""The exported folder: a Hugging Face model and tokenizer, and beside them what does not fit into one."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor

from cvae_lightning.atomic_write import write_json
from cvae_lightning.backbones.adaptation import merged
from cvae_lightning.modules import ContinuousCVAE, SharedDiscreteCVAE

EXPORT_FILE = "cvae_export.json"
FORMAT = 1
"""Version of :data:`EXPORT_FILE`; a loader refuses a later one."""

POSTERIOR_FILE = "posterior_network.safetensors"
LATENT_FILES = {"discrete": "latent_norms.safetensors", "continuous": "latent_injection.safetensors"}
"""Weights with which the latent reaches the language model, by kind of model."""

LATENT_PARTS = ("latent_vectors.", "norms.", "prefix.", "router_head.")
"""Beginnings of the names of those weights."""

SHARED = ("posterior_temperature", "pooling", "max_length", "padding_side", "prefix_length")
ARGUMENTS = {
    "discrete": ("num_latents", "posterior", "norm_dim", *SHARED),
    "continuous": (
        *("latent_dim", "num_eval_samples", "injection", "prefix_hidden"),
        *("logvar_bounds", "posterior_initial_logvar", *SHARED),
    ),
}
"""Arguments of the module that its use depends on."""


def is_plain(module: SharedDiscreteCVAE | ContinuousCVAE) -> TypeGuard[SharedDiscreteCVAE]:
    """Return whether a Hugging Face folder alone holds the whole generator and router."""
    return isinstance(module, SharedDiscreteCVAE) and module.norms is None


def latent_weights(module: SharedDiscreteCVAE | ContinuousCVAE) -> dict[str, Tensor]:
    """Return what the language model alone lacks: conditioned norms, injected vectors, the Gaussian router."""
    return {name: value for name, value in module.state_dict().items() if name.startswith(LATENT_PARTS)}


def write_model(folder: Path, module: SharedDiscreteCVAE | ContinuousCVAE, kind: str, posterior: bool = False) -> int:
    """Write the model into an empty folder.

    Args:
        folder: where to.
        module: the model; it is left as it is.
        kind: ``discrete`` or ``continuous``.
        posterior: also write the posterior network, which is as large as the language model.

    Returns:
        Number of parameters of its language model.

    Raises:
        ValueError: if the posterior network is asked for and was never trained.
    """
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    if posterior and isinstance(module, SharedDiscreteCVAE) and not module.uses_posterior_network:
        raise ValueError("the posterior network of this model was not trained, and the exact posterior needs none")
    template = module.template
    plain = module.lm if module.adaptation == "full" else merged(module.lm)
    plain.save_pretrained(folder, safe_serialization=True)
    GenerationConfig(
        do_sample=False,
        max_new_tokens=module.max_new_tokens,
        eos_token_id=template.end_id,
        pad_token_id=template.pad_id,
        suppress_tokens=sorted({*template.marker_ids.values(), *template.all_latent_ids} - {template.end_id}),
    ).save_pretrained(folder)
    plain_tokenizer(template.tokenizer, template.pad_id).save_pretrained(folder)
    arguments = {name: module.hparams[name] for name in ARGUMENTS[kind] if name in module.hparams}
    files = {}
    if not is_plain(module):
        files["latent"] = LATENT_FILES[kind]
        save_file(_ready(latent_weights(module)), folder / files["latent"])
    if posterior:
        files["posterior"] = POSTERIOR_FILE
        network = module.posterior_network
        if module.adaptation != "full":
            network = copy.deepcopy(network)
            network.backbone = merged(network.backbone)
        save_file(_ready(network.state_dict()), folder / files["posterior"])
    write_json(
        folder / EXPORT_FILE,
        {"format": FORMAT, "kind": kind, "arguments": arguments, "longest_y": module.longest_seen, "files": files},
    )
    return sum(parameter.numel() for parameter in plain.parameters())


def plain_tokenizer(tokenizer: Any, pad_id: int) -> Any:
    """Return a copy that pads prompts for generation, and yields only what every causal model takes."""
    tokenizer = copy.deepcopy(tokenizer)
    for name, value in (("padding_side", "left"), ("model_input_names", ["input_ids", "attention_mask"])):
        setattr(tokenizer, name, value)
        tokenizer.init_kwargs[name] = value  # what is saved
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    return tokenizer


def check_target(target: Path, force: bool) -> None:
    """Raise if an export must not take the place of what is there.

    Raises:
        ValueError: for a file, for a folder with content, and with ``force`` for one that is no earlier export.
    """
    if target.exists() and not target.is_dir():
        raise ValueError(f"--out {target}: there is a file of this name, expected a folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not (target / EXPORT_FILE).is_file():
        raise ValueError(f"--out {target}: this folder has other content, which an export would replace: name another")
    if not force:
        raise ValueError(f"--out {target}: this folder holds an export already: name another, or give --force")


@contextmanager
def whole_folder(target: Path, force: bool = False) -> Iterator[Path]:
    """Yield a folder that takes the name ``target`` once all is written; after an error nothing has changed.

    Raises:
        ValueError: as :func:`check_target`.
    """
    target = target.absolute()
    check_target(target, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    new, old = work / "new", work / "old"
    try:
        new.mkdir()
        yield new
        for path in new.rglob("*"):  # safetensors writes files that only their owner may read
            path.chmod(new.stat().st_mode & (0o777 if path.is_dir() else 0o666))
        check_target(target, force)  # the writing took a while
        if target.exists():
            target.rename(old)
        try:
            os.rename(new, target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
    finally:
        if target.exists() or not old.exists():  # else the only copy of an earlier export is in there
            shutil.rmtree(work, ignore_errors=True)


def _ready(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}
