"""What the head does on a GPU, as far as it can be seen without one."""

import importlib.util
import os
import sys
import types

import pytest
import torch
from head_inputs import TINY, inputs, naive, objective

from cvae_lightning.functional import latent_head, latent_token_stats, liger_head


@pytest.mark.parametrize("pieces", [{}, TINY], ids=["plain", "chunked"])
@pytest.mark.parametrize("need_jsd", [False, True])
def test_no_value_is_asked_of_the_device(pieces, need_jsd):
    """Tensors of the meta device have none to give."""
    hidden, weight, bias, targets = (t.to("meta") for t in inputs())
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]
    nll, jsd = latent_token_stats(*leaves[:2], targets, bias=leaves[2], need_jsd=need_jsd, **pieces)
    (nll.sum() if jsd is None else objective(nll, jsd)).backward()
    assert nll.shape == (2, 3, 4)
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves)


@pytest.mark.parametrize("pieces", [{}, TINY], ids=["plain", "chunked"])
def test_positions_without_a_target_change_nothing(pieces, monkeypatch):
    every, (hidden, weight, bias, targets) = latent_head._positions, inputs()
    hidden[0, :, 1] = 1e4  # no target there
    results = []
    for only_scored in (True, False):
        monkeypatch.setattr(latent_head, "_positions", lambda scored, only=only_scored, **_: every(scored, only))
        leaves = [leaf.clone().requires_grad_() for leaf in (hidden, weight, bias)]
        nll, jsd = latent_token_stats(*leaves[:2], targets, bias=leaves[2], **pieces)
        objective(nll, jsd).backward()
        results.append([nll, jsd, *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(results[1], results[0])


class StandIn:
    """Takes the arguments of Liger's function and does what its documentation says, by ordinary autograd."""

    @staticmethod
    def apply(rows, weight, targets, bias, ce_weight, ignored, square, smoothing, reduction, softcap, z, accumulated):
        assert (ce_weight, ignored, square, smoothing, reduction, z) == (None, -100, 0.0, 0.0, "none", False)
        assert accumulated == torch.float32
        logits = torch.nn.functional.linear(rows, weight, bias)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none"), None, None, None


@pytest.fixture
def stand_in(monkeypatch):
    module = types.ModuleType("liger_kernel.ops")
    module.LigerFusedLinearCrossEntropyFunction = StandIn
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", module)
    monkeypatch.setattr(latent_head, "liger_wanted", lambda device: True)


CASES = [
    (dtype, head, with_bias)
    for dtype in (torch.float32, torch.bfloat16)
    for head in ({}, {"scale": 1.3}, {"softcap": 3.0})
    for with_bias in (False, True)
]


@pytest.mark.parametrize(("dtype", "head", "with_bias"), CASES)
def test_nll_by_liger_is_the_same(stand_in, dtype, head, with_bias):
    check_nll(dtype, head, with_bias)


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("liger_kernel") is None,
    reason="needs liger-kernel and triton, and TRITON_INTERPRET=1",
)
def test_nll_by_liger_itself_is_the_same(monkeypatch):
    monkeypatch.setattr(latent_head, "liger_wanted", lambda device: True)
    for dtype, head, with_bias in CASES:
        if "softcap" not in head:  # triton's interpreter cannot run that part of the kernel
            check_nll(dtype, head, with_bias)


def check_nll(dtype, head, with_bias):
    results = []
    for function in (latent_token_stats, with_logits):
        hidden, weight, bias, targets = inputs(dtype=dtype)
        leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]
        nll, jsd = function(hidden, weight, targets, need_jsd=False, bias=bias if with_bias else None, **head)
        objective(nll, torch.zeros_like(nll[:, 0])).backward()
        assert jsd is None
        assert nll.dtype == torch.float32
        results.append([nll, *(leaf.grad for leaf in leaves[: 2 + with_bias])])
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(*results, **tolerance)


def with_logits(hidden, weight, targets, need_jsd, bias, **head):
    return naive(hidden.float(), weight.float(), None if bias is None else bias.float(), targets, **head)[0], None


def test_liger_computes_no_divergence(stand_in, monkeypatch):
    monkeypatch.setattr(latent_head, "liger_head", lambda *_: pytest.fail("the divergence needs all logits"))
    hidden, weight, bias, targets = inputs()
    expected = naive(hidden, weight, bias, targets)
    torch.testing.assert_close(latent_token_stats(hidden, weight, targets, bias=bias), expected)


def test_who_gets_liger(monkeypatch):
    liger_head._check_version.cache_clear()
    wanted, gpu, cpu = liger_head.liger_wanted, torch.device("cuda"), torch.device("cpu")
    assert not wanted(gpu)
    monkeypatch.setenv("CVAE_LIGHTNING_LIGER", "1")
    assert not wanted(cpu)
    for found, has in (("0.8.4", "which is 0.8.4"), (None, "which is not installed")):
        monkeypatch.setattr(liger_head, "version", installed(found))
        with pytest.raises(ImportError, match=rf"CVAE_LIGHTNING_LIGER=1 needs liger-kernel >= 0.8.5, {has}: pip"):
            wanted(gpu)
    monkeypatch.setattr(liger_head, "version", installed("0.10.0"))
    assert wanted(gpu)


def installed(found):
    def version(name):
        assert name == "liger-kernel"
        if found is None:
            raise liger_head.PackageNotFoundError(name)
        return found

    return version
