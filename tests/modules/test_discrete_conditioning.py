"""Several tokens per latent and z-conditioned norms, against one unpadded sequence at a time through the full model."""

import warnings
from contextlib import nullcontext

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import CONFIGS, QUIET, RECORDS, TinyData, all_losses, tiny_artifact
from user_folder import enter_user_folder

from cvae_lightning import cli
from cvae_lightning.losses import FreeEnergyLoss, PosteriorDistillationLoss
from cvae_lightning.modules import EntangledLM, SharedDiscreteCVAE
from cvae_lightning.outputs import Record

FAMILIES = sorted(CONFIGS)
XS = [record.x for record in RECORDS]
K = 3
ARGS = "--model.init_args"


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    return {family: tiny_artifact(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture
def artifact(artifacts):
    return artifacts["llama"]


def build(artifact, losses=None, moved=True, **options):
    """A module whose norm maps, if it has any, are not the identity any more where ``moved``."""
    torch.manual_seed(3)
    losses = losses or {"free_energy_loss": FreeEnergyLoss(), "distillation": PosteriorDistillationLoss()}
    model = SharedDiscreteCVAE(artifact, losses, num_latents=K, **options)
    if moved and model.norms is not None:
        move(model)
    return model


def move(model):
    torch.manual_seed(4)
    with torch.no_grad():
        for linear in model.norms.maps:
            linear.weight.normal_(std=0.2)
            linear.bias.normal_(std=0.1)


def outputs(model, *fields):
    return model.compute_outputs(model.template.collate(RECORDS), frozenset(fields))


def full_logits(model, x, k, y):
    """Logits of the unpadded generator prompt, read in one piece, and the place of its ``<z>``."""
    t, m = model.template, model.template.marker_ids
    before = t.segments([Record(x, "")])[0][0]
    ids = [*before, m["<z>"], *t.latent_prefixes[k], m["</z>"], m["<y>"], *y]
    norms = nullcontext()
    if model.norms is not None:
        norms = model.norms.given(model.latent_vectors.weight[k : k + 1], len(before) + 1)
    with torch.no_grad(), norms:
        return model.lm(torch.tensor([ids]), use_cache=False).logits[0], len(before)


@pytest.mark.parametrize(("method", "side", "norm_dim"), [
    ("cache", "left", 0),
    ("repeat", "right", 0),
    ("grouped", "left", 0),
    ("cache", "right", 4),
    ("repeat", "left", 4),
    ("auto", "right", 4),
])  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, 3])
def test_branches_equal_one_sequence_at_a_time(artifacts, family, length, method, side, norm_dim):
    model = build(
        artifacts[family], prefix_length=length, branch_method=method, padding_side=side, norm_dim=norm_dim
    ).eval()
    found = outputs(model)
    routing = torch.tensor(model.template.latent_ids)
    for i, record in enumerate(RECORDS):
        y = model.template.segments([record])[0][1]
        for k in range(K):
            logits, z = full_logits(model, record.x, k, y)
            torch.testing.assert_close(
                found.router_log_probs[i], logits[z][routing].log_softmax(-1), atol=2e-5, rtol=1e-4
            )
            predictions = logits[z + length + 2 : -1].log_softmax(-1)
            expected = -predictions[range(len(y)), y]
            torch.testing.assert_close(found.token_nll[i, k, : len(y)], expected, atol=5e-5, rtol=1e-4)
            assert not found.token_nll[i, k, len(y) :].any()


@pytest.mark.parametrize("norm_dim", [0, 4])
def test_methods_and_chunks_give_the_same_gradients(artifact, norm_dim):
    """Chunks read the norms again in the backward pass, when no latent is given from outside."""
    others = [("cache", None), ("cache", 2), ("repeat", 1)] + ([] if norm_dim else [("grouped", 2)])
    grads = {}
    for way in [("repeat", None), *others]:
        model = build(artifact, prefix_length=3, norm_dim=norm_dim, branch_method=way[0], num_latent_chunk=way[1])
        o = outputs(model, "inter_latent_jsd")
        weights = torch.linspace(0.5, 2, K)[:, None]
        ((o.token_nll * weights).sum() + o.router_log_probs[:, 0].sum() + o.inter_latent_jsd.sum()).backward()
        grads[way] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    reference = grads.pop(("repeat", None))
    assert reference["lm.model.embed_tokens.weight"][model.template.all_latent_ids].abs().sum(-1).min() > 0
    assert not norm_dim or reference["latent_vectors.weight"].abs().sum(-1).min() > 0
    for found in grads.values():
        assert found.keys() == reference.keys()
        for name, value in reference.items():
            torch.testing.assert_close(found[name], value, atol=1e-4 * float(value.abs().max() + 1), rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_start_as_the_identity(artifacts, family):
    plain = build(artifacts[family], prefix_length=2).eval()
    same = build(artifacts[family], prefix_length=2, norm_dim=4, moved=False).eval()
    a, b = outputs(plain, "inter_latent_jsd"), outputs(same, "inter_latent_jsd")
    for name in ("router_log_probs", "token_nll", "inter_latent_jsd", "amortized_log_probs"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert plain.generate_all(XS, max_new_tokens=6) == same.generate_all(XS, max_new_tokens=6)
    assert not [name for name, _ in plain.named_parameters() if "norms." in name or "latent_vectors" in name]


def test_norms_learn_from_the_identity(artifact):
    model = build(artifact, norm_dim=4, moved=False, warmup_steps=1, learning_rate=1e-2)
    vectors = model.latent_vectors.weight.detach().clone()
    L.Trainer(**QUIET, max_steps=3).fit(model, TinyData())
    assert all(linear.weight.abs().max() > 0 for linear in model.norms.maps)
    assert (model.latent_vectors.weight - vectors).abs().amax(-1).min() > 0


def test_norms_change_every_latent_and_never_the_router(artifact):
    """The router's prompt ends before the latent slot, so neither its value nor its gradient knows the norms."""
    for method in ("cache", "repeat"):
        plain = outputs(build(artifact, norm_dim=4, moved=False, branch_method=method))
        model = build(artifact, norm_dim=4, branch_method=method)
        moved = outputs(model)
        assert torch.equal(moved.router_log_probs, plain.router_log_probs)
        assert torch.equal(moved.amortized_log_probs, plain.amortized_log_probs)
        assert (moved.token_nll - plain.token_nll).abs().amax((0, 2)).min() > 1e-2
        moved.router_log_probs[:, 0].sum().backward()
        seen = [p.grad for p in (*model.norms.parameters(), model.latent_vectors.weight)]
        assert not any(grad is not None and grad.any() for grad in seen)
        assert model.lm.get_input_embeddings().weight.grad.any()
        torch.testing.assert_close(model.route(XS), moved.router_log_probs.detach(), atol=1e-5, rtol=1e-5)


def test_the_baseline_is_that_of_the_model_without_norms(artifact):
    options = {"baseline": "dynamic", "prefix_length": 2}
    plain, moved = (outputs(build(artifact, norm_dim=d, **options), "baseline_nll") for d in (0, 4))
    assert torch.equal(moved.baseline_nll, plain.baseline_nll)


@pytest.mark.parametrize("norm_dim", [0, 4])
def test_permuting_latents_permutes_outputs(artifact, norm_dim):
    model = build(artifact, prefix_length=3, norm_dim=norm_dim).eval()
    before, order = outputs(model, "inter_latent_jsd"), [2, 0, 1]
    texts = model.generate_all(XS, max_new_tokens=5)
    model.template.latent_prefixes = [model.template.latent_prefixes[k] for k in order]
    if norm_dim:
        model.latent_vectors.weight.data = model.latent_vectors.weight.data[order]
    after = outputs(model, "inter_latent_jsd")
    torch.testing.assert_close(after.token_nll, before.token_nll[:, order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after.router_log_probs, before.router_log_probs[:, order], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(after.inter_latent_jsd, before.inter_latent_jsd, atol=1e-6, rtol=1e-5)
    assert model.generate_all(XS, max_new_tokens=5) == [[row[k] for k in order] for row in texts]


def test_every_token_of_a_latent_counts(artifact):
    model = build(artifact, prefix_length=3).eval()
    before = outputs(model)
    for part in range(3):
        rows = [row[part] for row in model.template.latent_prefixes]
        kept = model.lm.get_input_embeddings().weight.data[rows].clone()
        model.lm.get_input_embeddings().weight.data[rows] = kept * 2
        after = outputs(model)
        assert (after.token_nll - before.token_nll).abs().amax((0, 2)).min() > 1e-3
        assert torch.equal(after.router_log_probs, before.router_log_probs) == (part > 0)
        model.lm.get_input_embeddings().weight.data[rows] = kept


@pytest.mark.parametrize("norm_dim", [0, 4])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, 3])
def test_generation_is_the_argmax_of_the_full_model(artifacts, family, length, norm_dim):
    """Mixed latents in one cached batch, and all latents behind one shared prompt, against full passes."""
    model = build(artifacts[family], prefix_length=length, norm_dim=norm_dim)
    t, m = model.template, model.template.marker_ids
    with torch.no_grad():  # latents that differ, and rows that end at different steps
        model.lm.get_input_embeddings().weight[t.all_latent_ids] *= 4
        model.lm.get_output_embeddings().weight[t.end_id] *= 1.2
    t.decode = lambda ids: [row[: [*row, t.end_id].index(t.end_id)] for row in ids.tolist()]  # not every id is text
    banned = [m[token] for token in m if token != "</y>"] + t.all_latent_ids
    expected = {}
    for x in XS:
        for k in range(K):
            y = []
            while len(y) < 6 and t.end_id not in y:
                logits = full_logits(model.eval(), x, k, y)[0][-1]
                logits[banned] = float("-inf")
                y.append(int(logits.argmax()))
            expected[x, k] = t.decode(torch.tensor([y]))[0]
    assert len({str(y) for y in expected.values()}) >= 3
    model.train()
    for latents in ([0, 1, 2, 0, 1], [2, 2, 0, 1, 0]):
        found = model.generate(XS, latents, max_new_tokens=6, batch_size=3)
        assert found == [expected[pair] for pair in zip(XS, latents, strict=True)]
    rows = model.generate_all(XS, max_new_tokens=6, batch_size=6)
    assert rows == [[expected[x, k] for k in range(K)] for x in XS]
    assert model.generate_all([]) == []
    assert model.training


def test_auto_never_takes_grouped_branches_for_norms(artifact):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        auto, cached = (outputs(build(artifact, norm_dim=4, branch_method=m)) for m in ("auto", "cache"))
    assert torch.equal(auto.token_nll, cached.token_nll)
    with pytest.raises(ValueError, match=r"branch_method=grouped .*use auto, cache or repeat"):
        build(artifact, norm_dim=4, branch_method="grouped")


def test_norms_refuse_gradient_checkpointing(artifact):
    model = build(artifact, norm_dim=4)
    model.lm.activation_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match="do not work under gradient checkpointing"):
        outputs(model.train())
    with torch.no_grad():
        assert outputs(model.eval()).token_nll.isfinite().all()


def test_bf16_autocast_is_near_full_precision(artifact):
    model = build(artifact, prefix_length=2, norm_dim=4, branch_method="auto").train()
    exact = outputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        rough = outputs(model)
        rough.token_nll.sum().backward()
    torch.testing.assert_close(rough.token_nll, exact.token_nll, atol=0.6, rtol=0.1)
    assert all(p.grad.isfinite().all() for p in model.norms.parameters())
    assert model.latent_vectors.weight.grad.any()
    with torch.autocast("cpu", torch.bfloat16):
        assert len(model.generate_all(XS, max_new_tokens=4)) == len(XS)


def test_checkpoint_holds_every_token_and_norm(artifact, tmp_path):
    model = build(artifact, all_losses(), prefix_length=2, norm_dim=4)
    trainer = L.Trainer(**QUIET, max_steps=2)
    trainer.fit(model, TinyData())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = SharedDiscreteCVAE.load_from_checkpoint(tmp_path / "model.ckpt").eval()
    assert again.template.latent_prefixes == model.template.latent_prefixes
    assert torch.equal(outputs(again).token_nll, outputs(model.eval()).token_nll)
    assert torch.equal(again.route(XS), model.route(XS))
    assert again.generate_all(XS, max_new_tokens=5) == model.generate_all(XS, max_new_tokens=5)


def test_resumed_training_is_the_uninterrupted_one(artifact, tmp_path):
    def train(**resumption):
        every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
        model = build(artifact, all_losses(), moved=False, prefix_length=2, norm_dim=4, warmup_steps=1)
        options = {**QUIET, "enable_checkpointing": True, "default_root_dir": tmp_path}
        trainer = L.Trainer(**options, max_steps=4, callbacks=[every])
        trainer.fit(model, TinyData(), **resumption)
        return model.state_dict()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
        whole, resumed = train(), train(ckpt_path=str(tmp_path / "step=2.ckpt"))
    assert whole["norms.maps.0.weight"].any()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_several_tokens_survive_as_a_plain_hugging_face_folder(artifact, tmp_path):
    """Another program needs no more than the folder: names of tokens in, logits out."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = build(artifact, prefix_length=3).eval()
    model.lm.save_pretrained(tmp_path)
    model.template.tokenizer.save_pretrained(tmp_path)
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    prompt = "<bos><x>12</x><z><z_1><z_1.1><z_1.2></z><y>21=3</y>"
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    log_probs = lm(ids).logits[0, :-1].log_softmax(-1)
    nll = -log_probs[range(len(log_probs)), ids[0, 1:]][-5:]
    torch.testing.assert_close(outputs(model).token_nll[0, 1, :5], nll, atol=1e-5, rtol=1e-5)


def test_records_count_the_whole_section(artifact):
    record = Record("1" * 20, "2" * 35)  # 64 positions hold 20 + 3 and 4 and 35 + 2 tokens
    data = TinyData([record])
    for length in (1, 2):
        model = build(artifact, prefix_length=length)
        if length == 1:
            model.check_positions(model.template.collate([record]))
            continue
        with pytest.raises(ValueError, match="takes 65 tokens, more than the model's 64 positions"):
            L.Trainer(**QUIET, max_steps=1).fit(model, data)


def test_a_gap_of_the_section_puts_y_where_the_latents_do(artifact, tmp_path):
    """What the docstrings promise: y begins m + 2 positions later than in the entangled model's record."""
    model = build(artifact, prefix_length=4)
    entangled = EntangledLM(str(tmp_path / "out"), model=artifact)
    positions = {}

    def watch(name):
        def hook(module, args, kwargs):
            positions.setdefault(name, kwargs["position_ids"][0, -1].item())

        return hook

    batch = model.template.collate(RECORDS[:1])
    model.lm.get_decoder().register_forward_pre_hook(watch("latent"), with_kwargs=True)
    entangled.lm.get_decoder().register_forward_pre_hook(watch("free"), with_kwargs=True)
    model.branch_method = "repeat"
    model.encode(batch)
    entangled.free_token_nll(entangled.lm, batch, torch.tensor([4 + 2]))
    assert positions["latent"] == positions["free"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix_length": 0}, "prefix_length must be at least 1, got 0"),
        ({"norm_dim": -1}, "norm_dim must be at least 0 .* got -1"),
        ({"prefix_length": 5, "max_length": 13}, "max_length must be at least 14 tokens .* got 13"),
    ],
)
def test_bad_optionsare_named(artifact, options, message):
    with pytest.raises(ValueError, match=message):
        build(artifact, **options)


@pytest.mark.filterwarnings("ignore:.*fingerprint.*", "ignore:.*are in train_path too.*")
def test_the_command_line_trains_both(tmp_path, monkeypatch, capsys):
    enter_user_folder(tmp_path, monkeypatch)
    words = ["fit", "--config", "run.yaml", f"{ARGS}.prefix_length", "2", f"{ARGS}.norm_dim", "3"]
    assert cli.main([*words, "--print_config"]) == 0
    chosen = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert (chosen["prefix_length"], chosen["norm_dim"]) == (2, 3)
    assert cli.main([*words, "--trainer.max_steps", "2"]) == 0
    model = SharedDiscreteCVAE.load_from_checkpoint(sorted(tmp_path.glob("out/**/last.ckpt"))[0])
    assert [len(row) for row in model.template.latent_prefixes] == [2, 2]
    assert model.latent_vectors.weight.shape == (2, 3)
