"""Probes, clusters, controlled generation and panels on a module whose latents are known."""

import lightning as L
import pytest
import torch
from callback_fakes import FakeData, FakeModule, MirrorTask, make_trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from cvae_lightning.callbacks import ContinuousEvaluation, LatentPanels
from cvae_lightning.callbacks.latent_panels import terms_table
from cvae_lightning.losses import PriorKLLoss, ReconstructionLoss
from cvae_lightning.metrics.continuous import ContinuousMetrics
from cvae_lightning.outputs import ContinuousOutputs, PairBatch, Record

SIZE = 40


class MirrorData(FakeData):
    """Every second record is solved by the second strategy."""

    def __init__(self, task=None, labelled=True):
        super().__init__(task, tuple(f"{i:02d}" for i in range(SIZE)))
        self.labelled = labelled

    def records(self, split):
        names = MirrorTask.strategies
        return [
            Record(x, MirrorTask().solve(x, names[i % 4 // 2]), i % 4 // 2 if self.labelled else -1, i)
            for i, x in enumerate(self.inputs)
        ]

    def val_dataloader(self):
        return DataLoader(torch.arange(SIZE), batch_size=8)

    test_dataloader = val_dataloader


class GaussianModule(FakeModule):
    """q(z|x,y) lies near -2 for the first strategy and near +2 for the second; z < 0 writes the first."""

    num_latents = 0

    def __init__(self, reach=2.0):
        super().__init__()
        del self.num_latents
        self.reach = reach
        self.losses = torch.nn.ModuleDict({"reconstruction_loss": ReconstructionLoss(), "kl": PriorKLLoss(0.0)})
        self.metrics = ContinuousMetrics(2)

    def generate(self, x, z="router", **options):
        assert not self.training
        torch.rand(3)
        if isinstance(z, str):
            assert z == "router"
            z = torch.zeros(len(x), 2)
        self.calls.append(z)
        return [MirrorTask().solve(a, MirrorTask.strategies[int(row[0] > 0)]) for a, row in zip(x, z, strict=True)]

    def validation_step(self, batch, batch_idx):
        n, index = len(batch), batch
        side = 2.0 * (index % 4 // 2) - 1
        strategy = torch.tensor([self.trainer.datamodule.records("val")[i].strategy for i in index.tolist()])
        mean = torch.stack([self.reach * side + 0.01 * index, 0.1 * (index % 3 - 1)], -1)
        ones = torch.ones(n, 3)
        outputs = ContinuousOutputs(
            torch.zeros(n, 2),
            torch.zeros(n, 2),
            mean,
            torch.full((n, 2), -2.0),
            torch.ones(n, 4, 3),
            ones.bool(),
            log_evidence=-ones.sum(-1),
            log_evidence_error=0.1 * ones[:, 0],
        )
        pair = PairBatch(ones.long(), ones.bool(), ones.long(), ones.bool(), index, strategy, (), ())
        terms = {"reconstruction_loss": torch.tensor(1.0), "kl": torch.tensor(0.5)}
        self.metrics.update(outputs, pair, terms, {})

    test_step = validation_step

    def on_validation_epoch_end(self):
        self.log_dict({f"val/{key}": value for key, value in self.metrics.compute_and_reset(None).items()})

    def on_test_epoch_end(self):
        self.log_dict({f"test/{key}": value for key, value in self.metrics.compute_and_reset(None).items()})


def test_scores_of_a_latent_that_holds_the_strategy():
    evaluation = ContinuousEvaluation(num_examples=10)
    logged = make_trainer(evaluation).validate(GaussianModule(), MirrorData(MirrorTask()), verbose=False)[0]
    # "00" and "11" read the same both ways; of the first ten inputs "00" alone is one: A = (9 + 1/2) / 10
    assert logged["val/controlled/alignment_one_to_one"] == pytest.approx(0.95)
    assert logged["val/controlled/alignment_ceiling"] == pytest.approx(0.95)
    assert logged["val/controlled/final_answer_accuracy"] == 1.0
    assert logged["val/sampled/final_answer_accuracy"] == 1.0
    assert logged["val/alignment/one_to_one"] >= 0.95  # palindromes cannot be told apart
    assert logged["val/probe/posterior_accuracy"] >= 0.95
    assert logged["val/probe/router_accuracy"] <= 0.6
    assert logged["val/probe/floor"] <= 0.8
    assert logged["val/clusters/min_distance"] == pytest.approx(4, abs=0.3)
    assert logged["val/clusters/separation"] > 10
    assert logged["val/diagnostics/active_units"] == 1.0
    assert logged["val/marginal_nll"] == 1.0
    assert logged["val/marginal_nll_standard_error"] == pytest.approx((0.01 / SIZE) ** 0.5 / 3, rel=1e-5)
    assert evaluation.contingency.sum() == SIZE
    assert [g.k for g in evaluation.controlled[:4]] == [0, 1, 0, 1]
    assert all(g.k == -1 for g in evaluation.samples)


def test_scores_of_a_latent_that_holds_nothing():
    logged = make_trainer(ContinuousEvaluation(num_examples=10)).test(
        GaussianModule(reach=0.0), MirrorData(MirrorTask()), verbose=False
    )[0]
    assert logged["test/probe/posterior_accuracy"] < 0.8
    assert logged["test/alignment/one_to_one"] < 0.8


def test_without_labels_and_verifier_only_what_can_be_computed():
    evaluation = ContinuousEvaluation(num_examples=4, num_clusters=3, clusterer="gaussian_mixture")
    logged = make_trainer(evaluation).validate(GaussianModule(), MirrorData(None, labelled=False), verbose=False)[0]
    assert not [key for key in logged if "alignment" in key or "probe" in key or "accuracy" in key]
    assert logged["val/controlled/distinct_fraction"] >= 0
    assert evaluation.clusters.centroids.shape == (3, 2)
    assert evaluation.contingency is None


def test_evaluation_leaves_random_state_and_mode_alone():
    after = []
    for callbacks in ([], [ContinuousEvaluation(num_examples=2), LatentPanels()]):
        module = GaussianModule().train()
        torch.manual_seed(1)
        make_trainer(*callbacks).validate(module, MirrorData(MirrorTask()), verbose=False)
        after.append(torch.rand(3))
        assert module.training
    assert torch.equal(*after)


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_clusters"):
        ContinuousEvaluation(num_clusters=0)
    with pytest.raises(ValueError, match="clusterer"):
        ContinuousEvaluation(clusterer="spectral")
    with pytest.raises(ValueError, match="num_steps"):
        LatentPanels(num_steps=1)
    with pytest.raises(ValueError, match="reach"):
        LatentPanels(reach=0)


def test_panels_reach_tensorboard(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="", default_hp_metric=False)
    panels = LatentPanels(num_inputs=1, num_steps=3, max_dimensions=1)
    trainer = make_trainer(
        ContinuousEvaluation(num_examples=4), panels, logger=logger, max_epochs=2, num_sanity_val_steps=1
    )
    module = GaussianModule()
    trainer.fit(module, MirrorData(MirrorTask()))
    trainer.test(module, MirrorData(MirrorTask()), verbose=False)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "tensors": 0}).Reload()
    names = {"latent_scatter", "router_marginal", "centroid_distances", "alignment_clusters"}
    assert {f"{stage}/figures/{name}" for stage in ("val", "test") for name in names} <= set(events.Tags()["images"])
    assert len(events.Images("val/figures/latent_scatter")) == 2
    traversal = events.Tensors("val/latent/traversal/text_summary")[0].tensor_proto.string_val[0].decode()
    assert traversal.splitlines()[0] == "| x | dimension | value | y |"
    assert len(traversal.splitlines()) == 2 + 3
    assert "00=0" in traversal
    terms = events.Tensors("val/latent/terms/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| active |" in terms
    assert "| diagnostic only |" in terms
    assert (tmp_path / "projector_config.pbtxt").read_text().count("posterior_mean") >= 2
    metadata = next(tmp_path.rglob("metadata.tsv")).read_text().splitlines()
    assert metadata[0] == "strategy\trecord"
    assert len(metadata) == SIZE + 1
    points = [line.split("\t") for line in next(tmp_path.rglob("tensors.tsv")).read_text().splitlines()]
    assert {len(point) for point in points} == {3}  # of a latent with two dimensions
    assert len(panels.centroids) == 2
    fresh = LatentPanels()
    fresh.load_state_dict(panels.state_dict())
    assert fresh.centroids == panels.centroids


def test_panels_of_data_without_records_have_no_traversal(tmp_path):
    class Own(L.LightningDataModule):
        strategy_names = MirrorTask.strategies

        def val_dataloader(self):
            return MirrorData().val_dataloader()

    class Alone(GaussianModule):
        def validation_step(self, batch, batch_idx):
            self.trainer.datamodule.records = MirrorData().records
            super().validation_step(batch, batch_idx)
            del self.trainer.datamodule.records

    logger = TensorBoardLogger(tmp_path, name="", version="", default_hp_metric=False)
    with pytest.warns(UserWarning, match="needs a data module with records"):
        make_trainer(ContinuousEvaluation(), LatentPanels(), logger=logger).validate(Alone(), Own(), verbose=False)
    tags = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "tensors": 0}).Reload().Tags()
    assert "val/figures/latent_scatter" in tags["images"]
    assert "val/latent/traversal/text_summary" not in tags["tensors"]


def test_panels_without_tensorboard(tmp_path):
    trainer = make_trainer(ContinuousEvaluation(num_examples=2), LatentPanels(), logger=CSVLogger(tmp_path))
    trainer.validate(GaussianModule(), MirrorData(MirrorTask()), verbose=False)
    assert not list(tmp_path.rglob("*.pbtxt"))


def test_terms_table_says_which_terms_act():
    losses = {"a": ReconstructionLoss(2.0), "b": PriorKLLoss(0.0)}
    metrics = {"val/a": 0.5, "val/b": 3.25, "val/loss_contrib/fraction_abs/a": 1.0}
    lines = terms_table(losses, metrics, "val").splitlines()
    assert lines[2] == "| a | 0.5 | 2 | active | 1.000 |"
    assert lines[3].startswith("| b | 3.25 | 0 | diagnostic only |")
