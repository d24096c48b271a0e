"""Real runs of two processes, by Lightning's launcher and by torchrun, that are sent SIGTERM and started again.

The two machines of a launch are two agents of torchrun on this one.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import yaml
from forked_commands import end_state, same
from interruptions.killing import prepare

FSDP = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False},
}
LAUNCHES = {  # strategy and number of machines
    "trainer, DDP": ("ddp", 1),
    "trainer, FSDP2": (FSDP, 1),
    "torchrun, DDP": ("ddp", 1),
    "torchrun, FSDP2": (FSDP, 1),
    "torchrun on two machines, DDP": ("ddp", 2),
}
STEPS = 60


def terminate_launches(here):
    """Yield a line for each kind of launch: SIGTERM to the whole group, then the same command, compared to one go."""
    here.mkdir(exist_ok=True)
    here = prepare(here)
    config = yaml.safe_load((here / "discrete.yaml").read_text())
    config["trainer"] |= {"max_steps": STEPS, "devices": 2, "accumulate_grad_batches": 1, "callbacks": []}
    for number, (name, (strategy, machines)) in enumerate(LAUNCHES.items()):
        config["trainer"] |= {"strategy": strategy, "num_nodes": machines, "devices": 2 // machines}
        (here / f"launch{number}.yaml").write_text(yaml.safe_dump(config))
        whole, ended = here / f"{number}-whole", here / f"{number}-ended"
        code, _ = _run(whole, name, number)
        assert code == 0, (whole / "log.txt").read_text()
        code, seconds = _run(ended, name, number, end_after=ended / "checkpoints/last.ckpt")
        log = (ended / "log.txt").read_text()
        assert "terminated: saved" in log, log
        step = end_state(ended / "checkpoints/last.ckpt")["global_step"]
        assert 0 < step < STEPS, step
        again, _ = _run(ended, name, number)
        assert again == 0, (ended / "log.txt").read_text()
        equal = same(*(end_state(folder / "checkpoints/last.ckpt") for folder in (whole, ended)))
        assert equal, name
        yield f"{name}: SIGTERM to the group saved step {step} in {seconds:.1f} s, exit code {code}; resumed: same bits"


def _run(folder, name, number, end_after=None):
    """Run the command, or end it once a file is there, and return (exit code, seconds from the signal to the end)."""
    folder.mkdir(exist_ok=True)
    words = ["-m", "cvae_lightning.cli", "fit", "--config", f"../launch{number}.yaml", "--ckpt_path", "last"]
    _, machines = LAUNCHES[name]
    if name.startswith("torchrun"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        meeting = ["--nnodes", str(machines), "--nproc-per-node", str(2 // machines), "--local-addr", "127.0.0.1"]
        meeting += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
        words = ["-m", "torch.distributed.run", *meeting, *words]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with (folder / "log.txt").open("ab") as log:
        options = {"cwd": folder, "env": environment, "stdout": log, "stderr": log, "start_new_session": True}
        runs = [subprocess.Popen([sys.executable, *words], **options) for _ in range(machines)]
    while end_after is not None and not end_after.exists() and all(run.poll() is None for run in runs):
        time.sleep(0.05)
    begun = time.monotonic()
    for run in runs if end_after is not None else ():
        os.killpg(run.pid, signal.SIGTERM)
    return max((run.wait(600) for run in runs), key=abs), time.monotonic() - begun
