import re
from types import SimpleNamespace

import pytest
import torch
from callback_fakes import FakeData, FakeModule, MirrorTask, make_trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from cvae_lightning.callbacks.dashboard import layout, readable_hyperparameters
from cvae_lightning.callbacks.evaluation import Generation, StrategyEvaluation
from cvae_lightning.callbacks.tensorboard import TensorBoardFigures, generation_table
from cvae_lightning.metrics import LatentUsage, StrategyAlignment
from cvae_lightning.outputs import DiscreteOutputs, PairBatch, Record

CONTRIBUTIONS = [{"reconstruction_loss": 1.0}, {"reconstruction_loss": 0.75, "late_loss": 0.25}]


class FakeTemplate:
    class tokenizer:
        @staticmethod
        def convert_ids_to_tokens(ids):
            return [chr(i) for i in ids]


class FigureModule(FakeModule):
    """Keeps the metrics and outputs that the figures read, and resets the metrics when the epoch ends."""

    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"num_latents": 2, "losses": {"kl": {"weight": 0.5}}, "_instantiator": "hidden"})
        self.template = FakeTemplate()
        self.usage, self.alignment = LatentUsage(2), StrategyAlignment(2, 2)
        self.to_log = {"rho_recon": 0.5, "alignment/one_to_one": 1.0}

    def validation_step(self, batch, batch_idx):
        log_probs = torch.tensor([[0.75, 0.25]]).log()
        self.usage.update(log_probs, log_probs)
        self.alignment.update(torch.tensor([batch_idx]), torch.tensor([batch_idx]))
        ids = torch.tensor([[ord(c) for c in "12=2$"]])
        mask = torch.tensor([[True, True, True, True, False]])
        pair = PairBatch(ids, mask, ids, mask, torch.tensor([0]), torch.tensor([1]), ("12",), ("12=2",))
        outputs = DiscreteOutputs(
            log_probs, log_probs, log_probs, torch.rand(1, 2, 5), mask, torch.tensor(1.0), baseline_nll=torch.rand(1, 5)
        )
        self.last_outputs = {"batch": pair, "outputs": outputs}

    test_step = validation_step

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        shares = CONTRIBUTIONS[min(self.current_epoch, 1)]
        self.log_dict({f"train/loss_contrib/fraction_abs/{name}": value for name, value in shares.items()})
        self.usage.reset()
        self.alignment.reset()


def read(folder) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return events.Reload()


def text(events: EventAccumulator, tag: str) -> str:
    return events.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()


def test_a_validation_without_generations_draws_none(tmp_path):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    evaluation = StrategyEvaluation(every_n_validations=2)
    trainer = make_trainer(evaluation, TensorBoardFigures(), logger=logger, max_epochs=3)
    trainer.fit(FigureModule(), FakeData(MirrorTask()))
    events = read(logger.log_dir)
    drawn = [event.step for event in events.Images("val/figures/alignment_controlled")]
    assert len(events.Images("val/figures/latent_usage")) == 3
    assert drawn == [event.step for event in events.Images("val/figures/latent_usage")][1:2]
    assert len(events.Tensors("val/generations/controlled/text_summary")) == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Fit two epochs, then test, with everything switched on; return (events, figures callback)."""
    logger = TensorBoardLogger(tmp_path_factory.mktemp("logs"), default_hp_metric=False)
    drawer = TensorBoardFigures()
    trainer = make_trainer(StrategyEvaluation(), drawer, logger=logger, max_epochs=2, num_sanity_val_steps=1)
    module, data = FigureModule(), FakeData(MirrorTask())
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    logger.finalize("success")
    return read(logger.log_dir), drawer


FIGURES = ["alignment_controlled", "alignment_posterior", "latent_distance", "latent_usage", "token_strip"]


def test_every_figure_arrives_readable(run):
    events, _ = run
    expected = [f"val/figures/{name}" for name in [*FIGURES, "loss_contributions"]]
    expected += [f"test/figures/{name}" for name in FIGURES]
    assert sorted(events.Tags()["images"]) == sorted(expected)
    for tag in expected:
        images = events.Images(tag)
        assert [i.step for i in images] == ([2, 4] if tag.startswith("val") else [4])  # and none from the sanity check
        assert all(400 <= i.width <= 900 and i.height >= 150 for i in images)
        assert all(i.encoded_image_string.startswith(b"\x89PNG") for i in images)


def test_contribution_history_keeps_terms_that_come_late(run):
    _, drawer = run
    assert drawer.steps == [2, 4]
    assert drawer.contributions == {"reconstruction_loss": [1.0, 0.75], "late_loss": [0.0, 0.25]}
    resumed = TensorBoardFigures()
    resumed.load_state_dict(drawer.state_dict())
    assert (resumed.steps, resumed.contributions) == (drawer.steps, drawer.contributions)


def test_generations_are_text(run):
    events, _ = run
    controlled = text(events, "val/generations/controlled")
    assert "| 12 | z0 | 12=2 | yes | keep |" in controlled
    assert "| 56 | z1 | 56=? | **no** |  |" in controlled
    assert text(events, "val/generations/sampled").count("z0") == 4


def charts(layout):
    return {(category, name): tags for category, part in layout.items() for name, (_, tags) in part.items()}


def test_layout_is_written(run):
    events, _ = run
    content = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    found = layout_pb2.Layout.FromString(content)
    written = {(part.title, chart.title): [*chart.multiline.tag] for part in found.category for chart in part.chart}
    assert written == charts(layout(discrete=True))
    assert charts(layout(discrete=False)).keys() ^ written.keys() >= {("latents", "linear probe")}


def test_a_chart_draws_the_tags_that_it_names_and_no_longer_ones():
    def drawn(chart):  # as TensorBoard matches
        return {tag for tag in tags if any(re.compile(pattern).match(tag) for pattern in found[chart])}

    found = charts(layout(discrete=True))
    tags = ["val/loss", "val/loss_contrib/fraction_abs/a", "train/loss_contrib/fraction_abs/a", "val/elbo"]
    tags += ["val/marginal_nll", "val/marginal_nll_ratio", "val/baseline_nll", "val/controlled/alignment_ceiling"]
    assert drawn(("objective", "objective")) == {"val/loss"}
    assert drawn(("objective", "contribution of each term")) == {"train/loss_contrib/fraction_abs/a"}
    assert drawn(("against the entangled model", "NLL (nats per token)")) == {"val/marginal_nll", "val/baseline_nll"}
    assert drawn(("alignment", "one-to-one, and its ceiling")) == {"val/controlled/alignment_ceiling"}


def test_hyperparameters_stand_beside_the_scalars_that_the_run_logged(run):
    events, _ = run
    plugin = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(plugin).session_start_info
    assert start.hparams["losses/kl/weight"].number_value == 0.5
    assert "_instantiator" not in start.hparams
    content = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    experiment = plugin_data_pb2.HParamsPluginData.FromString(content).experiment
    assert [info.name for info in experiment.hparam_infos if info.differs] == ["num_latents"]  # comes first
    metrics = {info.name.tag for info in experiment.metric_infos}
    assert metrics == {
        "val/rho_recon",
        "val/alignment/one_to_one",
        *(f"val/{key}" for key in ("controlled/alignment_one_to_one", "controlled/final_answer_accuracy")),
        "val/sampled/final_answer_accuracy",
    }
    assert metrics <= {*events.Tags()["scalars"]}  # and no scalar is written for this page alone
    assert events.Scalars("val/controlled/final_answer_accuracy")[-1].value == pytest.approx(7 / 8)
    assert [event.value for event in events.Scalars("val/rho_recon")] == [0.5, 0.5]


def test_hyperparameters_read_like_the_recipe():
    given = {
        "_class_path": "hidden",
        "num_latents": 4,
        "branch_method": "auto",
        "seeding": None,
        "entangled": {"tokenizer": "{" + 500 * "x"},
        "losses": {
            "kl": {"class_path": "my_losses.PriorKLLoss", "init_args": {"weight": 0.5}},
            "off": None,
        },
    }
    assert readable_hyperparameters(given) == {
        "num_latents": 4,
        "entangled/tokenizer": "{" + 78 * "x" + "…",
        "losses/kl/weight": 0.5,
    }


@pytest.mark.parametrize("kind", ["csv", "none"])
def test_other_loggers_get_nothing(tmp_path, kind):
    logger = CSVLogger(tmp_path) if kind == "csv" else False
    trainer = make_trainer(StrategyEvaluation(), TensorBoardFigures(), logger=logger, max_epochs=1)
    trainer.fit(FigureModule(), FakeData(MirrorTask()))
    assert not list(tmp_path.rglob("events*"))


def test_module_without_metrics_or_labels(tmp_path):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    trainer = make_trainer(StrategyEvaluation(), TensorBoardFigures(), logger=logger, max_epochs=1)
    trainer.fit(FakeModule(), FakeData(None))
    assert read(logger.log_dir).Tags()["images"] == ["val/figures/latent_distance"]


class SeededModule(FakeModule):
    """Seeds its latents where a fit starts, unless a run before has done so."""

    def __init__(self, seeding):
        super().__init__()
        self.seeding = seeding

    def on_train_start(self):
        if self.seeding is not None and self.global_step == 0:
            self.seeding.points, self.seeding.clusters = torch.randn(9, 2), torch.arange(9) % 3


@pytest.mark.parametrize("seeds", [True, False])
def test_seeds_are_drawn_once_and_where_there_are_some(tmp_path, seeds):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    module = SeededModule(SimpleNamespace(points=None, clusters=None) if seeds else None)
    options = {"logger": logger, "max_epochs": 2, "limit_val_batches": 0}
    trainer = make_trainer(TensorBoardFigures(), **options)
    trainer.fit(module, FakeData())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert read(logger.log_dir).Tags()["images"] == ["train/figures/seeds"] * seeds
    if not seeds:
        return
    images = read(logger.log_dir).Images("train/figures/seeds")
    assert [image.step for image in images] == [0]
    assert images[0].encoded_image_string.startswith(b"\x89PNG")
    module.seeding.points = None
    resumed = make_trainer(TensorBoardFigures(), **options | {"max_epochs": 3})
    resumed.fit(module, FakeData(), ckpt_path=tmp_path / "run.ckpt")
    assert len(read(logger.log_dir).Images("train/figures/seeds")) == 1


def test_text_is_escaped():
    rows = [
        *[Generation("a|b", 0, "<b>*x*\ny", None)] * 2,
        Generation("other", 1, "y"),
    ]  # an x drawn twice is shown once
    table = generation_table(rows, 1)
    assert table.splitlines()[2:] == ["| a&#124;b | z0 | &lt;b&gt;&#42;x&#42; y |  |  |"]


def test_characters_outside_the_font_do_not_warn(tmp_path, recwarn):
    class Exotic(FigureModule):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            ids = torch.tensor([[0x65E5, 0x1F600, ord("$"), ord("_"), 0]])
            self.last_outputs["batch"] = PairBatch(
                ids, ids > 0, ids, ids > 0, torch.tensor([0]), torch.tensor([-1]), ("日本$_",), ("x",)
            )

    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    make_trainer(TensorBoardFigures(), logger=logger).validate(Exotic(), FakeData(), verbose=False)
    assert "val/figures/token_strip" in read(logger.log_dir).Tags()["images"]
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_sequences must be at least 1, got 0"):
        TensorBoardFigures(num_sequences=0)


def test_record_is_what_the_fakes_promise():
    assert FakeData().records("val")[1] == Record("34", "34=4", 0, 1)
