"""The other side of V1: LangVAE trains on sentences by its own pipeline, one step whenever it is told to.

Run by `bench_langvae.py` with the interpreter of an environment of its own (LangVAE 0.6.13, which wants transformers
4.48); a program apart, since LangVAE is under the GPL. Settings are those of its README, but for sizes and paths.
Every line read from stdin asks for a step (`step`), or for one whose memory is measured (`memory`); the answer is one
line with its seconds or megabytes. Everything else that is printed goes to stderr.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

import torch
from langvae import LangVAE
from langvae.data_conversion.tokenization import TokenizedDataSet
from langvae.decoders import SentenceDecoder
from langvae.encoders import SentenceEncoder
from langvae.pipelines import LanguageTrainingPipeline
from langvae.trainers import CyclicalScheduleKLThresholdTrainerConfig
from pythae.models.vae import VAEConfig
from pythae.trainers.training_callbacks import TrainingCallback

M_MMAP_THRESHOLD = -3  # of malloc.h


def status(key: str) -> float:
    """Megabytes of an entry of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) / 1024


class OnDemand(TrainingCallback):
    """Answers for the step that is over, and holds the trainer until the next one is asked for."""

    def __init__(self, answers: IO[str]) -> None:
        self.answers = answers
        self.asked, self.start, self.before = "", 0.0, 0.0

    def on_train_step_end(self, training_config: Any, **kwargs: Any) -> None:
        """Called after every batch."""
        taken = status("VmHWM") - self.before if self.asked == "memory" else time.process_time() - self.start
        if self.asked:
            print(taken, file=self.answers, flush=True)
        self.asked = sys.stdin.readline().strip()
        if not self.asked:
            os._exit(0)
        if self.asked == "memory":
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.before = status("VmRSS")
        self.start = time.process_time()


def main() -> None:
    """Train until nobody asks any more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # progress bars and logs
    given = json.loads(sys.argv[1])
    if given["give_back"]:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 64 << 10)
    torch.set_num_threads(1)
    sentences, length, latent = given["sentences"], given["length"], given["latent"]
    decoder = SentenceDecoder(given["decoder"], latent, length, device="cpu")
    encoder = SentenceEncoder(given["encoder"], latent, decoder.tokenizer, caching=True, device="cpu")
    data = TokenizedDataSet(sentences, decoder.tokenizer, decoder.max_len, caching=True)
    config = CyclicalScheduleKLThresholdTrainerConfig(
        output_dir=given["output"],
        num_epochs=1000,
        learning_rate=1e-3,
        per_device_train_batch_size=given["batch_size"],
        optimizer_cls="AdamW",
        n_cycles=16,
        keep_best_on_train=True,
        no_cuda=True,
    )
    model = LangVAE(VAEConfig(latent_dim=latent), encoder, decoder)
    LanguageTrainingPipeline(training_config=config, model=model)(train_data=data, callbacks=[OnDemand(answers)])


if __name__ == "__main__":
    main()
