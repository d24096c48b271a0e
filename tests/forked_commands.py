"""Commands of ``cvae-lightning`` in forked processes: each can be killed in earnest, and none pays for its start."""

import multiprocessing
import os
import socket
import sys
import warnings

import torch

from cvae_lightning import cli


def start(folder, words, **environment):
    """Start a command in ``folder``, whose parent holds the user's own code; what it prints goes to ``log.txt``."""
    folder.mkdir(exist_ok=True)
    child = multiprocessing.get_context("fork").Process(target=_child, args=(folder, words, environment))
    child.start()
    return child


def start_ranks(folder, words, size, launcher="torchrun", **environment):
    """Start a command in ``size`` processes, as a launcher would, and return them in the order of their ranks."""
    return [start(folder, words, **own, **environment) for own in environments(size, launcher)]


def environments(size, launcher, nodes=1):
    """Return what ``torchrun`` or ``srun`` tells each of ``size`` processes, here or as if on several machines."""
    each = size // nodes
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for rank in range(size):
        if launcher == "torchrun":
            own = {"TORCHELASTIC_RUN_ID": "none", "RANK": rank, "LOCAL_RANK": rank % each, "GROUP_RANK": rank // each}
            own |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": each}
        else:
            own = {"SLURM_JOB_ID": 4242, "SLURM_JOB_NAME": "fit", "SLURM_NTASKS": size, "SLURM_NTASKS_PER_NODE": each}
            own |= {"SLURM_PROCID": rank, "SLURM_LOCALID": rank % each, "SLURM_NODEID": rank // each}
            own |= {"SLURM_NNODES": nodes}
        yield address | {name: str(value) for name, value in own.items()}


def exit_code(child, seconds):
    """Wait for the end of a command and return its exit code (negative: the signal); late ones are killed."""
    child.join(seconds)
    if child.is_alive():
        child.kill()
        child.join()
    return child.exitcode


def _child(folder, words, environment):
    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)
    sys.path.append(str(folder.parent))
    warnings.resetwarnings()
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)  # not the test's capture
    os._exit(cli.main(words))


def same(a, b):
    """Return whether two nested structures are equal bit for bit (nan is nan)."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a == b or (a != a and b != b)


def end_state(checkpoint):
    """Return all that a run has trained, from its checkpoint file."""
    saved = torch.load(checkpoint, weights_only=True)
    return {key: saved[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")}
