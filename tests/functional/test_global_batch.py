import pytest
import torch
from processes import run_in_processes

from cvae_lightning.functional import (
    aggregate_gaussian,
    categorical_router_marginal_kl,
    gaussian_router_marginal_kl,
    global_batch_mean,
    local_batch,
)

SIZES = (5, 2)  # uneven batches
TARGET = torch.tensor([0.1, 0.2, 0.3, 0.4])


def rows():
    return torch.randn(3, sum(SIZES), 4, generator=torch.Generator().manual_seed(0))


def shard(values, rank):
    start = sum(SIZES[:rank])
    return values[:, start : start + SIZES[rank]]


def objective(mean, logvar, logits):
    """Several statistics of one batch, with a nonlinear function of each."""
    centre, variance = aggregate_gaussian(mean, logvar)
    return (
        gaussian_router_marginal_kl(mean, logvar)
        + categorical_router_marginal_kl(logits.log_softmax(-1), TARGET)
        + (centre * variance).sum().square()
        + global_batch_mean(logits).pow(4).sum()
    )


def value_and_gradient(values):
    values = values.clone().requires_grad_()
    value = objective(*values.unbind())
    value.backward()
    return value.detach(), values.grad


def test_one_process_is_a_plain_mean():
    values = rows()[0]
    torch.testing.assert_close(global_batch_mean(values), values.mean(0))
    assert global_batch_mean(values.bfloat16()).dtype == torch.float32


def test_two_uneven_processes_equal_one(tmp_path):
    value, gradient = value_and_gradient(rows())
    results = run_in_processes(lambda rank: value_and_gradient(shard(rows(), rank)), tmp_path)
    for rank, (rank_value, rank_gradient) in enumerate(results):
        torch.testing.assert_close(rank_value, value, atol=1e-5, rtol=1e-5)
        averaged = rank_gradient / len(SIZES)  # what DDP makes of it: the mean over processes
        torch.testing.assert_close(averaged, shard(gradient, rank), atol=1e-5, rtol=1e-5)


def test_ddp_parameters_get_the_gradient_of_one_process(tmp_path):
    def gradients(rank):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        values = rows() if rank is None else shard(rows(), rank)
        wrapped = model if rank is None else torch.nn.parallel.DistributedDataParallel(model)
        objective(*wrapped(values).unbind()).backward()
        return [parameter.grad for parameter in model.parameters()]

    for result in run_in_processes(gradients, tmp_path):
        for actual, expected in zip(result, gradients(None), strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_local_batch_communicates_nothing(tmp_path):
    def unequal_numbers_of_calls(rank):
        with local_batch():
            return [global_batch_mean(shard(rows(), rank)[0]) for _ in range(rank + 1)][-1]

    results = run_in_processes(unequal_numbers_of_calls, tmp_path)
    for rank, result in enumerate(results):
        torch.testing.assert_close(result, shard(rows(), rank)[0].mean(0))


def test_local_batch_ends_with_its_block(tmp_path):
    def after_an_error(rank):
        with pytest.raises(RuntimeError), local_batch():
            raise RuntimeError
        return global_batch_mean(shard(rows(), rank)[0])

    for result in run_in_processes(after_an_error, tmp_path):
        torch.testing.assert_close(result, rows()[0].mean(0))
