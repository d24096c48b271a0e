"""Stands in for ``cvae-lightning`` in the tests of the runner: the files of a training in a fraction of a second.

What it does is told by files in the working folder: ``fail`` (a command and part of a cell's name) and ``seconds``.
"""

import json
import pathlib
import sys
import time


def note(text):
    with open("calls.txt", "a") as calls:
        calls.write(text + "\n")


def told(name, otherwise):
    path = pathlib.Path(name)
    return path.read_text() if path.exists() else otherwise


def main():
    command, cell = sys.argv[1], pathlib.Path(sys.argv[3]).parent
    name = "/".join(cell.parts[1:])
    resumed = command == "fit" and "--ckpt_path" in sys.argv
    note(f"{command} {name}" + (" resumed" if resumed else ""))
    if told("fail", "never") in f"{command} {name}":
        sys.exit(f"some output\ncvae-lightning: error: {name} was told to fail")
    if command == "fit":
        (cell / "checkpoints").mkdir(exist_ok=True)
        (cell / "step").write_text("5\n")
        (cell / "checkpoints/last.ckpt").write_text("weights")
    time.sleep(float(told("seconds", "0.05")))
    if command == "test":
        metrics = {
            "num_latents": 4,
            "alignment_one_to_one": 0.9,
            "alignment_ceiling": 0.9,
            "final_answer_accuracy": 1.0,
        }
        (cell / "summary.json").write_text(json.dumps(metrics))
        note(f"finished {name}")


if __name__ == "__main__":
    main()
