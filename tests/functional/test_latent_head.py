import functools

import oracles
import pytest
import torch
from head_inputs import TINY, inputs, naive, objective
from torch.utils._python_dispatch import TorchDispatchMode

from cvae_lightning.functional import chunked_head, jensen_shannon_divergence, latent_token_stats

HEADS = [{}, {"scale": 0.7}, {"softcap": 2.0}, {"scale": 1.3, "softcap": 3.0}]


@pytest.mark.parametrize("pieces", [{}, TINY], ids=["plain", "chunked"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_equal_the_oracle(pieces, head, with_bias):
    hidden, weight, bias, targets = inputs()
    bias = bias if with_bias else None
    nll, jsd = latent_token_stats(hidden, weight, targets, bias=bias, **head, **pieces)
    expected = oracles.head(
        hidden.tolist(), weight.tolist(), targets.tolist(), bias.tolist() if with_bias else None, **head
    )
    torch.testing.assert_close(nll, torch.tensor(expected[0], dtype=torch.float64))
    torch.testing.assert_close(jsd, torch.tensor(expected[1], dtype=torch.float64))


@pytest.mark.parametrize("pieces", [{}, TINY], ids=["plain", "chunked"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("need_jsd", [False, True])
def test_gradcheck(pieces, head, need_jsd):
    hidden, weight, bias, targets = inputs(batch=1, latents=2, length=3, width=3, vocab=7)

    def statistics(hidden, weight, bias):
        results = latent_token_stats(hidden, weight, targets, need_jsd=need_jsd, bias=bias, **head, **pieces)
        return results if need_jsd else results[0]

    arguments = tuple(t.requires_grad_() for t in (hidden, weight, bias))
    assert torch.autograd.gradcheck(statistics, arguments, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_the_naive_error(dtype):
    exact = [t.requires_grad_() if t.is_floating_point() else t for t in inputs(2, 4, 16, 32, 500)]
    reference = naive(*exact)
    objective(*reference).backward()
    errors = {}
    for name, function in {
        "naive": naive,
        "chunked": lambda h, w, b, y: latent_token_stats(h, w, y, bias=b, budget_bytes=1 << 16, vocab_block=64),
    }.items():
        low = [t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t for t in exact]
        results = function(*low)
        objective(*results).backward()
        pairs = [
            *zip(results, reference, strict=True),
            *((a.grad, b.grad) for a, b in zip(low[:3], exact[:3], strict=True)),
        ]
        errors[name] = [((a - b).norm() / b.norm()).item() for a, b in pairs]
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    for ours, theirs in zip(errors["chunked"], errors["naive"], strict=True):
        assert ours <= 1.2 * theirs + tolerance


def test_compiled_arithmetic_gives_the_same(monkeypatch):
    # Traced and made functional as by the default backend, but not handed to a C++ compiler, which takes long.
    used = []

    @functools.cache
    def traced(function):
        used.append(function.__name__)
        return torch.compile(function, dynamic=True, backend="aot_eager")

    monkeypatch.setattr(chunked_head, "compiled", traced)
    hidden, weight, bias, targets = inputs(2, 3, 5, 6, 50)
    results = []
    for wish in ("0", "1"):
        monkeypatch.setenv("CVAE_LIGHTNING_COMPILE_HEAD", wish)
        leaves = [leaf.clone().requires_grad_() for leaf in (hidden, weight, bias)]
        pieces = {"budget_bytes": 20_000, "vocab_block": 16}
        nll, jsd = latent_token_stats(*leaves[:2], targets, bias=leaves[2], softcap=3.0, **pieces)
        objective(nll, jsd).backward()
        results.append([nll, jsd, *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(results[1], results[0])
    assert sorted(used) == ["_divergence", "_gradient", "_log_sum"]


def test_chunked_equals_plain_for_uneven_pieces():
    hidden, weight, bias, targets = inputs(3, 4, 7, 6, 103)
    plain = latent_token_stats(hidden, weight, targets, bias=bias)
    for pieces in (
        {"budget_bytes": 1},
        {"budget_bytes": 20_000, "vocab_block": 50},
        {"budget_bytes": 1, "vocab_block": 1},
    ):
        torch.testing.assert_close(latent_token_stats(hidden, weight, targets, bias=bias, **pieces), plain)


def test_autocast_multiplies_in_its_dtype():
    hidden, weight, bias, targets = inputs(dtype=torch.float32)
    for pieces in ({}, TINY):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        with torch.autocast("cpu", torch.bfloat16):
            nll, jsd = latent_token_stats(leaves[0], leaves[1], targets, bias=leaves[2], **pieces)
            objective(nll, jsd).backward()
        assert nll.dtype == jsd.dtype == torch.float32
        expected = latent_token_stats(hidden.bfloat16(), weight.bfloat16(), targets, bias=bias)
        torch.testing.assert_close((nll, jsd), expected, atol=1e-5, rtol=1e-5)
        assert all(leaf.grad.dtype == torch.float32 and leaf.grad.any() for leaf in leaves)


class Work(TorchDispatchMode):
    """Records the largest number of elements that any operation returns, and counts matrix products and their size."""

    def __init__(self):
        super().__init__()
        self.largest, self.products, self.multiplied = 0, 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        result = function(*arguments, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        if function._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            self.products += 1
            left, right = arguments[-2:]
            self.multiplied += left.numel() * right.shape[1]
        return result


@pytest.mark.parametrize(("latents", "length", "vocab"), [(2, 8, 512), (8, 8, 512), (2, 32, 512), (2, 8, 4096)])
def test_memory_does_not_grow_with_latents_tokens_or_vocabulary(latents, length, vocab):
    hidden, weight, _, targets = inputs(2, latents, length, 4, vocab, torch.float32)
    budget = 32 << 10
    with Work() as work:
        results = latent_token_stats(hidden.requires_grad_(), weight.requires_grad_(), targets, budget_bytes=budget)
        objective(*results).backward()
    statistics = 2 * latents * targets.numel()
    assert work.largest <= max(hidden.numel(), weight.numel(), statistics, budget // 4)


def test_a_frozen_head_costs_no_weight_product_and_gets_no_gradient():
    hidden, weight, bias, targets = inputs()
    products = []
    for frozen in (False, True):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)]
        results = latent_token_stats(*leaves, targets, bias=bias, **TINY)
        with Work() as work:
            objective(*results).backward()
        products.append(work.products)
        assert leaves[0].grad.any()
        assert (leaves[1].grad is None) == frozen
    assert products[1] * 3 == products[0] * 2  # logits and rows; logits, rows and weight


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("weighed", [(0, 1, 0), (0, 0, 0)])
def test_rows_without_a_gradient_are_left_out_of_the_backward_pass(head, weighed):
    """As a sharp posterior leaves all latents but one of an example, here of the first; the second has all of them."""
    *states, targets = inputs()
    shares = torch.tensor([weighed, (0.5, 0.2, 0.3) if any(weighed) else weighed], dtype=torch.float64)
    found = []
    for pieces in ({}, TINY):
        leaves = [t.clone().requires_grad_() for t in states]
        nll, _ = latent_token_stats(*leaves[:2], targets, need_jsd=False, bias=leaves[2], **head, **pieces)
        with Work() as work:
            (nll.sum(-1) * shares).sum().backward()
        found.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(found[1], found[0])
    assert found[1][0].any() == any(weighed)
    assert not found[1][0][0, 0].any()
    rows = int(((targets >= 0).sum(-1) * shares.count_nonzero(-1)).sum())
    assert work.multiplied == 3 * rows * states[1].numel()  # logits, rows and weight


def test_nothing_is_kept_when_nothing_requires_grad():
    hidden, weight, bias, targets = inputs()
    nll, jsd = latent_token_stats(hidden, weight, targets, bias=bias, **TINY)
    assert nll.grad_fn is None
    assert jsd.grad_fn is None


@pytest.mark.parametrize("pieces", [{}, TINY], ids=["plain", "chunked"])
def test_one_statistic_alone_has_a_gradient(pieces):
    hidden, weight, bias, targets = inputs()
    for position in range(2):
        ours, reference = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        latent_token_stats(ours, weight, targets, bias=bias, **pieces)[position].square().sum().backward()
        naive(reference, weight, bias, targets)[position].square().sum().backward()
        torch.testing.assert_close(ours.grad, reference.grad)


@pytest.mark.parametrize("pieces", [{}, TINY], ids=["plain", "chunked"])
def test_a_batch_without_targets_gives_zeros_and_zero_gradients(pieces):
    hidden, weight, _, targets = inputs()
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    nll, jsd = latent_token_stats(*leaves, torch.full_like(targets, -100), **pieces)
    assert not nll.any()
    assert not jsd.any()
    (nll.sum() + jsd.sum()).backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("pieces", [{}, TINY], ids=["plain", "chunked"])
def test_permuting_latents_permutes_results_and_masked_states_do_not_matter(pieces):
    hidden, weight, bias, targets = inputs()
    nll, jsd = latent_token_stats(hidden, weight, targets, bias=bias, **pieces)
    order = [2, 0, 1]
    other = hidden[:, order].clone()
    other[0, :, 1] = torch.nan  # targets[0, 1] is skipped
    permuted_nll, permuted_jsd = latent_token_stats(other, weight, targets, bias=bias, **pieces)
    torch.testing.assert_close(permuted_nll, nll[:, order])
    torch.testing.assert_close(permuted_jsd, jsd)


@pytest.mark.parametrize("pieces", [{}, TINY], ids=["plain", "chunked"])
def test_extreme_logits_stay_finite(pieces):
    hidden, weight, _, targets = inputs(dtype=torch.float32)
    hidden = (1e4 * hidden).requires_grad_()
    nll, jsd = latent_token_stats(hidden, weight, targets, **pieces)
    (nll.sum() + jsd.sum()).backward()
    assert nll.isfinite().all()
    assert ((jsd >= -1e-6) & (jsd <= torch.tensor(3.0).log() + 1e-6)).all()
    assert hidden.grad.isfinite().all()


def test_jsd_keeps_its_precision_near_collapse():
    hidden, weight, _, targets = inputs(1, 4, 32, 16, 400)
    hidden = hidden[:, :1] + 1e-3 * hidden
    exact = jensen_shannon_divergence((hidden @ weight.t()).log_softmax(-1).transpose(1, 2))[0, targets[0] >= 0]
    for budget in (1, 1 << 30):
        jsd = latent_token_stats(hidden.float(), weight.float(), targets, budget_bytes=budget)[1][0, targets[0] >= 0]
        assert ((jsd - exact).abs().mean() / exact.mean()).item() < 0.05


def test_shapes_that_do_not_fit_are_refused():
    hidden, weight, _, targets = inputs()
    with pytest.raises(ValueError, match=r"targets must have shape \(2, 4\)"):
        latent_token_stats(hidden, weight, targets[:, :-1])
    with pytest.raises(ValueError, match=r"lm_head_weight must have shape \[V, 5\]"):
        latent_token_stats(hidden, weight.t(), targets)


@pytest.mark.parametrize("pieces", [{}, TINY], ids=["plain", "chunked"])
@pytest.mark.parametrize("need_jsd", [False, True])
def test_words_that_the_bias_forbids(pieces, need_jsd):
    """A whole block of the vocabulary may have logits of -inf."""
    hidden, weight, bias, targets = inputs()
    targets = torch.where(targets >= 0, targets % 3 + 8, targets)
    bias[:8] = -torch.inf
    results = []
    for first in (0, 8):
        leaf = hidden.clone().requires_grad_()
        shifted = torch.where(targets >= 0, targets - first, targets)
        rows = {
            "bias": bias[first:].clone().requires_grad_(),
            "lm_head_weight": weight[first:].clone().requires_grad_(),
        }
        nll, jsd = latent_token_stats(leaf, targets=shifted, need_jsd=need_jsd, **rows, **pieces)
        jsd = torch.zeros(()) if jsd is None else 100 * jsd  # a large slope, which -inf must not meet
        (nll.sin().sum() + jsd.sum()).backward()
        results.append((nll, jsd, leaf.grad, *(row.grad[-(len(bias) - 8) :] for row in rows.values())))
    torch.testing.assert_close(*results)
