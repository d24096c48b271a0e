"""The small form of a cell: every part of the real run, at a size that takes seconds."""

from __future__ import annotations

from typing import Any

from cvae_lightning.benchmark.compose import class_name, set_option

STEPS = 8
ENTANGLED_STEPS = 30
DATA = {"train_size": 2000, "val_size": 24, "test_size": 48, "batch_size": 16, "eval_batch_size": 48}
SEEDING = {"num_inputs": 8, "num_solutions": 8, "posterior_steps": 4, "even_steps": 4, "hold_steps": 4}
EVALUATION = {"num_examples": 4, "max_new_tokens": 24}


def shrink(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config with few steps, small splits and short generations.

    The model keeps its size, so that what does not fit it shows here too.
    """
    entangled = class_name(config.get("model") or {}) == "EntangledLM"
    steps = ENTANGLED_STEPS if entangled else STEPS
    options = {
        "trainer.max_steps": steps,
        "trainer.val_check_interval": steps // 2,
        "trainer.check_val_every_n_epoch": None,
        "trainer.log_every_n_steps": 2,
        "checkpoint.every_n_train_steps": steps // 2,
        "model.warmup_steps": 2,
    }
    if class_name(config.get("data") or {}) == "SyntheticDataModule":
        options |= {f"data.{name}": size for name, size in DATA.items()}
    if ((config.get("model") or {}).get("init_args") or {}).get("seeding"):
        options |= {f"model.seeding.init_args.{name}": number for name, number in SEEDING.items()}
    for name, value in options.items():
        set_option(config, name, value)
    for callback in (config.get("trainer") or {}).get("callbacks") or []:
        if isinstance(callback, dict) and class_name(callback).endswith("Evaluation"):
            callback["init_args"] = (callback.get("init_args") or {}) | EVALUATION
    return config
