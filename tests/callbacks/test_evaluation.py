import json

import lightning as L
import pytest
import torch
from callback_fakes import FakeData, FakeModule, MirrorTask, make_trainer

from cvae_lightning.callbacks.evaluation import StrategyEvaluation

# Four inputs; latent 1 fails on "56", and "11" reads the same both ways. A[keep, 0] = (1 + 1 + 1/2 + 1) / 4 and
# A[turn, 1] = (1 + 1 + 1/2 + 0) / 4; "56" reaches one of its two strategies; 7 of 8 answers are right.
BY_HAND = {
    "controlled/alignment_one_to_one": (3.5 / 4 + 2.5 / 4) / 2,
    "controlled/alignment_ceiling": 3.5 / 4,
    "controlled/local_strategy_coverage_mean": (1 + 1 + 1 + 0.5) / 4,
    "controlled/local_strategy_full_coverage_rate": 3 / 4,
    "controlled/final_answer_accuracy": 7 / 8,
    "controlled/distinct_fraction": 3 / 4,
    # Bigrams with ends. "12=2" | "21=2": all words are one number, "=", "2": 2 of 4 bigrams shared in each pair,
    # so 1 - 2/6; "11" equal: 0; "56=6" | "56=?": "^5 6" ... -> {^56, 56=} shared of 6.
    "controlled/mean_distance": (2 / 3 + 2 / 3 + 0 + 2 / 3) / 4,
    "sampled/final_answer_accuracy": 1.0,
    "greedy/final_answer_accuracy": 1.0,
}


def test_scores_equal_those_worked_out_by_hand():
    evaluation = StrategyEvaluation()
    logged = make_trainer(evaluation).validate(FakeModule(), FakeData(MirrorTask()), verbose=False)[0]
    assert logged == pytest.approx({f"val/{key}": value for key, value in BY_HAND.items()})
    assert evaluation.scores == pytest.approx(BY_HAND)
    torch.testing.assert_close(evaluation.matrix.double(), torch.tensor([[3.5, 0.5], [0.5, 2.5]]).double() / 4)
    assert [(g.x, g.k, g.y, g.correct, g.strategies) for g in evaluation.controlled[4:8]] == [
        ("11", 0, "11=1", True, ("keep", "turn")),
        ("11", 1, "11=1", True, ("keep", "turn")),
        ("56", 0, "56=6", True, ("keep",)),
        ("56", 1, "56=?", False, ()),
    ]


def test_test_stage_and_fewer_examples():
    logged = make_trainer(StrategyEvaluation(num_examples=2)).test(FakeModule(), FakeData(MirrorTask()), verbose=False)[
        0
    ]
    assert logged["test/controlled/alignment_one_to_one"] == 1.0
    assert logged["test/controlled/alignment_ceiling"] == 1.0


@pytest.mark.parametrize("latents", [1, 3])
def test_ceiling_counts_what_the_matching_can_reach(latents):
    evaluation = StrategyEvaluation()
    make_trainer(evaluation).validate(FakeModule(latents, wrong=()), FakeData(MirrorTask()), verbose=False)
    # K = 1: latent 0 keeps; K = 3: latent 2 keeps again, and the matching takes one of them.
    assert evaluation.scores["controlled/alignment_one_to_one"] == pytest.approx(3.5 / 4)
    assert evaluation.scores["controlled/alignment_ceiling"] == pytest.approx(3.5 / 4)


def test_without_verifier_only_what_can_be_computed():
    logged = make_trainer(StrategyEvaluation()).validate(FakeModule(), FakeData(None), verbose=False)[0]
    assert logged == pytest.approx(
        {
            "val/controlled/distinct_fraction": 3 / 4,
            "val/controlled/mean_distance": BY_HAND["controlled/mean_distance"],
            "val/controlled/mean_length/z0": 3.0,  # "12", "=", "2"
            "val/controlled/mean_length/z1": 3.0,
        }
    )


def test_module_without_latents_is_only_sampled():
    module = FakeModule(num_latents=0)
    module.generate = lambda x, *, do_sample=False, **_: [
        "?" if do_sample else MirrorTask().solve(a, "keep") for a in x
    ]
    logged = make_trainer(StrategyEvaluation()).validate(module, FakeData(MirrorTask()), verbose=False)[0]
    assert logged == {"val/sampled/final_answer_accuracy": 0.0, "val/greedy/final_answer_accuracy": 1.0}


def test_sampled_latents_follow_the_router():
    data = FakeData(MirrorTask(), inputs=tuple(f"{i:03d}" for i in range(400)))
    evaluation = StrategyEvaluation(num_examples=400)
    module = FakeModule(router=0.75, wrong=tuple((x, 1) for x in data.inputs))
    make_trainer(evaluation).validate(module, data, verbose=False)
    share = sum(g.k == 0 for g in evaluation.samples) / 400
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 400) ** 0.5
    assert evaluation.scores["sampled/final_answer_accuracy"] == pytest.approx(share)
    assert evaluation.scores["greedy/final_answer_accuracy"] == 1.0
    sampled = [call for call in module.calls if call["do_sample"]]
    assert [call["generator_seed"] for call in sampled] == [1]  # the latents have the stream of 0
    best = [call for call in module.calls if not call["do_sample"]][-1]
    assert (best["z"], best["generator_seed"]) == ("argmax", 1)  # a Gaussian z would be drawn, as the sampled ones are
    again = StrategyEvaluation(num_examples=400)
    make_trainer(again).validate(module, data, verbose=False)
    assert again.samples == evaluation.samples


@pytest.mark.parametrize("task", [MirrorTask(), None])
def test_training_is_not_disturbed(task):
    weights = []
    for callbacks in ([], [StrategyEvaluation(every_n_validations=1)]):
        L.seed_everything(3, verbose=False)
        module = FakeModule()
        make_trainer(*callbacks, max_epochs=3).fit(module, FakeData(task))
        assert module.training
        weights.append(module.layer.weight.detach().clone())
    assert torch.equal(*weights)


def test_random_state_and_modes_are_restored():
    module = FakeModule().train()
    module.dropout.eval()
    evaluation = StrategyEvaluation()
    trainer = make_trainer()
    before = torch.get_rng_state()
    trainer.datamodule = FakeData(MirrorTask())
    module.log_dict = lambda values, **_: None
    evaluation._evaluate(trainer, module, "val")
    assert torch.equal(torch.get_rng_state(), before)
    assert module.training
    assert not module.dropout.training


def test_rhythm_skips_sanity_check_and_resumes():
    evaluation = StrategyEvaluation(every_n_validations=2, sampled=False)
    module = FakeModule()
    make_trainer(evaluation, max_epochs=5, num_sanity_val_steps=1).fit(module, FakeData(MirrorTask()))
    assert len(module.calls) == 2  # after epochs 2 and 4
    resumed = StrategyEvaluation(every_n_validations=2, sampled=False)
    resumed.load_state_dict(evaluation.state_dict())
    make_trainer(resumed, max_epochs=1, num_sanity_val_steps=1).fit(module, FakeData(MirrorTask()))
    assert len(module.calls) == 3  # the sixth validation


def test_options_reach_generate():
    module = FakeModule()
    make_trainer(StrategyEvaluation(max_new_tokens=7)).validate(module, FakeData(MirrorTask()), verbose=False)
    assert {call["limit"] for call in module.calls} == {7}


def test_without_data_module_nothing_happens():
    module = FakeModule()
    with pytest.warns(UserWarning, match="needs a data module"):
        make_trainer(StrategyEvaluation()).validate(module, FakeData().val_dataloader(), verbose=False)
    assert module.calls == []


class _WritesScores(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_validation_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            self.path.write_text(json.dumps({k: float(v) for k, v in trainer.callback_metrics.items()}))


def test_two_processes_give_the_scores_of_one(tmp_path):
    data = FakeData(MirrorTask(), inputs=("12", "34", "11", "56", "78"))  # 3 on one rank, 2 on the other
    results = []
    for devices in (1, 2):
        path = tmp_path / f"{devices}.json"
        options = {"strategy": "ddp_fork", "use_distributed_sampler": False} if devices == 2 else {}
        trainer = make_trainer(StrategyEvaluation(), _WritesScores(path), devices=devices, **options)
        trainer.validate(FakeModule(router=0.5), data, verbose=False)
        results.append(json.loads(path.read_text()))
    assert len(results[0]) == len(BY_HAND)
    assert results[1] == pytest.approx(results[0], abs=1e-6)


@pytest.mark.parametrize("name", ["num_examples", "every_n_validations", "batch_size"])
def test_bad_arguments(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        StrategyEvaluation(**{name: 0})
