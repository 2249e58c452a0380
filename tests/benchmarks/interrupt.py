"""Kills a training at random moments (kill -9) and takes it up again.

    python tests/benchmarks/interrupt.py --kills 50     # Linux and macOS

Each time a small job begins in an empty folder and is killed at a random moment of its
run, also while it saves; whatever checkpoint it left must be whole; started again it
must end with the very bytes of a run that nobody disturbed.
"""

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import mosaic
from data_sample.reading import read_requests
from fuzz import small_model
from mosaic import ControlTokens, TrainConfig
from train_demo import EMBEDDED, REQUESTS


def job(folder: Path) -> None:
    """A whole small run; the table is written at its end."""
    sys.stderr = sys.stdout = open(os.devnull, "w")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    model, names = small_model(tokenizer), ["alcohol", "betting"]
    requests = read_requests(str(REQUESTS))[::9]
    requests = [q for q in requests if q.category in (*names, mosaic.NEUTRAL)]
    tokens = ControlTokens.for_model(model, tokenizer, names, 4, requests)
    config = TrainConfig(epochs=6, positives_per_subset=20, answer_tokens=8)
    checkpoint = str(folder / "training.pt")
    mosaic.train(model, tokenizer, tokens, requests, config, checkpoint=checkpoint)
    tokens.save(str(folder / "tokens.safetensors"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    torch.set_num_threads(1)  # so that a forked process can compute
    fork, rng = multiprocessing.get_context("fork"), random.Random(flags.seed)

    def run(folder, seconds=None):
        """Seconds that it took; killed after `seconds` if given."""
        folder.mkdir(exist_ok=True)
        began, process = time.perf_counter(), fork.Process(target=job, args=(folder,))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        return time.perf_counter() - began

    with tempfile.TemporaryDirectory() as room:
        whole = Path(room) / "whole"
        lasts = run(whole)
        expected = (whole / "tokens.safetensors").read_bytes()
        same = epochs = 0
        for i in range(flags.kills):
            folder = Path(room) / str(i)
            run(folder, rng.uniform(0, lasts))
            if (folder / "training.pt").exists():
                state = torch.load(folder / "training.pt", weights_only=True)
                epochs += len(state["history"])
            run(folder)
            same += (folder / "tokens.safetensors").read_bytes() == expected
    print(f"{same} of {flags.kills} bit-identical; {epochs} epochs were taken up")
    raise SystemExit(same < flags.kills)


if __name__ == "__main__":
    main()
