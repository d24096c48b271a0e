import math

import pytest
import torch
from cli_dummies import MeanAbs, MeanSquare, TinyData, TinyModule
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from tiny import QUIET, RECORDS, tiny_artifact
from tiny import TinyData as TinyRecords

from cvae_lightning.callbacks.schedules import WeightSchedule, schedule_value
from cvae_lightning.losses import ReconstructionLoss
from cvae_lightning.modules import SharedDiscreteCVAE


class Recorder(TinyModule):
    """Remembers the weight and the temperature that each training batch saw."""

    def training_step(self, batch, batch_idx):
        self.seen.append((self.trainer.global_step, self.losses["abs"].weight, float(self.temperature)))
        return super().training_step(batch, batch_idx)


def fit(tmp_path, *schedules, max_steps=8, module=None, ckpt_path=None, **trainer_args):
    module = module or Recorder({"square": MeanSquare(), "abs": MeanAbs(weight=0.5)})
    options = {"max_steps": max_steps, "max_epochs": -1} | trainer_args
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        limit_val_batches=0,
        callbacks=list(schedules),
        **options,
    )
    trainer.fit(module, TinyData(), ckpt_path=ckpt_path)
    return module, trainer


def test_linear_weight_by_optimizer_step_equals_hand_computed_values(tmp_path):
    module, _ = fit(tmp_path, WeightSchedule("abs", kind="linear", start=1.0, end=3.0, begin=2, duration=4))
    expected = [1.0, 1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0]
    assert [weight for _, weight, _ in module.seen] == expected
    assert module.losses["square"].weight == 1.0


def test_accumulated_batches_of_one_step_share_the_weight(tmp_path):
    schedule = WeightSchedule("abs", start=0.0, end=1.0, begin=0, duration=2)
    module, _ = fit(tmp_path, schedule, max_steps=3, accumulate_grad_batches=2)
    assert [(step, weight) for step, weight, _ in module.seen] == [(0, 0), (0, 0), (1, 0.5), (1, 0.5), (2, 1), (2, 1)]


def test_fractions_are_of_the_whole_run_also_when_given_in_epochs(tmp_path):
    schedule = WeightSchedule("abs", start=0.0, end=1.0, begin=0.25, duration=0.5)
    module, trainer = fit(tmp_path, schedule, max_steps=-1, max_epochs=2)
    assert trainer.global_step == 8  # 4 batches per epoch
    assert [weight for _, weight, _ in module.seen] == [0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.filterwarnings("ignore:.*reaches 1.0 at optimizer step 8.*")
def test_resumed_run_continues_the_schedule(tmp_path):
    schedule = WeightSchedule("abs", start=0.0, end=1.0, begin=0, duration=8)
    _, trainer = fit(tmp_path, schedule, max_steps=4)  # the end of an epoch
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(tmp_path, WeightSchedule("abs", begin=0, duration=8), ckpt_path=tmp_path / "half.ckpt")
    assert [weight for _, weight, _ in resumed.seen] == [0.5, 0.625, 0.75, 0.875]


@pytest.mark.parametrize("as_buffer", [False, True])
def test_module_attribute_is_scheduled(tmp_path, as_buffer):
    module = Recorder({"abs": MeanAbs()})
    if as_buffer:
        del module.temperature
        module.register_buffer("temperature", torch.tensor(9.0))
    schedule = WeightSchedule(attribute="temperature", start=4.0, end=1.0, begin=0, duration=3)
    fit(tmp_path, schedule, module=module, max_steps=4)
    assert [temperature for _, _, temperature in module.seen] == [4.0, 3.0, 2.0, 1.0]
    assert isinstance(module.temperature, torch.Tensor) == as_buffer


@pytest.mark.filterwarnings("ignore:.*fingerprint.*")
def test_what_a_schedule_left_is_what_is_evaluated_and_used(tmp_path):
    def model():
        return SharedDiscreteCVAE(source, {"reconstruction_loss": ReconstructionLoss()}, num_latents=2)

    def schedules():
        options = {"kind": "constant", "begin": 1}
        yield WeightSchedule("reconstruction_loss", start=1.0, end=0.25, **options)
        yield WeightSchedule(attribute="posterior_temperature", start=5.0, end=0.5, **options)

    source = tiny_artifact(tmp_path / "artifact")
    trained = model()
    trainer = Trainer(**QUIET, max_steps=2, limit_val_batches=0, callbacks=list(schedules()))
    trainer.fit(trained, TinyRecords(RECORDS[:4], batch_size=2))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    loaded = SharedDiscreteCVAE.load_from_checkpoint(tmp_path / "end.ckpt")
    tested = model()
    Trainer(**QUIET, callbacks=list(schedules())).test(
        tested, TinyRecords(RECORDS), tmp_path / "end.ckpt", verbose=False
    )
    for found in (trained, loaded, tested):
        assert (found.posterior_temperature, found.losses["reconstruction_loss"].weight) == (0.5, 0.25)
    xs, ys = [r.x for r in RECORDS], [r.y for r in RECORDS]
    torch.testing.assert_close(loaded.infer(xs, ys), trained.eval().infer(xs, ys))
    assert loaded.hparams["posterior_temperature"] == 0.5  # which an export takes over


@pytest.mark.filterwarnings("ignore:.*fingerprint.*")
@pytest.mark.parametrize("weights_only", [False, True])
def test_what_the_caller_gives_beats_what_a_schedule_left(tmp_path, weights_only, caplog):
    path = tmp_path / "end.ckpt"
    schedules = [
        WeightSchedule("reconstruction_loss", kind="constant", begin=1, start=1.0, end=0.25),
        WeightSchedule(attribute="posterior_temperature", kind="constant", begin=1, start=5.0, end=0.5),
    ]
    model = SharedDiscreteCVAE(
        tiny_artifact(tmp_path / "artifact"), {"reconstruction_loss": ReconstructionLoss()}, num_latents=2
    )
    trainer = Trainer(**QUIET, max_steps=2, limit_val_batches=0, callbacks=schedules)
    trainer.fit(model, TinyRecords(RECORDS[:4], batch_size=2))
    trainer.save_checkpoint(path, weights_only=weights_only)

    def loaded(**given):
        found = SharedDiscreteCVAE.load_from_checkpoint(path, **given)
        return found.posterior_temperature, found.losses["reconstruction_loss"].weight

    assert loaded() == (0.5, 0.25)
    said = "posterior_temperature is 0.5, where its schedule had left it; the model's arguments say 0.3"
    assert said in caplog.text
    assert loaded(posterior_temperature=2.0) == (2.0, 0.25)
    assert loaded(losses={"reconstruction_loss": ReconstructionLoss(3.0)}) == (0.5, 3.0)


def test_what_the_optimizer_has_copied_cannot_be_scheduled(tmp_path):
    with pytest.raises(ValueError, match="the optimizer has a copy of 'learning_rate'"):
        fit(tmp_path, WeightSchedule(attribute="learning_rate"))


def test_warns_when_the_run_ends_before_the_maximum(tmp_path):
    with pytest.warns(UserWarning, match=r"loss 'abs' reaches 1\.0 at optimizer step 12, but the run ends at step 4"):
        fit(tmp_path, WeightSchedule("abs", begin=2, duration=10), max_steps=4)


def test_unknown_loss_names_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="no loss named 'kl'; the module has abs, square"):
        fit(tmp_path, WeightSchedule("kl"))
    with pytest.raises(ValueError, match="Recorder has no numeric attribute 'beta'"):
        fit(tmp_path, WeightSchedule(attribute="beta"))


def test_fraction_of_an_endless_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="run of known length"):
        fit(tmp_path, WeightSchedule("abs", duration=0.5), max_steps=-1, max_time="00:00:01:00")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either `loss` or `attribute`"),
        ({"loss": "a", "attribute": "b"}, "either `loss` or `attribute`"),
        ({"loss": "a", "kind": "sine"}, "kind must be"),
        ({"loss": "a", "begin": -1}, "begin must be"),
        ({"loss": "a", "duration": 1.5}, "duration must be"),
        ({"loss": "a", "kind": "cyclic", "cycles": 0}, "cycles >= 1"),
        ({"loss": "a", "kind": "cyclic", "ramp": 0.0}, "0 < ramp"),
    ],
)
def test_bad_arguments_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightSchedule(**arguments)


def test_cosine_is_half_way_at_half_time_and_flat_at_both_ends():
    values = [schedule_value(step, "cosine", 2.0, 6.0, begin=0, duration=100) for step in range(101)]
    assert values[0] == 2.0
    assert values[50] == pytest.approx(4.0)
    assert values[100] == 6.0
    assert values[1] - values[0] < 0.01 * (values[51] - values[50]) * 10
    assert values[25] == pytest.approx(2.0 + 4.0 * (1 - math.sqrt(0.5)) / 2)


def test_cyclic_equals_the_published_formula():
    """Fu et al. 2019: beta_t = f(tau) if tau <= R else 1, tau = mod(t - 1, ceil(T / M)) / (T / M), f(tau) = tau / R."""
    total, cycles, ramp = 120, 4, 0.5
    for t in range(1, total + 1):
        tau = math.fmod(t - 1, math.ceil(total / cycles)) / (total / cycles)
        expected = tau / ramp if tau <= ramp else 1.0
        value = schedule_value(t - 1, "cyclic", 0.0, 1.0, begin=0, duration=total, cycles=cycles, ramp=ramp)
        assert value == pytest.approx(expected)


def test_constant_switches_at_begin():
    assert [schedule_value(s, "constant", 0.0, 2.0, begin=2, duration=5) for s in range(4)] == [0.0, 0.0, 2.0, 2.0]


@given(
    step=st.integers(0, 300),
    kind=st.sampled_from(["constant", "linear", "cosine", "cyclic"]),
    start=st.floats(-5, 5),
    end=st.floats(-5, 5),
    begin=st.integers(0, 50),
    duration=st.integers(0, 100),
    cycles=st.integers(1, 7),
    ramp=st.floats(0.05, 1.0),
)
def test_value_stays_between_start_and_end(step, kind, start, end, begin, duration, cycles, ramp):
    value = schedule_value(step, kind, start, end, begin, duration, cycles, ramp)
    assert min(start, end) - 1e-9 <= value <= max(start, end) + 1e-9
    assert step < begin + duration or value == end
