"""CVAEs of which little is trained: one set of weights, beside which everything stands that training changes."""

import math

import lightning as L
import pytest
import torch
from processes import run_in_processes
from tiny import CONFIGS, QUIET, RECORDS, TinyData, tiny_artifact
from torch.nn.parallel import DistributedDataParallel

from cvae_lightning import losses as losses_
from cvae_lightning.backbones.causal_lm import build_causal_lm, head_of, load_causal_lm
from cvae_lightning.backbones.tokenizer import build_tokenizer
from cvae_lightning.callbacks.checkpoint_io import AtomicCheckpointIO
from cvae_lightning.export import folder as folder_
from cvae_lightning.export.loading import load_export
from cvae_lightning.export.restore import restore
from cvae_lightning.modules import ContinuousCVAE, LoRA, SharedDiscreteCVAE

XS, YS = ["12", "3456", "80"], ["21=3", "6=6", "0=8"]
ADAPTATIONS = ["frozen", "lora"]
MAMBA = {
    **{"model_type": "mamba2", "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 8},
    **{"state_size": 4, "n_groups": 1, "chunk_size": 4},
}
KINDS = {
    "discrete": (SharedDiscreteCVAE, {"num_latents": 3}),
    "tokens and norms": (SharedDiscreteCVAE, {"num_latents": 3, "prefix_length": 2, "norm_dim": 2}),
    "continuous": (ContinuousCVAE, {"latent_dim": 2, "num_router_samples": 2, "num_eval_samples": 2}),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*fingerprint.*")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("entangled"), "qwen2")  # its head is not tied


def build(entangled, adaptation, kind="discrete", **options):
    if adaptation == "lora":
        pytest.importorskip("peft")
    cls, own = KINDS[kind]
    terms = {"free_energy_loss": losses_.FreeEnergyLoss(), "distillation": losses_.PosteriorDistillationLoss()}
    torch.manual_seed(2)
    return cls(
        entangled, terms, baseline_cache=False, learning_rate=1e-2, warmup_steps=0, adaptation=adaptation,
        **own | options,
    )  # fmt: skip


def fit(model, folder, epochs=2, ckpt_path=None, precision="32-true"):
    trainer = L.Trainer(
        **QUIET, max_epochs=epochs, default_root_dir=folder, precision=precision, plugins=[AtomicCheckpointIO()]
    )
    trainer.fit(model, TinyData(), ckpt_path=ckpt_path)
    return trainer


def saved(model, folder, **options):
    fit(model, folder, **options).save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def said(model):
    model.eval()
    route, infer = model.route(XS), model.infer(XS, YS)
    parts = (*route, *infer) if isinstance(route, tuple) else (route, infer)
    return torch.cat([*parts, model.log_evidence(XS, YS)[:, None]], -1)


@pytest.fixture(scope="module", params=[(kind, a) for kind in KINDS for a in ADAPTATIONS], ids=" ".join)
def trained(request, artifact, tmp_path_factory):
    """A model after four steps, what its parameters were before them, and its checkpoint."""
    kind, adaptation = request.param
    model = build(artifact, adaptation, kind)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    return kind, model, start, saved(model, tmp_path_factory.mktemp("trained"))


def foreign(folder):
    """A model that has never seen a marker, with room in its table and a tied head."""
    torch.manual_seed(5)
    tokenizer = build_tokenizer(["0123456789;="], "char")
    config = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    for size, name in ((len(tokenizer), "tight"), (len(tokenizer) + 20, "roomy")):
        build_causal_lm(config, size, 0).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def test_all_that_is_trained_stands_beside_the_entangled_model(artifact, trained):
    kind, model, start, _ = trained
    entangled = load_causal_lm(artifact)
    for (name, found), expected in zip(model.reference().named_parameters(), entangled.parameters(), strict=True):
        assert torch.equal(found, expected), name
    for name, value in model.named_parameters():
        frozen = any(value is p for p in model.reference().parameters())
        assert value.requires_grad != frozen, name
        assert torch.equal(value, start[name]) == frozen, name
    held = {
        value.untyped_storage().data_ptr(): value.numel() for value in model.parameters() if not value.requires_grad
    }
    assert sum(held.values()) == sum(p.numel() for p in entangled.parameters())  # one model, not three
    batch = model.template.collate(RECORDS)
    torch.testing.assert_close(model.baseline_nll(batch), build(artifact, "full", kind).baseline_nll(batch))


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
@pytest.mark.parametrize("name", ["tight", "roomy"])
def test_a_foreign_model_is_the_same_baseline_however_it_is_adapted(tmp_path, name, adaptation):
    foreign(tmp_path)
    full, model = (build(str(tmp_path / name), a) for a in ("full", adaptation))
    batch = model.template.collate(RECORDS)
    expected = full.baseline_nll(batch)
    assert torch.equal(model.baseline_nll(batch), expected)
    table = load_causal_lm(str(tmp_path / name)).get_input_embeddings().weight
    changed = (model.reference().get_input_embeddings().weight[: len(table)] != table).any(-1).nonzero().flatten()
    markers = [i for i in model.template.marker_ids.values() if i < len(table)]  # which it has never seen
    assert changed.tolist() == markers
    assert len(markers) == (6 if name == "roomy" else 0)
    fit(model, tmp_path)
    torch.testing.assert_close(model.baseline_nll(batch), expected)
    latents = head_of(model.lm).weight[model.template.all_latent_ids]
    assert torch.pdist(latents).min() > 0.01


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize(("kind", "adaptation"), [("discrete", "full"), ("discrete", "frozen"), ("continuous", "lora")])
def test_half_precision_trains_nearly_the_same(artifact, tmp_path, kind, adaptation, precision):
    values = []
    for chosen in ("32-true", precision):
        model = build(artifact, adaptation, kind)
        trainer = fit(model, tmp_path / chosen, 1, precision=chosen)
        values.append(float(trainer.callback_metrics["train/loss"]))
        assert all(p.isfinite().all() for p in model.parameters())
    assert {p.dtype for p in model.lm.parameters()} == {torch.bfloat16 if precision == "bf16-true" else torch.float32}
    assert math.isclose(*values, rel_tol=0.1)


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(artifact, adaptation, reentrant):
    grads = []
    for recompute in (False, True):
        model = build(artifact, adaptation).train()
        if recompute:
            for lm in (model.lm, model.posterior_network.backbone):
                lm.activation_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)
        model._step(model.template.collate(RECORDS), "train")[0].backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(value is not None for value in grads[1].values())
    torch.testing.assert_close(grads[1], grads[0], atol=1e-4, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by the compiler
@pytest.mark.parametrize(
    ("kind", "adaptation"), [("discrete", "full"), ("continuous", "frozen"), ("tokens and norms", "lora")]
)
def test_a_compiled_language_model_trains_the_same(artifact, tmp_path, kind, adaptation):
    graphs, trained = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for compiled in (False, True):
        model = build(artifact, adaptation, kind)
        if compiled:
            torch.compiler.reset()
            model.lm.get_decoder().compile(backend=backend, dynamic=True)
        trainer = fit(model, tmp_path, epochs=1)
        trained.append(dict(model.named_parameters()))
    assert trainer.global_step
    assert graphs
    torch.testing.assert_close(trained[1], trained[0], atol=1e-5, rtol=1e-4)


def test_compiling_the_whole_module_is_refused(artifact, tmp_path):
    with pytest.raises(ValueError, match=r"get_decoder\(\)\.compile"):
        fit(torch.compile(build(artifact, "frozen"), backend="eager"), tmp_path)


def test_gradient_checkpointing_with_norms_is_refused(artifact):
    model = build(artifact, "frozen", "tokens and norms").train()
    model.lm.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="norms do not work under gradient checkpointing"):
        model._step(model.template.collate(RECORDS), "train")


def test_dropout_of_adapters_leaves_the_exact_posterior_and_the_baseline_alone(artifact):
    model = build(artifact, "lora", lora=LoRA(dropout=0.9)).train()
    torch.nn.init.normal_(next(p for n, p in model.lm.named_parameters() if "lora_B" in n))
    batch = model.template.collate(RECORDS)
    first, second = (model.compute_outputs(batch, frozenset({"baseline_nll"})) for _ in range(2))
    assert not torch.equal(first.token_nll, second.token_nll)
    torch.testing.assert_close(first.posterior_log_probs, second.posterior_log_probs)
    assert torch.equal(first.baseline_nll, second.baseline_nll)


def test_a_checkpoint_holds_what_was_trained_and_comes_back(artifact, trained, tmp_path):
    _, model, _, path = trained
    stored = torch.load(path, weights_only=True)
    names = {name for name, value in model.named_parameters() if value.requires_grad}
    assert names <= stored["state_dict"].keys()
    assert not any(name.endswith("table.weight") or "base_layer" in name for name in stored["state_dict"])
    assert stored["hyper_parameters"]["entangled"]["base_name"] == artifact
    assert stored["cvae_lightning_format"] == 2
    expected = said(model)
    again = type(model).load_from_checkpoint(path)
    torch.testing.assert_close(said(again), expected)
    torch.testing.assert_close(said(restore(path).module), expected)
    batch = model.template.collate(RECORDS)
    assert torch.equal(again.baseline_nll(batch), model.baseline_nll(batch))
    torch.testing.assert_close(said(type(model).load_from_checkpoint(saved(again, tmp_path, epochs=0))), expected)


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_training_goes_on_where_it_stopped(artifact, tmp_path, adaptation):
    options = {"final_learning_rate_fraction": 1.0}  # so that it does not depend on how long the run is to be
    straight = build(artifact, adaptation, **options)
    fit(straight, tmp_path / "straight", 3)
    path = saved(build(artifact, adaptation, **options), tmp_path, epochs=2)
    resumed = build(artifact, adaptation, latent_token_std=9.0, **options)  # how it starts plays no part
    fit(resumed, tmp_path / "resumed", 3, ckpt_path=path)
    for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_a_state_space_model_is_frozen_too(tmp_path):
    torch.manual_seed(0)
    tokenizer = build_tokenizer(["0123456789;="], "char")
    build_causal_lm(MAMBA, len(tokenizer), 0).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = build(str(tmp_path / "base"), "frozen")
    before = model.baseline_nll(model.template.collate(RECORDS))
    path = saved(model, tmp_path)
    torch.testing.assert_close(model.baseline_nll(model.template.collate(RECORDS)), before)
    torch.testing.assert_close(said(SharedDiscreteCVAE.load_from_checkpoint(path)), said(model))
    assert model.generate_all(XS, max_new_tokens=4) == [
        [model.generate([x], k, max_new_tokens=4)[0] for k in range(3)] for x in XS
    ]


def test_two_processes_take_the_step_of_one(artifact, tmp_path):
    def gradients(rank):
        model = build(artifact, "lora").train()
        model.forward = lambda records: model._step(model.template.collate(records), "train")[0]
        wrapped = model if rank is None else DistributedDataParallel(model)
        wrapped(RECORDS if rank is None else RECORDS[:4] if rank == 0 else RECORDS[4:]).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients(None)
    for found in run_in_processes(gradients, tmp_path):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_base_that_is_gone_or_another_is_one_clear_error(tmp_path):
    foreign(tmp_path)
    base, moved = tmp_path / "tight", tmp_path / "moved"
    model = build(str(base), "frozen")
    path = saved(model, tmp_path)
    expected = said(model)
    base.rename(moved)
    with pytest.raises(
        ValueError, match=r"without the frozen weights of '.*tight'; cannot load .*give model\.entangled"
    ):
        SharedDiscreteCVAE.load_from_checkpoint(path)
    torch.testing.assert_close(said(SharedDiscreteCVAE.load_from_checkpoint(path, entangled=str(moved))), expected)
    with pytest.raises(ValueError, match=r"frozen weights with the hash \w{32}, those of '.*roomy' have \w{32}: give"):
        SharedDiscreteCVAE.load_from_checkpoint(path, entangled=str(tmp_path / "roomy"))
    (tmp_path / "roomy").rename(base)
    with pytest.raises(ValueError, match=r"frozen weights with the hash \w{32}, those of '.*tight' have \w{32}: give"):
        SharedDiscreteCVAE.load_from_checkpoint(path)


def test_a_base_is_found_from_another_folder_and_kept_if_asked_for(tmp_path, monkeypatch):
    foreign(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    models = {keep: build("tight", "frozen", keep_frozen=keep) for keep in (False, True)}
    paths = {keep: saved(model, tmp_path / str(keep)) for keep, model in models.items()}
    monkeypatch.chdir(tmp_path / "elsewhere")
    torch.testing.assert_close(said(SharedDiscreteCVAE.load_from_checkpoint(paths[False])), said(models[False]))
    (tmp_path / "tight").rename(tmp_path / "gone")
    again = SharedDiscreteCVAE.load_from_checkpoint(paths[True])
    torch.testing.assert_close(said(again), said(models[True]))
    again.keep_frozen = False  # nothing says where else its base would be
    torch.testing.assert_close(
        said(SharedDiscreteCVAE.load_from_checkpoint(saved(again, tmp_path, epochs=0))), said(models[True])
    )


def test_checkpoints_of_another_adaptation_or_a_later_format_are_refused(artifact, tmp_path):
    path = saved(build(artifact, "frozen"), tmp_path)
    with pytest.raises(ValueError, match=r"trained with adaptation=frozen, this model has full: set model\.adaptation"):
        fit(build(artifact, "full"), tmp_path, ckpt_path=path)
    stored = torch.load(path, weights_only=True)
    torch.save(stored | {"cvae_lightning_format": 3}, path)
    for load in (SharedDiscreteCVAE.load_from_checkpoint, restore):
        with pytest.raises(ValueError, match="has the checkpoint format 3; this version reads formats up to 2"):
            load(path)


def test_an_export_has_the_logits_of_the_checkpoint(trained, tmp_path):
    from transformers import AutoModelForCausalLM

    kind, _, _, path = trained
    model = restore(path).module
    (tmp_path / "out").mkdir()
    size = folder_.write_model(tmp_path / "out", model, kind if kind == "continuous" else "discrete", posterior=True)
    ids = torch.randint(len(model.template), (4, 9), generator=torch.Generator().manual_seed(0))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model.lm(ids).logits, atol=1e-4, rtol=1e-4)
    assert size == plain.num_parameters()
    loaded = load_export(tmp_path / "out")
    assert loaded.adaptation == "full"
    torch.testing.assert_close(said(loaded), said(model), atol=1e-4, rtol=1e-4)
    z = "mean" if kind == "continuous" else "argmax"
    assert loaded.generate(XS, z) == model.generate(XS, z)


def test_wrong_options_are_one_clear_error(artifact):
    with pytest.raises(ValueError, match="adaptation must be 'full', 'lora' or 'frozen', got 'half'"):
        build(artifact, "half")
    with pytest.raises(ValueError, match="lora has no effect with adaptation=frozen"):
        build(artifact, "frozen", lora=LoRA())
    for options, why in (
        ({"rank": 0}, "lora.rank must be at least 1, got 0"),
        ({"alpha": 0.0}, "lora.alpha must be positive, got 0.0"),
        ({"dropout": 1.0}, "lora.dropout must be at least 0 and below 1, got 1.0"),
        ({"target_modules": []}, "lora.target_modules is empty"),
    ):
        with pytest.raises(ValueError, match=why):
            LoRA(**options)


@pytest.mark.parametrize("adaptation", ["full", "frozen"])
def test_markers_of_a_plain_model_with_a_padded_table_differ(adaptation, tmp_path):
    """And they are the same ones whenever the model is loaded."""
    tokenizer = build_tokenizer(["0123456789;="], "char")
    torch.manual_seed(0)
    lm = build_causal_lm(CONFIGS["llama"], len(tokenizer) + 20, 0)
    with torch.no_grad():
        lm.get_input_embeddings().weight[len(tokenizer) :] = 0.0
    lm.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    model = build(str(tmp_path / "plain"), adaptation, c_base=1.0)
    again = build(str(tmp_path / "plain"), adaptation, c_base=1.0)
    markers = list(model.template.marker_ids.values())
    for table in (model.lm.get_input_embeddings(), model.reference().get_input_embeddings()):
        assert len(table.weight) == len(tokenizer) + 20
        assert torch.pdist(table.weight[markers].detach()).min() > 0.01
    batch = model.template.collate(RECORDS)
    nll = model.free_token_nll(model.reference(), batch)
    assert torch.equal(again.free_token_nll(again.reference(), batch), nll)
    if adaptation == "frozen":  # whose checkpoint leaves the table out
        path = saved(model, tmp_path, epochs=1)
        alone = SharedDiscreteCVAE.load_from_checkpoint(path)
        assert torch.equal(alone.free_token_nll(alone.reference(), batch), nll)
