"""The verifier, the ceilings and the constructors, for every task."""

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvae_lightning.data import tasks
from cvae_lightning.data.tasks import Task
from cvae_lightning.spec import to_plain

TASKS = [
    tasks.SortingAlgorithms(),
    tasks.SortingAlgorithms(length=7, strategies=["merge_levels", "reverse_selection"]),
    tasks.GridPathfinding(),
    tasks.GridPathfinding(size=8, walls=4),
    tasks.MultidigitAddition(),
    tasks.MultidigitAddition(digits=5),
    tasks.LinearEquations(),
    tasks.LinearEquations(max_solution=9, max_constant=99),
    tasks.BaseConversion(),
    tasks.BaseConversion(base=2, digits=8),
    tasks.IntegerMultiplication(),
    tasks.IntegerMultiplication(digits=5),
]
each_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def inputs(task, count=150, seed=0):
    rng = random.Random(seed)
    return [task.sample_input(rng) for _ in range(count)]


@each_task
def test_traces_are_short_correct_and_recognised(task):
    for x in inputs(task):
        traces = task.traces(x)
        for strategy, y in zip(task.strategies, traces, strict=True):
            assert len(y) <= 64
            assert set(x + y) <= set(task.alphabet)
            assert task.final_answer(y) == task.answer(x)
            assert task.is_correct(x, y)
            same = {s for s, other in zip(task.strategies, traces, strict=True) if other == y}
            assert task.compatible_strategies(x, y) == same
            assert strategy in same
            assert not task.compatible_strategies(x, y + " ")


@each_task
def test_a_changed_answer_is_wrong_and_an_unended_trace_has_none(task):
    x = inputs(task, 1)[0]
    y = task.traces(x)[0]
    wrong = y[:-1] + str((int(y[-1]) + 1) % 10)
    assert not task.is_correct(x, wrong)
    assert task.final_answer(y[: y.rindex("=") + 1]) is None
    assert task.final_answer("") is None
    assert task.final_answer("=٣") is None  # a digit, but not of ours


@each_task
@given(x=st.text(), y=st.text(), good=st.booleans(), data=st.data())
def test_verifiers_accept_any_text(task, x, y, good, data):
    x = inputs(task, 1)[0] if good else x
    y = data.draw(st.sampled_from(["", task.traces(inputs(task, 1)[0])[0]])) + y
    answer = task.final_answer(y)
    assert answer is None or y.endswith("=" + answer)
    assert isinstance(task.is_correct(x, y), bool)
    assert task.compatible_strategies(x, y) <= set(task.strategies)


@each_task
def test_unknown_strategies_and_foreign_inputs_are_named(task):
    with pytest.raises(ValueError, match="has no strategy 'quantum'"):
        task.solve(inputs(task, 1)[0], "quantum")
    with pytest.raises(ValueError, match="'no such x' is not an input of"):
        task.answer("no such x")


@each_task
def test_a_task_is_rebuilt_from_its_spec(task):
    spec = to_plain({"task": task})["task"]
    name = spec["class_path"].rpartition(".")[2]
    again = getattr(tasks, name)(**spec["init_args"])
    x = inputs(task, 1)[0]
    assert again.traces(x) == task.traces(x)


@pytest.mark.parametrize("task", TASKS[::2], ids=lambda task: task.name)
def test_default_tasks_have_high_ceilings_and_early_differences(task):
    assert 4 <= len(task.strategies) <= 6
    ceiling = task.ceiling(samples=800)
    assert ceiling.one_to_one > 0.9
    assert ceiling.controlled > 0.9
    differing = [len({y[:6] for y in task.traces(x)}) / len(task.strategies) for x in inputs(task, 400)]
    assert sum(differing) / len(differing) > 0.7


class Toy(Task):
    """x is a digit; its strategies s0, s1, s2 coincide on some x: all on 0, s0 with s1 on 1, none on 2."""

    name = "toy"
    strategies = ("s0", "s1", "s2")
    alphabet = "012abc="

    def sample_input(self, rng):
        return rng.choice("012")

    def parse(self, x):
        if x not in ("0", "1", "2"):
            raise ValueError(x)
        return int(x)

    def steps(self, problem, strategy):
        return {0: "aaa", 1: "aab", 2: "abc"}[problem][int(strategy[1])]

    def result(self, problem):
        return str(problem)


def test_groups_name_the_strategies_that_coincide():
    assert [Toy().groups(x) for x in "012"] == [[0, 0, 0], [0, 0, 2], [0, 1, 2]]


@pytest.mark.parametrize("probs", [(1 / 3, 1 / 3, 1 / 3), (0.7, 0.2, 0.1), (0.0, 0.5, 0.5)])
def test_ceilings_equal_brute_force_over_all_decision_rules(probs):
    task = Toy()
    best = entropy = controlled = 0.0
    for x in "012":
        distinct = sorted(set(task.traces(x)))
        best += max(  # every rule that maps a trace to a strategy
            sum(p * (guess[distinct.index(y)] == s) for s, (p, y) in enumerate(zip(probs, task.traces(x), strict=True)))
            for guess in itertools.product(range(3), repeat=len(distinct))
        )
        mass = [sum(p for p, y in zip(probs, task.traces(x), strict=True) if y == one) for one in distinct]
        entropy -= sum(m * math.log(m) for m in mass if m > 0)
        # best controlled score: every latent writes some trace, credited 1/|M| for its own strategy if compatible
        controlled += max(
            sum((y == task.traces(x)[s]) / task.traces(x).count(y) for s, y in enumerate(written)) / 3
            for written in itertools.product(distinct, repeat=3)
        )
    ceiling = task.ceiling_over(list("012"), lambda x: probs)
    assert ceiling.one_to_one == pytest.approx(best / 3)
    assert ceiling.strategy_entropy == pytest.approx(entropy / 3)
    assert ceiling.controlled == pytest.approx(controlled / 3)
    sampled = task.ceiling(lambda x: probs, samples=4000, seed=1)
    assert sampled.one_to_one == pytest.approx(best / 3, abs=0.02)


@pytest.mark.parametrize("latents", [1, 2, 3, 5])
@pytest.mark.parametrize("probs", [(1 / 3, 1 / 3, 1 / 3), (0.7, 0.2, 0.1), (0.0, 0.5, 0.5)])
def test_fewer_latents_have_a_lower_ceiling(latents, probs):
    """Every rule from traces to latents, each latent for a strategy of its own."""
    task, best = Toy(), 0.0
    for chosen in itertools.permutations(range(3), min(latents, 3)):
        total = 0.0
        for x in "012":
            traces = task.traces(x)
            total += sum(
                max(p * (y == traces[s]) for s, p in zip(chosen, [probs[s] for s in chosen], strict=True))
                for y in {*traces}
            )
        best = max(best, total / 3)
    assert task.ceiling_over(list("012"), lambda x: probs, latents).one_to_one == pytest.approx(best)


def test_uniform_ceiling_of_the_toy_is_known():
    ceiling = Toy().ceiling_over(list("012"))
    assert ceiling.one_to_one == pytest.approx((1 / 3 + 2 / 3 + 1) / 3)
    assert ceiling.controlled == pytest.approx(ceiling.one_to_one)
    with pytest.raises(ValueError, match="there is none"):
        Toy().ceiling_over([])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tasks.SortingAlgorithms(length=2), "length must be an integer from 3 to 7, got 2"),
        (lambda: tasks.SortingAlgorithms(strategies=["bubble"]), "at least two different"),
        (lambda: tasks.SortingAlgorithms(strategies=["bubble", "bogo"]), r"\['bogo'\]; known are bubble"),
        (lambda: tasks.GridPathfinding(size=9), "size must be an integer from 4 to 8, got 9"),
        (lambda: tasks.GridPathfinding(walls=-1), "walls must be"),
        (lambda: tasks.MultidigitAddition(digits=1), "digits must be"),
        (lambda: tasks.LinearEquations(max_solution=2.5), "max_solution must be an integer"),
        (lambda: tasks.LinearEquations(max_constant=0), "max_constant must be"),
        (lambda: tasks.BaseConversion(base=10), "base must be"),
        (lambda: tasks.BaseConversion(base=9, digits=8), "at most 100000, got 9"),
        (lambda: tasks.IntegerMultiplication(digits=True), "digits must be an integer"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("task", "x"),
    [
        (tasks.GridPathfinding(walls=2), "11>33#1112"),  # a wall on the start
        (tasks.GridPathfinding(walls=2), "11>33#1221"),  # no way out of the corner
        (tasks.LinearEquations(), "3v+4=20"),  # no whole solution
        (tasks.LinearEquations(), "2v+1=99"),  # solution out of range
        (tasks.BaseConversion(), "01234"),  # leading zero
        (tasks.SortingAlgorithms(), "4132\n"),
    ],
)
def test_inputs_without_a_solution_are_refused(task, x):
    with pytest.raises(ValueError, match="is not an input of"):
        task.answer(x)
    assert task.compatible_strategies(x, "1=1") == frozenset()
