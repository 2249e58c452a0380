"""Kills a training at random moments (kill -9) and takes it up again.

    python tests/benchmarks/interrupt.py --kills 50

Each time a small job begins in an empty folder and is killed at a random moment of its
run, also while it saves; whatever checkpoint it left must be whole; started again it
must end with the very bytes of a run that nobody disturbed.
"""

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

import mosaic
from fuzz import small_model
from mosaic import ControlTokens, TrainConfig
from train_demo import EMBEDDED, read_requests


def job(folder: Path) -> None:
    """A whole small run; the table is written at its end."""
    sys.stderr = sys.stdout = open(os.devnull, "w")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    model = small_model(tokenizer)
    requests = read_requests(str(ROOT / "data_sample/requests.jsonl"))[::9]
    tokens = ControlTokens.for_model(model, tokenizer, ["alcohol", "betting"])
    learn = [q for q in requests if q.category in ("alcohol", "betting", "neutral")]
    settings = TrainConfig(epochs=6, positives_per_subset=20, answer_tokens=8)
    mosaic.train(
        model, tokenizer, tokens, learn, settings, checkpoint=folder / "training.pt"
    )
    tokens.save(folder / "tokens.safetensors")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    torch.set_num_threads(1)  # so that a forked process can compute
    fork, draw = multiprocessing.get_context("fork"), random.Random(flags.seed)

    def run(folder, seconds=None):
        """Seconds that it took; killed after `seconds` if given."""
        began, process = time.perf_counter(), fork.Process(target=job, args=(folder,))
        process.start()
        process.join(seconds)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        return time.perf_counter() - began

    with tempfile.TemporaryDirectory() as room:
        whole = Path(room) / "whole"
        whole.mkdir()
        lasts = run(whole)
        expected = (whole / "tokens.safetensors").read_bytes()
        same = epochs = 0
        for i in range(flags.kills):
            folder = Path(room) / str(i)
            folder.mkdir()
            run(folder, draw.uniform(0, lasts))
            if (folder / "training.pt").exists():
                state = torch.load(folder / "training.pt", weights_only=True)
                epochs += len(state["history"])
            run(folder)
            same += (folder / "tokens.safetensors").read_bytes() == expected
        print(f"{same} of {flags.kills} bit-identical; {epochs} epochs were taken up")


if __name__ == "__main__":
    main()
