import sys

import lightning as L
import pytest
import torch
from tiny import QUIET, RECORDS, TinyData, tiny_artifact, tiny_tokenizer

from cvae_lightning import EntangledLM, SharedDiscreteCVAE
from cvae_lightning.backbones.artifact import Baseline, save_artifact
from cvae_lightning.backbones.causal_lm import build_causal_lm
from cvae_lightning.losses import ReconstructionLoss
from cvae_lightning.outputs import Record
from cvae_lightning.template import PromptTemplate
from cvae_lightning.trust import read_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    artifact = tiny_artifact(tmp_path_factory.mktemp("artifact"), "gpt2")
    torch.manual_seed(0)
    return SharedDiscreteCVAE(artifact, {"reconstruction_loss": ReconstructionLoss()}, num_latents=2).eval()


def test_a_gap_moves_only_the_positions_of_y(model):
    t = model.template
    gap = torch.tensor([0, 1, 2, 3, 3])
    with torch.no_grad():
        found = model.free_token_nll(model.reference(), t.collate(RECORDS), gap)
        for i, record in enumerate(RECORDS):
            prefix, y = t.segments([record])[0]
            ids = [*prefix, t.marker_ids["<y>"], *y]
            positions = [j + (int(gap[i]) if j >= len(prefix) else 0) for j in range(len(ids))]
            logits = model.reference()(torch.tensor([ids]), position_ids=torch.tensor([positions])).logits[0]
            log_probs = logits.log_softmax(-1)
            expected = torch.stack([-log_probs[len(prefix) + j, token] for j, token in enumerate(y)])
            torch.testing.assert_close(found[i, : len(y)], expected, atol=1e-5, rtol=1e-5)
    none = model.free_token_nll(model.reference(), t.collate(RECORDS))
    assert not torch.allclose(none[4], found[4])


def test_a_checkpoint_of_a_device_that_is_not_here_is_read_on_the_cpu(model, tmp_path, monkeypatch):
    stored = {"state_dict": model.state_dict()}
    with monkeypatch.context() as saving:
        saving.setattr(torch.serialization, "location_tag", lambda storage: "cuda:1")
        torch.save(stored, tmp_path / "cuda.ckpt")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = read_checkpoint(tmp_path / "cuda.ckpt")["state_dict"]
    assert {value.device.type for value in found.values()} == {"cpu"}
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())


def test_what_is_saved_knows_the_longest_solution_seen(tmp_path):
    artifact = tiny_artifact(tmp_path, "gpt2")
    model = SharedDiscreteCVAE(artifact, {"reconstruction_loss": ReconstructionLoss()}, num_latents=2)
    assert model.max_new_tokens == 256  # none seen yet
    for record in RECORDS:
        model.watch_length(model.template.collate([record]))
    longest = max(len(y) for _, y in model.template.segments(RECORDS))
    assert int(model.state_dict()["longest_y"]) == longest
    again = SharedDiscreteCVAE(artifact, {"reconstruction_loss": ReconstructionLoss()}, num_latents=2)
    again.load_state_dict(model.state_dict())
    assert again.max_new_tokens == model.max_new_tokens == longest + 8


SMALL = {"hidden_size": 16, "num_hidden_layers": 2}
ATTENTION = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
MAMBA = {"num_heads": 4, "head_dim": 8, "state_size": 4, "n_groups": 1, "chunk_size": 4}
READERS = {
    "llama": SMALL | ATTENTION,
    "mistral": SMALL | ATTENTION | {"sliding_window": 5},
    "mamba2": SMALL | MAMBA,
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", READERS)
def test_records_without_z_are_read_as_if_alone(tmp_path, family, side):
    """A short x beside a long one: neither a window nor a recurrent state sees the padding between x and y."""
    template = PromptTemplate(tiny_tokenizer())
    torch.manual_seed(0)
    lm = build_causal_lm({"model_type": family, **READERS[family]}, len(template), template.pad_id)
    with torch.no_grad():
        for p in lm.parameters():
            if p.ndim == 2:
                p.mul_(6)
    save_artifact(tmp_path, lm, template.tokenizer, Baseline(1.5, 10, "-", template.fingerprint()))
    losses = {"reconstruction_loss": ReconstructionLoss()}
    model = SharedDiscreteCVAE(str(tmp_path), losses, num_latents=2, padding_side=side, posterior="amortized").eval()
    records = [Record("1234567", "21=3;4;5;6", 0, 0), Record("7", "7=7;1;2", 0, 1)]
    both, alone = model.template.collate(records), model.template.collate(records[1:])
    with torch.no_grad():
        found, expected = (model.free_token_nll(model.lm, batch)[-1] for batch in (both, alone))
        torch.testing.assert_close(found[: len(expected)], expected, atol=1e-4, rtol=1e-4)
        found, expected = (model.amortized_posterior(batch)[-1] for batch in (both, alone))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_rotary_frequencies_stay_exact_in_bf16(tmp_path):
    model = SharedDiscreteCVAE(tiny_artifact(tmp_path), {"reconstruction_loss": ReconstructionLoss()}, num_latents=2)
    before = {name: b.clone() for name, b in model.named_buffers() if name.endswith("inv_freq")}
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.lm.parameters()} == {torch.bfloat16}
    assert len(before) > 0
    for name, frequencies in before.items():
        torch.testing.assert_close(model.get_buffer(name), frequencies, rtol=0, atol=0)
    outputs = model.eval().compute_outputs(model.template.collate(RECORDS), frozenset())
    assert torch.isfinite(outputs.token_nll).all()


def test_learning_rate_warms_up_and_decays_to_its_floor(tmp_path):
    lm = EntangledLM(str(tmp_path), config={"model_type": "gpt2"}, warmup_steps=10, final_learning_rate_fraction=0.1)
    factors = [lm.learning_rate_factor(step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[factors.index(max(factors))] <= 1.0
    assert factors[50] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)


@pytest.mark.parametrize(("precision", "clip", "fused"), [("bf16-mixed", 1.0, False), ("bf16-mixed", None, True)])
def test_gradients_are_clipped_under_mixed_precision(tmp_path, precision, clip, fused):
    lm = EntangledLM(str(tmp_path / "out"), model=tiny_artifact(tmp_path / "in"))
    trainer = L.Trainer(**QUIET, max_steps=2, precision=precision, gradient_clip_val=clip)
    trainer.fit(lm, TinyData(batch_size=2))
    assert trainer.global_step == 2
    assert [group["fused"] for group in trainer.optimizers[0].param_groups] == [fused] * 2


def test_a_checkpoint_may_not_name_code_that_is_not_imported(tmp_path):
    evil = tmp_path / "evil_module.py"
    evil.write_text("raise SystemExit('this code ran')\n")
    path = tmp_path / "stranger.ckpt"
    losses = {"a": {"class_path": "evil_module.Loss"}}
    torch.save({"hyper_parameters": {"losses": losses}, "state_dict": {}, "pytorch-lightning_version": "2.6.6"}, path)
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(ValueError, match=r"stranger\.ckpt names evil_module\.Loss"):
            SharedDiscreteCVAE.load_from_checkpoint(path)
    finally:
        sys.path.remove(str(tmp_path))


class Bomb:
    def __reduce__(self):
        return (sys.exit, ("this code ran",))


def test_a_malicious_pickle_is_refused(tmp_path):
    path = tmp_path / "bomb.ckpt"
    torch.save({"hyper_parameters": {}, "state_dict": {}, "bomb": Bomb()}, path)
    with pytest.raises(ValueError, match=r"cannot read checkpoint .*bomb\.ckpt: it holds sys\.exit; only tensors"):
        SharedDiscreteCVAE.load_from_checkpoint(path)
