"""LatentSeeding: where the latents start, read off the entangled model's own solutions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from cvae_lightning.backbones.causal_lm import evaluating, positions_of
from cvae_lightning.backbones.generation import generate_within
from cvae_lightning.backbones.solution_features import solution_features
from cvae_lightning.modules.descent import descend
from cvae_lightning.modules.evened import evened
from cvae_lightning.modules.input_groups import environments_of, sides_of
from cvae_lightning.modules.sharding import is_sharded
from cvae_lightning.modules.solution_clusters import Clusters, cluster, combine, spread
from cvae_lightning.modules.text_use import batched
from cvae_lightning.outputs import Record
from cvae_lightning.progress import progress
from cvae_lightning.spec import HasSpec
from cvae_lightning.template import PromptTemplate

if TYPE_CHECKING:
    from cvae_lightning.modules.discrete import SharedDiscreteCVAE

BATCH = 512  # solutions generated or read at a time


class LatentSeeding(HasSpec):
    """Starts the latents at the clusters of the entangled model's own solutions, before the first step.

    The free energy has as many minima as there are ways to permute the latents for some of the inputs: each input is
    divided cleanly, but latent k means one strategy here and another there. Which one training falls into is decided
    in its first steps, by what the first token of y happens to be. So they are not left to chance:

    1. The entangled model solves each of ``num_inputs`` training inputs ``num_solutions`` times. Where it writes some
       solutions of an input more often than others, a copy of it learns in ``even_steps`` to write them equally often,
       and solves the inputs instead: or else clusters would be of common and of rare solutions, rather than of ways.
    2. What it does meanwhile, its hidden states and where it looks, less the mean over the solutions *of the same x*,
       keeps what differs between solutions of one input and loses the input itself. A strategy shifts it in the same
       direction for every x. An input that is always solved alike says nothing, and is left out.
    3. They are divided into K clusters, by k-means refined by linear discriminants: those that tell most, and most
       simply, about y given x. Of those that tell about the same, one that holds from one half of the inputs to the
       other. Where fewer clusters tell as much, these are the ways of solving, and some latents share one. The
       posterior network learns (x, y) -> latents of the cluster, all of them alike, in ``posterior_steps``.
    4. In the first ``hold_steps`` training steps the objective is weighed by that posterior, fading into the module's
       own over the second half of them; from then on the seeds play no part.

    No label is used, and nothing but inputs is read from the data. Source: this package; the within-input centring is
    the fixed-effects estimator (Mundlak 1978, doi 10.2307/1913646).

    Args:
        num_inputs: training records whose inputs are solved, each input once. Where fewer than half of these differ, as
            in a file that lists many solutions of an input in a row, further records give so many different inputs.
        num_solutions: solutions drawn for each of them, at least 2; a few times K.
        posterior_steps: optimizer steps of 64 solutions for the posterior network.
        hold_steps: training steps over which the seeds fade. Too few, and the exact posterior takes over where two
            latents write the same yet: it then swaps them for some kinds of inputs.
        leave_open: teach the posterior network that two solutions of an input which are taken for one way of solving,
            while another way has none, may be of either. Else it learns the clusters as they are, and training may
            never separate the two.
        seed: of sampling and clustering; null = the run's own (``seed_everything``).
        even_steps: optimizer steps of 64 solutions for the copy that writes an input's solutions equally often, where
            the entangled model does not; it takes the memory of training that model. 0 = never.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        num_inputs: int = 1024,
        num_solutions: int = 16,
        posterior_steps: int = 400,
        hold_steps: int = 400,
        leave_open: bool = True,
        seed: int | None = None,
        even_steps: int = 400,
    ) -> None:
        for name, value, least in (
            ("num_inputs", num_inputs, 1),
            ("num_solutions", num_solutions, 2),
            ("posterior_steps", posterior_steps, 1),
            ("even_steps", even_steps, 0),
            ("hold_steps", hold_steps, 1),
        ):
            if value < least:
                raise ValueError(f"seeding.{name} must be at least {least}, got {value}")
        self.num_inputs = num_inputs
        self.num_solutions = num_solutions
        self.posterior_steps = posterior_steps
        self.even_steps = even_steps
        self.hold_steps = hold_steps
        self.leave_open = leave_open
        self.seed = seed
        self.points: Tensor | None = None
        """What was clustered, its first two principal components, [N, 2]; for pictures."""
        self.clusters: Tensor | None = None
        """Their clusters, [N]."""
        self.ways: Tensor = torch.zeros(0, dtype=torch.int64)
        """The way of solving, or cluster, that each latent is seeded with, [K]."""

    @property
    def run_seed(self) -> int:
        """The seed, the run's own where none is given."""
        return torch.initial_seed() % 2**32 if self.seed is None else self.seed

    def share(self, step: int) -> float:
        """Return the share of the seeded posterior in the one that weighs the objective: 1, then falling to 0."""
        return max(0.0, min(1.0, 2 * (1 - step / self.hold_steps)))

    def start(self, module: SharedDiscreteCVAE) -> Tensor | None:
        """Seed on rank zero and give every rank the result.

        Returns:
            [K] int64, how many solutions each latent stands for; None where there are no seeds.

        Raises:
            ValueError: if the data module has no records to take inputs from, the entangled model is not at hand, or
                the module is divided over the processes.
        """
        if is_sharded(module):
            raise ValueError(
                "seeding teaches the posterior network on one process, which holds only a part of it under "
                "ModelParallelStrategy: set model.seeding to null (and give an AggregatePosteriorBalanceLoss without a "
                "prior), or go on with --ckpt_path from a checkpoint of a run in one process"
            )
        if not hasattr(getattr(module.trainer, "datamodule", None), "records"):
            raise ValueError("seeding takes inputs from data.records('train'): give a data module that has records")
        if not module.has_reference:
            raise ValueError(
                "seeding lets the entangled model solve inputs, but this module was restored from a checkpoint alone: "
                "give model.entangled as a folder or hub name, or set model.seeding to null"
            )
        counts = None
        if module.trainer.is_global_zero:
            devices = [module.device] if module.device.type == "cuda" else []
            with torch.random.fork_rng(devices):
                torch.manual_seed(self.run_seed)
                counts = self.seed_posterior(module)
        network = module.posterior_network
        state = {name: value.cpu() for name, value in network.state_dict().items()}
        counts, self.ways, state = module.trainer.strategy.broadcast((counts, self.ways, state))
        network.load_state_dict(state)
        return counts

    def seed_posterior(self, module: SharedDiscreteCVAE) -> Tensor | None:
        """Teach the posterior network the clusters; return their shares of the entangled model's solutions, [K].

        In solutions, of the inputs that are solved differently. None where fewer than K solutions differ.

        Raises:
            ValueError: if a record is longer than the model can read.
        """
        records: Sequence[Record] = module.trainer.datamodule.records("train")  # type: ignore[attr-defined]
        given = self.given(module.template, records)
        module.check_positions(module.template.collate(given))
        asked = list(dict.fromkeys(record.x for record in given))
        solutions = drawn = self.solve(module, asked, given)
        even = evened(module, drawn, self.even_steps, self.run_seed, BATCH // 2) if self.even_steps else None
        if even is not None:
            solutions = self.solve(module, asked, given, even)
        solutions = solved_differently(solutions)
        found = self.divide(module, module.reference() if even is None else even, solutions)
        was_uneven, even = even is not None, None  # lets go of the copy
        if found is None:
            rank_zero_warn(
                "seeding found fewer than K different solutions: the entangled model solves every input in one way, "
                "or the solutions were cut off, or too long to be read. Training starts without seeds."
            )
            return None
        self.clusters, self.points, self.ways = found.labels, found.points, found.ways
        sizes, latents = torch.bincount(found.labels), torch.bincount(found.ways)  # [W], of the ways of solving
        shown = ", ".join(map(str, sizes.tolist()))
        shared = f", which {module.num_latents} latents share," if len(sizes) < module.num_latents else ""
        rank_zero_info(
            f"seeding: {len(solutions)} solutions in clusters of {shown}{shared} by {found.view}; "
            f"they tell {found.information:.3f} nats about y given x"
        )
        if found.information <= 0:
            rank_zero_warn(
                "seeding: the clusters tell nothing about y given x that their own code would not take; the latents "
                "may come to mean anything. More inputs (seeding.num_inputs) or fewer latents may help."
            )
        shares = nn.functional.one_hot(found.labels, len(sizes)).float()
        if self.leave_open:
            shares = spread(shares, [solution.y for solution in solutions], self.num_solutions)
        shares = (shares / latents)[:, found.ways]  # in equal parts to the latents of a way
        self.teach(module, solutions, shares)
        if was_uneven:
            taught = {solution.x for solution in solutions}
            shares = self.read(module, [solution for solution in drawn if solution.x in taught])
        return shares.sum(0).round().long()

    def given(self, template: PromptTemplate, records: Sequence[Record]) -> list[Record]:
        """Return the records whose inputs are solved."""

        def fits(record: Record) -> bool:
            return not template.overflows([record])[0]

        every = (records[i] for i in range(len(records)))
        given = list(islice(filter(fits, every), self.num_inputs))
        seen = {record.x for record in given}
        if 2 * len(seen) < len(given):
            for record in every:
                if len(seen) == self.num_inputs:
                    break
                if record.x not in seen and fits(record):
                    seen.add(record.x)
                    given.append(record)
        return given

    def divide(self, module: SharedDiscreteCVAE, lm: Any, solutions: Sequence[Record]) -> Clusters | None:
        """Divide solutions, M of an input in a row, by what a causal LM does while it writes them."""
        if not solutions:
            return None
        xs = list(dict.fromkeys(solution.x for solution in solutions))
        features = solution_features(lm, module.template.unlimited(), solutions, BATCH // 2)
        centred = {name: self.centre(view) for name, view in features.items()}
        tokens = [ids[mask].tolist() for ids, mask in zip(*module.template.prefixes(xs), strict=True)]
        places = environments_of(self.of_inputs(features), tokens, self.run_seed)
        sides = sides_of(places[1:], self.run_seed)  # by a token; those by features may have nothing in common
        count, group, bar = module.num_latents, self.num_solutions, module.shows_progress
        return cluster(combine(centred), count, group, self.run_seed, places, sides, bar)

    def centre(self, features: Tensor) -> Tensor:
        """Return features [N * M, layers, D] less their mean over the M solutions of an input, [N * M, layers * D].

        Every layer is scaled to unit mean square, so that none outweighs the others. One that is the same for all
        solutions of an input, as embeddings are of the same tokens in another order, differs by rounding errors: zero.
        """
        rows = features.unflatten(0, (-1, self.num_solutions))
        centred = (rows - rows.mean(1, keepdim=True)).flatten(0, 1)
        size, scale = (t.square().sum(-1).mean(0).sqrt() for t in (features, centred))  # [layers]
        scaled = centred / scale.clamp_min(1e-12)[:, None]
        return scaled.where((scale > 1e-5 * size)[:, None], 0.0).flatten(1)

    def of_inputs(self, features: Mapping[str, Tensor]) -> Tensor:
        """Return what :meth:`centre` takes off: features of the inputs [N, F], every layer of one mean square."""
        means = [view.unflatten(0, (-1, self.num_solutions)).mean(1) for view in features.values()]
        varying = [mean - mean.mean(0) for mean in means]
        scales = [v.square().sum(-1).mean(0).sqrt().clamp_min(1e-9)[:, None] for v in varying]
        return torch.cat([(v / scale).flatten(1) for v, scale in zip(varying, scales, strict=True)], -1)

    def solve(
        self, module: SharedDiscreteCVAE, xs: Sequence[str], given: Sequence[Record], lm: Any = None
    ) -> list[Record]:
        """Return ``num_solutions`` solutions of each x in a row, drawn from ``lm``; None = the entangled model.

        A text may take more tokens than it was drawn in. One that the model cannot read any more gives way to another
        solution of the same x; an x without any is left out.
        """
        lm = module.reference() if lm is None else lm
        template = module.template
        longest_y = max(len(y) for _, y in template.segments(given))
        longest = positions_of(lm) or 2**31
        generator = torch.Generator(module.device).manual_seed(self.run_seed)
        markers = template.marker_ids
        rows = lm.get_output_embeddings().weight.shape[0]  # a padded table has some for the latents too
        latents = [i for i in template.all_latent_ids if i < rows]
        banned = torch.tensor([markers[t] for t in markers if t != "</y>"] + latents, device=module.device)
        behind = 2 + len(template.eos)  # <y>, and what closes a solution that is cut off
        branch = torch.tensor([[markers["<y>"]]], device=module.device).expand(self.num_solutions, 1)
        texts: list[str] = []
        with evaluating(lm):
            size = max(1, BATCH // self.num_solutions)
            for i in progress(range(0, len(xs), size), "seeding: solutions", module.shows_progress):
                some = xs[i : i + size]
                ids, mask = (t.to(module.device) for t in template.prefixes(some))
                ys = generate_within(
                    lm,
                    ids,
                    mask,
                    template.end_id,
                    longest_y + 8,
                    longest - behind + 1,  # <y> is behind x already
                    do_sample=True,
                    generator=generator,
                    banned=banned,
                    branches=branch,
                )
                texts += template.decode(ys.cpu())
        kept: list[Record] = []
        for n, x in enumerate(xs):
            drawn = [Record(x, y) for y in texts[n * self.num_solutions : (n + 1) * self.num_solutions]]
            fits = [len(prefix) + 1 + len(y) <= longest for prefix, y in template.segments(drawn)]
            readable = [record for record, fit in zip(drawn, fits, strict=True) if fit]
            others = cycle(readable)
            kept += [record if fit else next(others) for record, fit in zip(drawn, fits, strict=True) if readable]
        return [replace(record, index=i) for i, record in enumerate(kept)]

    def teach(self, module: SharedDiscreteCVAE, solutions: Sequence[Record], targets: Tensor) -> None:
        """Fit the posterior network to the clusters' shares of the solutions, [N, K], by cross-entropy."""
        source = torch.Generator().manual_seed(self.run_seed)
        template = module.template.unlimited()

        def loss() -> Tensor:
            rows = torch.randint(len(solutions), (64,), generator=source).tolist()
            batch = template.collate([solutions[i] for i in rows]).to(module.device)
            return -(targets[rows].to(module.device) * module.amortized_posterior(batch)).sum(-1).mean()

        network, bar = module.posterior_network, module.shows_progress
        descend(network, loss, module.learning_rate, self.posterior_steps, "seeding: posterior", bar)

    @torch.no_grad()
    def read(self, module: SharedDiscreteCVAE, solutions: Sequence[Record]) -> Tensor:
        """Return the posterior network's shares of the solutions, [N, K] fp32."""
        template, found = module.template.unlimited(), []
        with evaluating(module.posterior_network):
            for some in batched(solutions, BATCH // 2):
                batch = template.collate(some).to(module.device)
                found.append(module.amortized_posterior(batch).float().exp().cpu())
        return torch.cat(found)


def solved_differently(solutions: Sequence[Record]) -> list[Record]:
    """Return the solutions of the inputs that have at least two different ones: the others tell ways apart by noise."""
    different = Counter(x for x, _ in {(solution.x, solution.y) for solution in solutions})
    return [solution for solution in solutions if different[solution.x] > 1]
