"""Runs a function in several gloo processes on this machine."""

import multiprocessing

import torch
import torch.distributed as dist


def run_in_processes(function, folder, world_size=2, timeout=60):
    """Return ``[function(0), function(1), ...]``, each evaluated in its own forked process of one gloo group."""
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_worker, args=(function, folder, r, world_size)) for r in range(world_size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout)
    for worker in workers:
        if worker.is_alive():
            worker.kill()
    assert [worker.exitcode for worker in workers] == [0] * world_size
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]


def _worker(function, folder, rank, world_size):
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        torch.save(function(rank), folder / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()
