"""Loads an exported folder as a module of this package, without the run, the data or the losses it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cvae_lightning.backbones.causal_lm import load_causal_lm
from cvae_lightning.export.folder import ARGUMENTS, EXPORT_FILE, FORMAT, latent_weights
from cvae_lightning.export.restore import KINDS
from cvae_lightning.losses import FreeEnergyLoss, LossCallback, PosteriorDistillationLoss
from cvae_lightning.modules import ContinuousCVAE, SharedDiscreteCVAE
from cvae_lightning.modules.language_model import describe_lm


class _NoPosterior(nn.Module):
    """Stands where the posterior network was not exported."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Say so."""
        raise ValueError(
            "this export holds no posterior network: export the checkpoint again with --posterior (tokens as latents "
            "have an exact posterior too, which needs none: posterior='exact')"
        )


def load_export(folder: str | Path) -> SharedDiscreteCVAE | ContinuousCVAE:
    """Load a folder written by ``cvae-lightning export``, for use: on the CPU, in evaluation mode.

    ``route``, ``generate`` and, for tokens as latents, ``generate_all``, ``infer``, ``log_likelihood`` and
    ``log_evidence`` work as on the checkpoint. What needs the posterior network (``infer`` and ``log_evidence`` of a
    Gaussian latent, ``infer`` with ``posterior="amortized"`` or of a model trained with that) asks for an export with
    ``--posterior``.

    Args:
        folder: the exported folder.

    Raises:
        ValueError: if it is no export, a file of it is missing or broken, or a later version wrote it.
    """
    folder = Path(folder)
    kind, arguments, content = _read(folder)
    files = content["files"]
    losses: dict[str, LossCallback | None] = {"free_energy_loss": FreeEnergyLoss()}
    if kind == "discrete":
        losses["posterior_distillation_loss"] = PosteriorDistillationLoss()  # what keeps a posterior network up to date
    with torch.random.fork_rng([]):
        try:
            module = KINDS[kind](entangled=str(folder), losses=losses, c_base=1.0, **arguments)
        except TypeError as error:
            raise ValueError(f"{folder / EXPORT_FILE}: {error}") from error
    try:  # building the module has drawn new latents
        module.lm.load_state_dict(load_causal_lm(str(folder)).state_dict())
    except RuntimeError as error:
        why = str(error).splitlines()[1:2] or [str(error)]
        raise ValueError(
            f"{folder}: its model is not the one that {EXPORT_FILE} describes: {why[0].strip()}"
        ) from error
    module.entangled, module.c_base = describe_lm(module.lm, module.template.tokenizer), None
    wanted = latent_weights(module)
    if wanted:
        _load(module, wanted.keys(), "", folder, files.get("latent"))
    if "posterior" in files:
        network = module.posterior_network
        _load(network, network.state_dict().keys(), "posterior_network.", folder, files["posterior"])
    else:
        module.posterior_network = _NoPosterior()  # type: ignore[assignment]
    module.longest_y.fill_(content["longest_y"])
    return module.eval()


def _read(folder: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    path = folder / EXPORT_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no {EXPORT_FILE}: `cvae-lightning export` writes folders that have") from error
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    kinds = {"format": int, "kind": str, "arguments": dict, "longest_y": int, "files": dict}
    for key, expected in kinds.items():
        found = content.get(key) if isinstance(content, dict) else None
        if not isinstance(found, expected):
            raise ValueError(f"{path}: expected {key!r} to be of type {expected.__name__}, got {found!r:.60}")
    if content["format"] > FORMAT:
        raise ValueError(f"{path}: format {content['format']} is of a later version; this one reads {FORMAT}")
    kind = content["kind"]
    if kind not in KINDS:
        raise ValueError(f"{path}: kind must be {' or '.join(KINDS)}, got {kind!r}")
    unknown = content["arguments"].keys() - set(ARGUMENTS[kind])
    if unknown:
        raise ValueError(f"{path}: unknown argument {sorted(unknown)[0]!r}; expected {', '.join(ARGUMENTS[kind])}")
    return kind, content["arguments"], content


def _load(module: nn.Module, names: Any, shown: str, folder: Path, file: Any) -> None:
    """Load weights that must be exactly those of these names.

    Raises:
        ValueError: naming the file, and the weight that is missing, superfluous or of another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / Path(str(file)).name  # never a file elsewhere
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    expected, state = set(names), module.state_dict()
    for name in sorted(expected ^ weights.keys()):
        raise ValueError(f"{path}: {shown}{name} is {'missing' if name in expected else 'superfluous'}")
    for name, value in weights.items():
        if value.shape != state[name].shape:
            raise ValueError(f"{path}: {shown}{name} has shape {[*value.shape]}, expected {[*state[name].shape]}")
    module.load_state_dict(weights, strict=False)
