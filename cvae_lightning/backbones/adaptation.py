"""Training little of a causal LM: the rows of a few tokens and low-rank adapters, around weights that stay as they are.

What is trained stands beside the weights, never in them: a second set of modules around the same tensors
(:func:`sharing_copy`) is the model as it was, at no memory of its own.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cvae_lightning.backbones.causal_lm import fill_rows

Adaptation = Literal["full", "lora", "frozen"]


class TokenRows(nn.Module):
    """Rows that stand in the place of some of a frozen table's, or behind its last one.

    Args:
        table: [V, D] embedding or head weight; left as it is.
        rows: tokens whose rows are trained.
        size: number of tokens; those from V on are all trained, and start at the mean of the table.
    """

    places: Tensor

    def __init__(self, table: Tensor, rows: list[int], size: int) -> None:
        super().__init__()
        inside = sorted(row for row in rows if row < len(table))
        behind = table.float().mean(0).to(table.dtype).expand(max(0, size - len(table)), -1)
        self.values = nn.Parameter(torch.cat([table[inside], behind]))
        self.register_buffer("places", torch.tensor(inside, dtype=torch.int64, device=table.device), persistent=False)
        self.behind = len(behind)
        self.index = {row: i for i, row in enumerate([*inside, *range(len(table), size)])}

    def forward(self, table: Tensor) -> Tensor:
        """Return the whole table [max(V, size), D]."""
        inside = len(self.places)
        return torch.cat([table, self.values[inside:]]).index_copy_(0, self.places, self.values[:inside])


class TokenTable(nn.Module):
    """An embedding or a head that computes as ``table`` would with other rows; in its place in a model.

    Args:
        table: the embedding or head; frozen.
        rows: its own rows; a tied embedding and head share one object.
    """

    def __init__(self, table: nn.Module, rows: TokenRows) -> None:
        super().__init__()
        self.table, self.rows = table.requires_grad_(False), rows

    @property
    def weight(self) -> Tensor:
        """The whole table."""
        return self.rows(self.table.weight)

    @property
    def bias(self) -> Tensor | None:
        """A head's bias, zero for the tokens behind; None where it has none."""
        bias: Any = getattr(self.table, "bias", None)
        return None if bias is None else nn.functional.pad(bias, (0, self.rows.behind))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return embeddings of tokens, or logits of hidden states."""
        tensors = {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})
        return functional_call(self.table, tensors, (inputs,))


def sharing_copy(lm: Any) -> Any:
    """Return a copy of a model with modules of its own and the very parameters of ``lm``."""
    return copy.deepcopy(lm, {id(parameter): parameter for parameter in lm.parameters()})


def train_rows(lm: Any, rows: list[int], size: int) -> None:
    """Train rows of the embedding (and of an untied head) alone, and grow both to ``size`` tokens; in place.

    Args:
        lm: a causal LM; what else is trained of it is not changed.
        rows: ids of the tokens, besides those from its present size on.
        size: number of tokens; a larger table keeps its size.
    """
    tables = lm.get_input_embeddings(), lm.get_output_embeddings()
    made = {id(table.weight): TokenRows(table.weight.detach(), rows, size) for table in tables}  # one if they are tied
    embedding, head = (TokenTable(table, made[id(table.weight)]) for table in tables)
    lm.set_input_embeddings(embedding)
    lm.set_output_embeddings(head)


@torch.no_grad()
def scatter_rows(lm: Any, rows: list[int], source: list[int], std: float) -> None:
    """Set rows of the embedding (and of an untied head) to the mean of other rows plus noise; see :func:`fill_rows`."""
    done: set[int] = set()
    for table in (lm.get_input_embeddings(), lm.get_output_embeddings()):
        weight, places = table.weight, rows
        known = weight[source]
        if isinstance(table, TokenTable):
            weight, places = table.rows.values, [table.rows.index[row] for row in rows]
        if id(weight) not in done:
            fill_rows(weight, places, known, std)
        done.add(id(weight))


def add_low_rank(
    lm: Any, rank: int, alpha: float, dropout: float = 0.0, target_modules: list[str] | None = None
) -> None:
    """Put low-rank adapters beside linear maps, which are frozen with all the rest; in place. It computes as before.

    Args:
        lm: a causal LM.
        rank: of the update.
        alpha: the update is scaled by alpha / rank.
        dropout: of what the adapters read.
        target_modules: names of the maps; None = all but the head.

    Raises:
        ValueError: if peft is not installed, or cannot adapt these maps.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(
            f"adaptation=lora needs the package peft ({error}): pip install 'cvae-lightning[lora]', or set adaptation "
            "to frozen or full"
        ) from error
    try:
        with warnings.catch_warnings():  # that it transposes the maps of GPT-2, as it should
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            config = LoraConfig(
                r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules or "all-linear"
            )
            inject_adapter_in_model(config, lm)
    except ValueError as error:
        raise ValueError(f"{type(lm).__name__} cannot have low-rank adapters there: {error}") from error


@torch.no_grad()
def merged(lm: Any) -> Any:
    """Return a plain copy of an adapted model, or of its decoder, that computes the same."""
    lm = copy.deepcopy(lm)
    for name, part in list(lm.named_modules()):
        if hasattr(part, "lora_A"):
            part.merge(safe_merge=True)
            lm.set_submodule(name, part.get_base_layer())
    whole: dict[int, nn.Parameter] = {}  # one where they are tied
    for name, part in list(lm.named_modules(remove_duplicate=False)):
        if isinstance(part, TokenTable):
            plain: Any = part.table
            plain.weight = whole.setdefault(id(part.rows), nn.Parameter(part.weight.clone()))
            if part.bias is not None:
                plain.bias = nn.Parameter(part.bias.clone())
            lm.set_submodule(name, plain)
            lm.config.get_text_config().vocab_size = len(plain.weight)
    return lm
