"""LatentSeeding: its steps one by one, and runs that start with it."""

import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import QUIET, RECORDS, Alone, TinyData, all_losses, start, tiny_artifact, tiny_lm, tiny_tokenizer
from user_folder import enter_user_folder, failure

from cvae_lightning import LatentSeeding, SharedDiscreteCVAE, cli
from cvae_lightning.backbones.artifact import Baseline, save_artifact
from cvae_lightning.backbones.causal_lm import build_causal_lm
from cvae_lightning.backbones.solution_features import solution_features
from cvae_lightning.functional import exact_posterior
from cvae_lightning.losses import AggregatePosteriorBalanceLoss, FreeEnergyLoss, PosteriorDistillationLoss
from cvae_lightning.modules import seeding as module_of_seeding
from cvae_lightning.modules import solution_clusters
from cvae_lightning.outputs import Record
from cvae_lightning.template import PromptTemplate

K = 3
XS = [record.x for record in RECORDS]
POSTERIOR = "posterior_network."

pytestmark = pytest.mark.usefixtures("few_divisions")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("artifact"))


def small(**options):
    return LatentSeeding(**{"seed": 0, "num_solutions": 6, "posterior_steps": 15, "hold_steps": 4, **options})


def build(artifact, seeding=None, losses=None, **options):
    torch.manual_seed(3)
    losses = losses or {"free_energy_loss": FreeEnergyLoss(), "distillation": PosteriorDistillationLoss()}
    options = {"num_latents": K, "warmup_steps": 1, "learning_rate": 1e-2, **options}
    return SharedDiscreteCVAE(artifact, losses, seeding=seeding, **options)


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# Features.


def test_centring_leaves_what_differs_within_an_input():
    torch.manual_seed(0)
    scale = torch.tensor([1.0, 100.0, 0.01], dtype=torch.float64)[:, None]
    features = scale * torch.randn(5 * 4, 3, 6, dtype=torch.float64)  # 5 inputs, 4 solutions, 3 layers
    seeding = small(num_solutions=4)
    centred = seeding.centre(features)
    assert centred.shape == (20, 18)
    torch.testing.assert_close(centred.view(5, 4, 18).mean(1), centred.new_zeros(5, 18))
    layers = centred.view(20, 3, 6).square().sum(-1).mean(0)
    torch.testing.assert_close(layers, torch.ones_like(layers))
    of_x = 50 * scale * torch.randn(5, 1, 3, 6, dtype=torch.float64)
    moved = (features.view(5, 4, 3, 6) + of_x).flatten(0, 1)
    torch.testing.assert_close(seeding.centre(moved), centred)


def test_rounding_errors_are_no_differences():
    """Solutions that are alike, but were read in batches of other widths."""
    torch.manual_seed(0)
    features = torch.randn(5, 1, 3, 6).expand(-1, 4, -1, -1).flatten(0, 1)
    noisy = features + 1e-7 * torch.randn_like(features)
    assert not small(num_solutions=4).centre(noisy).any()
    one_layer = noisy.clone()
    one_layer[:, 1] += torch.randn(20, 6)
    kept = small(num_solutions=4).centre(one_layer).view(20, 3, 6).abs().amax((0, 2))
    assert kept[1] > 0.1
    assert not kept[[0, 2]].any()


# Solutions.


def test_solutions_come_in_rows_and_are_those_of_the_seed(artifact, monkeypatch):
    monkeypatch.setattr(module_of_seeding, "BATCH", 12)  # two inputs at a time, of different lengths
    model = build(artifact)
    before = torch.get_rng_state()
    found = small().solve(model, XS, RECORDS)
    assert [r.x for r in found] == [x for x in XS for _ in range(6)]
    assert [r.index for r in found] == list(range(30))
    assert {r.strategy for r in found} == {-1}
    assert len({r.y for r in found}) > 20
    assert small().solve(model, XS, RECORDS) == found
    assert small(seed=1).solve(model, XS, RECORDS) != found
    assert torch.equal(torch.get_rng_state(), before)
    longest = max(len(r.y) for r in RECORDS) + 2 + 8  # with </y> and <eos>
    assert max(len(r.y) for r in found) <= longest


def watch_ids(monkeypatch):
    """Collect the ids of every y that is generated, cut at its end."""
    seen, generate = [], module_of_seeding.generate_within

    def watching(lm, ids, mask, end_id, *args, **options):
        result = generate(lm, ids, mask, end_id, *args, **options)
        seen.extend(row[: [*row, end_id].index(end_id)] for row in result.tolist())
        return result

    monkeypatch.setattr(module_of_seeding, "generate_within", watching)
    return seen


@pytest.mark.parametrize("knows_latents", [False, True])
def test_a_solution_holds_no_marker_and_no_latent(tmp_path, monkeypatch, knows_latents):
    """Also where the entangled model has rows for the latents, as one whose table is padded has."""
    template = PromptTemplate(tiny_tokenizer(), K if knows_latents else 0)
    lm, _ = tiny_lm()
    if knows_latents:
        torch.manual_seed(0)
        lm = build_causal_lm(lm.config.to_dict(), len(template), template.pad_id)
    save_artifact(tmp_path, lm, template.tokenizer, Baseline(1.5, 10, "tiny-val", template.fingerprint()))
    model, seen = build(str(tmp_path)), watch_ids(monkeypatch)
    forbidden = {*model.template.marker_ids.values(), *model.template.all_latent_ids}
    rows = model.reference().get_input_embeddings().weight.shape[0]
    assert (max(model.template.all_latent_ids) < rows) == knows_latents
    small(num_solutions=20).solve(model, XS, RECORDS)
    assert len(seen) == 100
    assert sum(map(len, seen)) > 500
    assert not forbidden & {i for row in seen for i in row}


def test_solutions_fit_the_positions_of_the_model(tmp_path):
    """GPT-2 has a table of 64 positions and nothing behind it."""
    records = [Record("1" * 50, "22=3"), Record("7", "7" * 20)]
    model = build(tiny_artifact(tmp_path, "gpt2"))
    found = small(num_solutions=16).solve(model, [r.x for r in records], records)
    lengths = [len(prefix) + 1 + len(y) for prefix, y in model.template.segments(found)]
    assert max(lengths) == 64  # some were cut off, and all can be read
    views = solution_features(model.reference(), model.template, found)
    assert all(view.isfinite().all() for view in views.values())


def test_solutions_that_became_too_long_to_be_read_give_way(artifact, monkeypatch):
    """As with a tokenizer that writes a text of its own in more tokens than it was generated in."""
    decode, too_long = PromptTemplate.decode, {0, 3, *range(6, 12)}  # two of the first input's, all of the second's

    def longer(template, ids):
        return ["1" * 70 if i in too_long else text for i, text in enumerate(decode(template, ids))]

    model, seeding = build(artifact), small(num_solutions=6)
    whole = seeding.solve(model, XS[:3], RECORDS)
    monkeypatch.setattr(PromptTemplate, "decode", longer)
    found = seeding.solve(model, XS[:3], RECORDS)
    assert [r.x for r in found] == [x for x in (XS[0], XS[2]) for _ in range(6)]
    assert [r.index for r in found] == list(range(12))
    ys = [r.y for r in whole]
    assert [r.y for r in found] == [ys[1], ys[1], ys[2], ys[2], ys[4], ys[5], *ys[12:]]


def test_solutions_may_be_longer_than_records(artifact):
    model = build(artifact, small(), max_length=model_length(RECORDS))
    assert start(model)
    texts = [r.y for r in small().solve(model, XS, RECORDS)]
    assert max(map(len, texts)) > max(len(r.y) for r in RECORDS)


def model_length(records):
    template = PromptTemplate(tiny_tokenizer(), K)
    return max(template.length(*segment) for segment in template.segments(records))


def test_records_that_are_left_out_of_training_are_not_solved(artifact, monkeypatch):
    solved, solve = [], LatentSeeding.solve
    monkeypatch.setattr(LatentSeeding, "solve", lambda s, m, xs, given: solved.extend(xs) or solve(s, m, xs, given))
    records = [Record("3" * 70, "1"), *RECORDS]  # more than the model's 64 positions
    model = build(artifact, small(), max_length=model_length(RECORDS), on_overflow="skip")
    assert start(model, records)
    assert solved == XS


# The start of a module.


def test_what_shares_a_cluster_is_left_open_if_asked_for(artifact, monkeypatch):
    taught = []
    monkeypatch.setattr(LatentSeeding, "teach", lambda seeding, model, solutions, targets: taught.append(targets))
    monkeypatch.setattr(module_of_seeding, "spread", lambda shares, *rest: torch.full_like(shares, 1 / shares.shape[1]))
    for leave_open in (False, True):
        model = build(artifact, small(leave_open=leave_open))
        assert start(model)
        ways = model.seed_ways  # by chance some have several latents: the weights are random
        parts = torch.zeros(len(taught[-1]), int(ways.max()) + 1).index_add(1, ways, taught[-1])
        assert (parts == 1 / parts.shape[1]).all() == leave_open
        assert torch.equal(model.seed_counts, taught[-1].sum(0).round().long())
        if not leave_open:
            assert torch.equal(parts.argmax(-1), model.seeding.clusters)


def test_an_input_that_is_always_solved_alike_says_nothing(artifact, monkeypatch):
    """It belongs to no cluster, is not taught, and counts for no latent."""
    taught, shares, given, solve = [], [], [], LatentSeeding.solve
    alike = {XS[0], XS[3]}

    def solved(*args):
        return [Record(r.x, "1" if r.x in alike else r.y, index=r.index) for r in solve(*args)]

    def watching(views, count, group, seed, environments, sides, bar):
        given.append((len(next(iter(views.values()))), environments))
        return solution_clusters.cluster(views, count, group, seed, environments, sides, bar)

    monkeypatch.setattr(LatentSeeding, "solve", solved)

    def teach(seeding, model, solutions, targets):
        taught.extend(solutions)
        shares.extend(targets)

    monkeypatch.setattr(LatentSeeding, "teach", teach)
    monkeypatch.setattr(module_of_seeding, "cluster", watching)
    model = build(artifact, small())
    assert start(model)
    assert {r.x for r in taught} == {*XS} - alike
    assert len(taught) == 3 * 6
    assert torch.equal(model.seed_counts, torch.stack(shares).sum(0).round().long())
    ((points, environments),) = given
    assert points == 18
    assert [len(groups) for groups in environments] == [3]


def found_of(monkeypatch, ways, information):
    """Let the clustering find clusters in turn; return what is spread."""
    spread = []

    def found(views, count, group, *rest, **options):
        labels = torch.arange(len(next(iter(views.values())))) % (max(ways) + 1)
        return solution_clusters.Clusters(
            labels, torch.tensor(ways), torch.zeros(len(labels), 2), information, "hidden"
        )

    monkeypatch.setattr(module_of_seeding, "cluster", found)
    monkeypatch.setattr(module_of_seeding, "spread", lambda *args: spread.append(args) or args[0])
    return spread


@pytest.mark.parametrize(
    ("ways", "said", "taught"),
    [
        ([0, 1, 1], "15, 15, which 3 latents share,", [[1, 0, 0], [0, 0.5, 0.5]]),
        ([0, 1, 2], "10, 10, 10", [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
    ],
)
def test_latents_of_a_way_are_taught_all_of_it(artifact, monkeypatch, caplog, ways, said, taught):
    spread, targets = found_of(monkeypatch, ways, 0.5), []
    monkeypatch.setattr(LatentSeeding, "teach", lambda seeding, module, solutions, shares: targets.append(shares))
    model = build(artifact, small())
    assert start(model)
    assert spread[0][0].shape == (30, max(ways) + 1)
    assert targets[0].tolist() == [taught[i % len(taught)] for i in range(30)]
    assert model.seed_counts.tolist() == targets[0].sum(0).round().tolist()
    assert f"30 solutions in clusters of {said} by hidden; they tell 0.500 nats" in caplog.text


@pytest.mark.parametrize(("information", "warned"), [(0.1, False), (0.0, True), (-0.3, True)])
def test_clusters_that_tell_nothing_are_warned_of(artifact, monkeypatch, information, warned):
    found_of(monkeypatch, [0, 1, 2], information)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        assert start(build(artifact, small(posterior_steps=1)))
    assert any("the clusters tell nothing about y given x" in str(w.message) for w in caught) == warned


def test_the_posterior_learns_the_clusters_and_nothing_else_changes(artifact, monkeypatch):
    taught, teach = [], LatentSeeding.teach

    def score(model, solutions, targets):
        batch = model.template.collate(solutions)
        with torch.no_grad():
            probs = model.amortized_posterior(batch).exp()
        return float((targets * probs).sum(-1).div(targets.amax(-1)).mean())

    def watching(seeding, model, solutions, targets):
        taught.append(score(model, solutions, targets))
        teach(seeding, model, solutions, targets)
        taught.extend([score(model, solutions, targets), targets])

    monkeypatch.setattr(LatentSeeding, "teach", watching)
    model = build(artifact, small(posterior_steps=40))
    before, rng = snapshot(model), torch.get_rng_state()
    assert start(model)
    assert torch.equal(torch.get_rng_state(), rng)
    names = changed(before, model.state_dict())
    state = {"seeded", "seed_counts", "seed_ways"}
    assert names >= {f"{POSTERIOR}project.weight", *state}
    assert all(name.startswith(POSTERIOR) or name in state for name in names)
    sizes = taught[2].sum(0).round().long()
    assert torch.equal(model.seed_counts, sizes)
    torch.testing.assert_close(model.seed_shares, (sizes + 1) / (sizes + 1).sum())
    assert torch.equal(model.seed_ways, model.seeding.ways)
    assert len(model.seed_ways.unique()) == 2  # by chance: the weights are random
    assert taught[1] > max(0.9, taught[0] + 0.2)
    assert model.seeding.points.shape == (30, 2)
    assert torch.equal(model.seeding.clusters.unique(), model.seed_ways.unique())
    assert all(p.grad is None for p in model.parameters())
    assert all(part.training for part in model.posterior_network.modules())


def test_labels_are_not_used(artifact):
    states = []
    for records in (RECORDS, [Record(r.x, r.y, index=r.index) for r in RECORDS]):
        model = build(artifact, small())
        assert start(model, records)
        states.append(snapshot(model))
    assert not changed(*states)


def test_an_input_is_solved_once_and_no_more_than_asked_for(artifact):
    model = build(artifact, small(num_inputs=4))
    twice = [RECORDS[0], RECORDS[0], *RECORDS[1:]]
    assert start(model, twice)
    assert len(model.seeding.points) == 3 * 6


def test_many_solutions_of_an_input_in_a_row_do_not_take_the_place_of_inputs(artifact):
    model, xs = build(artifact, small(num_inputs=40)), [str(x) for x in range(10, 60)]
    rows = [Record(x, f"{n}=9") for x in xs for n in range(8)]
    found = list(dict.fromkeys(r.x for r in model.seeding.given(model.template, rows)))
    assert found == xs[:40]
    few = rows[:80]  # ten inputs are all there is
    assert list(dict.fromkeys(r.x for r in model.seeding.given(model.template, few))) == xs[:10]
    once_or_twice = [Record(x, "1") for x in [*xs[:30], *xs]]
    assert [r.x for r in model.seeding.given(model.template, once_or_twice)] == [*xs[:30], *xs[:10]]


def test_a_divided_model_is_not_seeded(artifact, monkeypatch):
    model = build(artifact, small())
    monkeypatch.setattr("cvae_lightning.modules.seeding.is_sharded", lambda module: True)
    with pytest.raises(
        ValueError, match=r"ModelParallelStrategy: set model.seeding to null .* or go on with --ckpt_path"
    ):
        start(model, RECORDS)


# The first steps.


def test_share_is_held_then_fades():
    shares = [small(hold_steps=10).share(step) for step in range(14)]
    assert shares[:6] == [1.0] * 6
    assert shares[6:10] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert shares[10:] == [0.0] * 4
    assert [small(hold_steps=1).share(step) for step in range(3)] == [1.0, 0.0, 0.0]


def pretend(model, seeded=True):
    """Let a model take itself for a seeded one."""
    model.seeded.fill_(seeded)
    model._is_seeded = seeded


def outputs(model, step, training=True):
    model._trainer = Alone(global_step=step)
    return model.train(training).compute_outputs(model.template.collate(RECORDS), frozenset())


def test_the_seeds_weigh_the_objective_only_while_they_are_held(artifact):
    model = build(artifact, small(hold_steps=4))
    pretend(model)
    o = outputs(model, 0)
    seeds = o.amortized_log_probs
    exact = exact_posterior(o.router_log_probs, o.sequence_nll, model.posterior_temperature)
    assert (seeds - exact).abs().max() > 0.1
    for step in (0, 2):
        torch.testing.assert_close(outputs(model, step).posterior_log_probs, seeds)
    between = (0.5 * seeds + 0.5 * exact).exp()
    torch.testing.assert_close(outputs(model, 3).posterior_log_probs.exp(), between / between.sum(-1, keepdim=True))
    for step in (4, 5):
        assert torch.equal(outputs(model, step).posterior_log_probs, exact)
    torch.testing.assert_close(outputs(model, 0, training=False).posterior_log_probs, exact)
    pretend(model, seeded=False)
    assert torch.equal(outputs(model, 0).posterior_log_probs, exact)


def test_no_gradient_reaches_the_posterior_network_through_the_seeds(artifact):
    model = build(artifact, small(hold_steps=4))
    pretend(model)
    outputs(model, 3).posterior_log_probs[:, 0].sum().backward()
    assert all(p.grad is None for p in model.posterior_network.parameters())
    assert model.lm.get_input_embeddings().weight.grad.any()


# Runs.


def fit(model, folder, callbacks=(), data=None, max_steps=6, **options):
    trainer = L.Trainer(
        **QUIET | {"enable_checkpointing": True, "default_root_dir": folder, "limit_val_batches": 0},
        max_steps=max_steps,
        callbacks=list(callbacks),
    )
    trainer.fit(model, data or TinyData(), **options)
    return trainer


class SaveAtTheStart(L.Callback):
    """Saves behind the seeding and before the first step, as a run does that is told to stop."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.global_step == 0:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:.*exists and is not empty.*", "ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_is_the_uninterrupted_one_and_seeds_once(artifact, tmp_path, monkeypatch):
    started, begin = [], LatentSeeding.start
    monkeypatch.setattr(LatentSeeding, "start", lambda *args: started.append(0) or begin(*args))

    def train(callbacks=(), **options):
        model = build(artifact, small(hold_steps=4), all_losses())
        fit(model, tmp_path, callbacks, TinyData(batch_size=5), **options)  # one batch an epoch
        return model

    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = train([every, SaveAtTheStart(tmp_path / "step=0.ckpt")])
    assert len(started) == 1
    assert whole.seeded
    assert changed(snapshot(build(artifact, small())), whole.state_dict()) >= {"seeded", "lm.model.norm.weight"}
    for step in (0, 1, 3, 5):  # before the first, held, fading, and after
        resumed = train(ckpt_path=tmp_path / f"step={step}.ckpt")
        assert not changed(whole.state_dict(), resumed.state_dict()), step
        assert resumed.seeding.points is None
    assert len(started) == 1


def test_a_loaded_model_goes_on_without_the_entangled_one(artifact, tmp_path):
    """A further fit starts from the posterior that it has, and asks for nothing that a checkpoint does not hold."""
    trainer = fit(build(artifact, small()), tmp_path, max_steps=1)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    model = SharedDiscreteCVAE.load_from_checkpoint(tmp_path / "model.ckpt")
    assert model.seeded
    assert model.seeding.spec() == small().spec()
    fit(model, tmp_path, max_steps=1)
    assert not model.has_reference


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_checkpoints_and_configs_may_differ_in_their_seeding(artifact, tmp_path):
    for seeding in (None, small()):
        trainer = fit(build(artifact, seeding), tmp_path, max_steps=2)
        trainer.save_checkpoint(tmp_path / f"{seeding is not None}.ckpt")
    for first, second in ((False, small()), (True, None)):
        path = tmp_path / f"{first}.ckpt"
        model = build(artifact, second)
        L.Trainer(**QUIET, limit_test_batches=1).test(model, TinyData(), ckpt_path=path, verbose=False)
        saved = torch.load(path, weights_only=True)["state_dict"]
        weights = model.state_dict()
        assert all(torch.equal(weights[name], saved[name]) for name in saved.keys() & weights.keys())
        assert saved.keys() ^ weights.keys() == {"seeded", "seed_counts", "seed_ways"}
        assert second is None or not model.seeded
        model = build(artifact, second)
        fit(model, tmp_path, max_steps=3, ckpt_path=path)
        assert second is None or (not model.seeded and model.seeding.points is None)
        loaded = SharedDiscreteCVAE.load_from_checkpoint(path, seeding=second)
        assert second is None or not loaded.seeded


def rough_features(*args):
    """Hidden states as low-precision hardware computes them."""
    features = solution_features(*args)
    return features + 1e-3 * features.std() * torch.randn_like(features)


@pytest.mark.parametrize(("batch", "read"), [(8, solution_features), (512, rough_features)])
def test_a_model_with_one_way_of_solving_trains_without_seeds(tmp_path, monkeypatch, batch, read):
    """Its solutions are alike, whatever the batch and the precision in which they are read."""
    monkeypatch.setattr(module_of_seeding, "BATCH", batch)
    monkeypatch.setattr(module_of_seeding, "solution_features", read)
    lm, template = tiny_lm("qwen2")
    with torch.no_grad():
        lm.get_output_embeddings().weight.mul_(1e4)  # sampling takes the most probable token
    save_artifact(tmp_path / "one", lm, template.tokenizer, Baseline(1.5, 10, "tiny-val", template.fingerprint()))
    losses = {"free_energy": FreeEnergyLoss(), "distillation": PosteriorDistillationLoss()}
    model = build(str(tmp_path / "one"), small(), losses | {"balance": AggregatePosteriorBalanceLoss(prior="seeds")})
    before = snapshot(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        trainer = fit(model, tmp_path, max_steps=2)
    for said in ("Training starts without seeds", "balance: there are no seeds to take the prior from"):
        assert sum(said in str(w.message) for w in caught) == 1
    torch.testing.assert_close(model.seed_shares, torch.full((K,), 1 / K))
    assert trainer.global_step == 2
    assert not model.seeded
    assert model.seeding.points is None
    assert "lm.model.norm.weight" in changed(before, model.state_dict())


class Ranks(L.Callback):
    """Writes the weights of every rank behind the seeding and at the end."""

    def __init__(self, folder):
        self.folder = folder

    def write(self, trainer, pl_module, when):
        torch.save(pl_module.state_dict(), self.folder / f"{when}{trainer.world_size}{trainer.global_rank}.pt")

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.global_step == 0:
            self.write(trainer, pl_module, "seeded")

    def on_train_end(self, trainer, pl_module):
        self.write(trainer, pl_module, "end")


def test_two_processes_hold_the_posterior_of_one(artifact, tmp_path):
    for processes in (1, 2):
        options = {"devices": processes, "strategy": "ddp_fork"} if processes > 1 else {}
        trainer = L.Trainer(**QUIET, **options, max_steps=2, limit_val_batches=0, callbacks=[Ranks(tmp_path)])
        trainer.fit(build(artifact, small()), TinyData(RECORDS[:4], batch_size=2))
    states = {
        (when, rank): torch.load(tmp_path / f"{when}{rank}.pt", weights_only=True)
        for when in ("seeded", "end")
        for rank in ("10", "20", "21")
    }
    assert states["seeded", "10"]["seeded"]
    assert f"{POSTERIOR}project.weight" in changed(states["seeded", "10"], snapshot(build(artifact, small())))
    assert not changed(states["seeded", "20"], states["seeded", "10"])
    assert not changed(states["seeded", "21"], states["seeded", "10"])
    assert changed(states["end", "21"], states["end", "20"]) <= {"longest_y"}  # what a rank has seen itself
    assert changed(states["end", "20"], states["seeded", "20"])


SEEDING = "--model.init_args.seeding"
DISTILLATION = "--model.init_args.losses.distillation.class_path", "cvae_lightning.losses.PosteriorDistillationLoss"


@pytest.mark.filterwarnings("ignore:.*fingerprint.*", "ignore:.*are in train_path too.*")
def test_the_command_line_seeds(tmp_path, monkeypatch, capfd):
    enter_user_folder(tmp_path, monkeypatch)
    words = ["--config", "run.yaml", "--trainer.max_steps", "2"]
    words += [f"{SEEDING}.class_path", "cvae_lightning.LatentSeeding"]
    assert "must be at least 2, got 1" in failure(
        capfd, "fit", *words, *DISTILLATION, f"{SEEDING}.init_args.num_solutions", "1"
    )
    assert "add a PosteriorDistillationLoss" in failure(capfd, "fit", *words)
    words += [*DISTILLATION, f"{SEEDING}.init_args.num_inputs", "8", f"{SEEDING}.init_args.posterior_steps", "3"]
    assert cli.main(["fit", *words]) == 0
    path = next(Path().glob("out/**/last.ckpt"))
    hyperparameters = torch.load(path, weights_only=True)["hyper_parameters"]
    assert hyperparameters["seeding"]["init_args"]["num_inputs"] == 8
    model = SharedDiscreteCVAE.load_from_checkpoint(path)
    assert (model.seeding.num_inputs, model.seeding.posterior_steps, model.seeding.seed) == (8, 3, None)
    assert model.seeded


# Errors.


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("num_inputs", 0, 1),
        ("num_solutions", 1, 2),
        ("posterior_steps", 0, 1),
        ("even_steps", -1, 0),
        ("hold_steps", -3, 1),
    ],
)
def test_bad_numbers_are_named(name, value, least):
    with pytest.raises(ValueError, match=rf"seeding\.{name} must be at least {least}, got {value}"):
        LatentSeeding(**{name: value})


def test_every_seed_is_a_seed(artifact):
    for seed in (-1, 2**40):
        assert start(build(artifact, small(seed=seed, posterior_steps=1)))


def test_the_posterior_network_must_be_in_use(artifact):
    alone = {"free_energy_loss": FreeEnergyLoss()}
    with pytest.raises(ValueError, match="add a PosteriorDistillationLoss, or set posterior to amortized"):
        build(artifact, small(), alone)
    assert start(build(artifact, small(), alone, posterior="amortized"))


def test_inputs_come_from_a_data_module_with_records(artifact):
    model = build(artifact, small())
    loader = torch.utils.data.DataLoader(RECORDS, batch_size=4, collate_fn=model.template.collate)
    trainer = L.Trainer(**QUIET, max_steps=1, limit_val_batches=0)
    with pytest.raises(ValueError, match="give a data module that has records"):
        trainer.fit(model, loader, loader)


def test_a_record_that_the_model_cannot_read_is_named(artifact):
    model = build(artifact, small())
    with pytest.raises(ValueError, match="takes 80 tokens, more than the model's 64 positions"):
        start(model, [*RECORDS, Record("3" * 70, "1")])


def test_the_entangled_model_must_be_at_hand(artifact, tmp_path):
    trainer = fit(build(artifact), tmp_path, max_steps=1)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    model = SharedDiscreteCVAE.load_from_checkpoint(tmp_path / "model.ckpt", seeding=small())
    with pytest.raises(ValueError, match=r"seeding .* model\.entangled as a folder or hub name"):
        fit(model, tmp_path, max_steps=1)
