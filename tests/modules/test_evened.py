"""Seeding from an entangled model that writes some solutions of an input more often than others."""

import math
import warnings
from copy import deepcopy
from math import log

import pytest
import torch
from tiny import CONFIGS, Alone, start, tiny_artifact, tiny_tokenizer

from cvae_lightning import LatentSeeding, SharedDiscreteCVAE
from cvae_lightning.backbones.artifact import Baseline, save_artifact
from cvae_lightning.backbones.causal_lm import build_causal_lm
from cvae_lightning.losses import FreeEnergyLoss, PosteriorDistillationLoss
from cvae_lightning.modules import evened as module_of_evened
from cvae_lightning.modules import seeding as module_of_seeding
from cvae_lightning.modules.descent import descend
from cvae_lightning.modules.evened import common, evened, probabilities, unevenness
from cvae_lightning.modules.seeding import solved_differently
from cvae_lightning.outputs import Record
from cvae_lightning.template import PromptTemplate

XS = [f"{a}{b}" for a in range(10) for b in range(10) if a != b]
WAYS = ["=1", "2;"]


def ways_of(x):
    """The commoner way to solve x and the rarer one, by the first digit of x."""
    return WAYS if int(x[0]) % 2 else WAYS[::-1]


BOTH = [Record(x, y) for x in XS for y in ways_of(x)]


def uneven_artifact(folder, ratio):
    """An entangled model trained on data that have one of two solutions so many times as often as the other."""
    template = PromptTemplate(tiny_tokenizer())
    torch.manual_seed(0)
    config = CONFIGS["llama"] | {"hidden_size": 32, "intermediate_size": 64}
    lm = build_causal_lm(config, len(template), template.pad_id)
    records = [Record(x, y) for x in XS for y, often in zip(ways_of(x), (ratio, 1), strict=True) for _ in range(often)]
    source = torch.Generator().manual_seed(0)

    def loss():
        rows = torch.randint(len(records), (64,), generator=source).tolist()
        batch = template.collate([records[i] for i in rows])
        opened = torch.full_like(batch.y_ids[:, :1], template.marker_ids["<y>"])
        ids = torch.cat([batch.prefix_ids, opened, batch.y_ids], -1)
        mask = torch.cat([batch.prefix_mask, opened.bool(), batch.y_mask], -1)
        said = torch.cat([torch.zeros_like(batch.prefix_mask), ~opened.bool(), batch.y_mask], -1)
        return lm(ids, attention_mask=mask.long(), labels=ids.masked_fill(~said, -100)).loss

    descend(lm, loss, 3e-3, 300, "", False)
    save_artifact(folder, lm, template.tokenizer, Baseline(1.0, 10, "-", template.fingerprint()))
    return str(folder)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    return uneven_artifact(tmp_path_factory.mktemp("uneven"), 7)


def build(artifact, seeding=None, **options):
    torch.manual_seed(3)
    losses = {"free_energy_loss": FreeEnergyLoss(), "distillation": PosteriorDistillationLoss()}
    return SharedDiscreteCVAE(artifact, losses, 2, seeding=seeding, learning_rate=1e-2, **options)


def small(**options):
    return LatentSeeding(**{"seed": 0, "num_solutions": 12, "posterior_steps": 60, "even_steps": 100, **options})


def given(xs):
    """The records that a data module has of these inputs."""
    return [Record(x, ways_of(x)[0]) for x in xs]


def frequencies(model, lm):
    """Probabilities of the commoner and the rarer way of every input, [X, 2]."""
    found = probabilities(model, lm, BOTH, 16)
    return torch.tensor([[found[x][y] for y in ways_of(x)] for x in XS])


# How uneven.


def test_unevenness_is_the_divergence_from_equal_frequencies():
    assert unevenness({"a": {"1": 0.4, "2": 0.4}, "b": {"1": 0.3, "2": 0.3, "3": 0.3}}) == pytest.approx(0)
    skewed = {"1": 0.6, "2": 0.3}  # of 0.9: two thirds and one third
    expected = log(2) + (2 / 3) * log(2 / 3) + (1 / 3) * log(1 / 3)
    assert unevenness({"a": skewed}) == pytest.approx(expected)
    assert unevenness({"a": skewed, "b": {"1": 0.5, "2": 0.5}}) == pytest.approx(expected / 2)
    assert unevenness({"a": skewed, "b": {"1": 1.0}}) == pytest.approx(expected)  # one solution: nothing to compare


def test_accidents_are_not_rare_solutions():
    assert common({"1": 0.5, "2": 0.025, "3": 0.0249}) == {"1": 0.5, "2": 0.025}
    mistakes = {f"mistake {i}": 0.01 for i in range(20)}
    assert unevenness({"a": {"1": 0.4, "2": 0.4, **mistakes}}) == pytest.approx(0)


def test_solutions_that_are_not_listed_say_nothing_of_frequencies():
    """Of longer texts every one is drawn once, and each has a small probability of its own."""
    texts = {f"text {i}": 10.0**-i for i in range(2, 12)}
    skewed = {"1": 0.6, "2": 0.3}
    assert unevenness({"a": texts, "b": texts}) == 0
    assert unevenness({"a": texts, "b": texts, "c": skewed}) == 0
    assert unevenness({"a": texts, "b": skewed}) == unevenness({"b": skewed})
    assert unevenness({"a": {"1": 0.0, "2": 0.0}}) == 0
    assert unevenness({"a": {"1": math.nan, "2": 0.5}}) == 0
    assert unevenness({}) == 0
    assert unevenness({"a": {"1": 0.33, "2": 0.16}}) == 0  # half of it is not listed
    assert unevenness({"a": {"1": 0.34, "2": 0.17}}) > 0


def test_a_few_inputs_with_several_solutions_do_not_matter():
    alone = {f"{i}": {"1": 1.0} for i in range(19)}
    skewed = {"1": 0.6, "2": 0.3}
    assert unevenness(alone | {"a": skewed}) == unevenness({"a": skewed})
    assert unevenness(alone | {"b": {"1": 1.0}, "a": skewed}) == 0


def test_probabilities_are_the_models(uneven):
    model = build(uneven)
    solutions = [Record("12", "=1"), Record("12", "=1"), Record("31", "1"), Record("12", "2;")]
    found = probabilities(model, model.reference(), solutions, 2)
    assert {x: list(ps) for x, ps in found.items()} == {"12": ["=1", "2;"], "31": ["1"]}
    for x, ps in found.items():
        for y, p in ps.items():
            nll = model.free_token_nll(model.reference(), model.template.collate([Record(x, y)]))
            assert p == pytest.approx(float((-nll.sum()).exp()), rel=1e-4)


# The copy.


@pytest.mark.parametrize("adaptation", ["full", "lora", "frozen"])
def test_a_copy_learns_equal_frequencies(uneven, adaptation):
    if adaptation == "lora":
        pytest.importorskip("peft")
    model = build(uneven, adaptation=adaptation)
    before = {name: value.clone() for name, value in model.reference().state_dict().items()}
    assert frequencies(model, model.reference())[:, 0].median() > 0.8
    copy = evened(model, BOTH, 100, 0, 16)
    assert not any(p.requires_grad or p.grad is not None for p in copy.parameters())
    after = model.reference().state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    now = frequencies(model, copy)
    assert now.sum(-1).median() > 0.9
    assert (now[:, 0] / now.sum(-1) - 0.5).abs().median() < 0.1
    rows = model.template.marker_ids.values()
    assert copy.get_output_embeddings().weight.shape[0] == max(rows) + 1  # none for latents
    model._reference[:] = [copy]
    assert evened(model, BOTH, 100, 0, 16) is None  # these are equally frequent


@pytest.mark.parametrize("adaptation", ["full", "lora", "frozen"])
def test_a_copy_is_where_the_model_is(uneven, adaptation):
    if adaptation == "lora":
        pytest.importorskip("peft")
    copy = build(uneven, adaptation=adaptation).to("meta").entangled_copy()
    assert {t.device.type for t in (*copy.parameters(), *copy.buffers())} == {"meta"}


@pytest.mark.parametrize("left_out", [0.0, 0.03])
@pytest.mark.parametrize(("rare", "wanted"), [(0.31, False), (0.29, True)])
def test_a_little_unevenness_is_put_up_with(uneven, monkeypatch, rare, wanted, left_out):
    """The divergence of 0.31 and 0.69 from equal frequencies is 0.074, that of 0.29 and 0.71 0.091."""
    found = {x: dict(zip(WAYS, ((1 - left_out) * rare, (1 - left_out) * (1 - rare)), strict=True)) for x in XS}
    monkeypatch.setattr(module_of_evened, "probabilities", lambda *args: found)
    model, made = build(uneven), []
    monkeypatch.setattr(model, "entangled_copy", lambda: made.append(model) or deepcopy(model.reference()))
    monkeypatch.setattr(module_of_evened, "descend", lambda *args: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evened(model, BOTH, 1, 0, 16)
    assert bool(made) == (wanted and not left_out)  # what else the model writes is put up with as well


def test_rare_ways_that_were_not_drawn_are_not_unlearned(tmp_path):
    """With 16 of 1 the rarer way is not among the solutions of many inputs."""
    model = build(uneven_artifact(tmp_path, 16))
    model._trainer = Alone()
    seeding = small(num_solutions=16)
    drawn = seeding.solve(model, XS, given(XS))
    alike = len(XS) - len(solved_differently(drawn)) // 16
    assert alike > 10
    copy = evened(model, drawn, 100, 0, 16)
    assert len(XS) - len(solved_differently(seeding.solve(model, XS, given(XS), copy))) // 16 < alike / 3


def forget(network, *args):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(math.nan)


@pytest.mark.parametrize("training", [lambda *args: None, forget])
def test_a_copy_that_did_not_learn_it_is_left(uneven, monkeypatch, training):
    monkeypatch.setattr(module_of_evened, "descend", training)
    with pytest.warns(UserWarning, match="a copy of it did not learn to write them alike in 7 steps"):
        assert evened(build(uneven), BOTH, 7, 0, 16) is None


# Seeding.


@pytest.mark.parametrize(("even_steps", "adaptation"), [(0, "full"), (100, "full"), (100, "frozen")])
def test_seeds_are_ways_and_not_what_is_common(uneven, few_divisions, monkeypatch, caplog, even_steps, adaptation):
    taught, read = [], []
    monkeypatch.setattr(LatentSeeding, "teach", lambda seeding, model, *what: taught.append(what))
    features = module_of_seeding.solution_features
    monkeypatch.setattr(
        module_of_seeding, "solution_features", lambda lm, *what: read.append(lm) or features(lm, *what)
    )
    model = build(uneven, small(leave_open=False, even_steps=even_steps), adaptation=adaptation)
    assert start(model, given(XS))
    ((solutions, targets),) = taught
    assert (read == [model.reference()]) == (even_steps == 0)
    common_one = [r.y == ways_of(r.x)[0] for r in solutions]
    assert (0.35 < sum(common_one) / len(solutions) < 0.65) == (even_steps > 0)
    assert ("a copy that learned to write them alike" in caplog.text) == (even_steps > 0)
    way = torch.tensor([r.y.startswith("=") for r in solutions])
    right = float((targets.argmax(-1) == way).float().mean())
    assert (max(right, 1 - right) > 0.95) == (even_steps > 0)


def test_seeds_are_counted_as_the_entangled_model_writes_them(uneven, few_divisions):
    """Inputs of which one way is the commoner: the copy writes both alike, the entangled model does not."""
    odd = [x for x in XS if int(x[0]) % 2]
    without, model = (build(uneven, small(even_steps=steps)) for steps in (0, 100))
    assert start(without, given(odd))
    assert start(model, given(odd))
    assert without.seed_shares.max() == pytest.approx(float(model.seed_shares.max()), abs=0.06)
    assert model.seed_shares.max() > 0.65
    assert int(model.seed_counts.sum()) == 12 * len(odd)
    sizes = torch.bincount(model.seeding.clusters, minlength=2) / len(model.seeding.clusters)
    assert sizes.max() < 0.6


def test_without_a_list_of_what_there_is_to_write_there_is_no_copy(tmp_path):
    """An untrained model, which hardly writes anything twice."""
    model = build(tiny_artifact(tmp_path))
    assert evened(model, [Record(x, y) for x in XS[:4] for y in ("1", "2")], 1, 0, 8) is None
