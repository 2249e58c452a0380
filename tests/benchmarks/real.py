"""One training of control tokens on any backbone, with its curve.

    python tests/benchmarks/real.py --model FILE.gguf --bf16 --steps 460 --orders 1 \\
        --categories alcohol betting
    python tests/benchmarks/real.py --model FOLDER --minutes 10 --batch_size 64
    python tests/benchmarks/real.py --model FOLDER --tokens FILE.safetensors --test
    python tests/benchmarks/real.py --sweep FILE   # a line of flags each, side by side

Prints along the way the AUC of the refusal's log-probability by order, on training and
validation requests; at the end DSR, OR and near-miss OR on validation, or with --test
on the test split. The loop is that of mosaic.train, but ends by steps or by the clock.
"""

import argparse
import itertools
import json
import math
import os
import platform
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch
import transformers

import mosaic
from measure import refusal_auc
from mosaic import NEUTRAL, ControlTokens, OrderSampler, TrainConfig, generate
from train_demo import JUDGED_TOKENS, load_backbone, read_requests



KNOBS = ("learning_rate", "kd_weight", "first_weight", "later_weight", "batch_size",
         "answer_tokens", "later_turns", "negatives_per_positive", "seed")


def flags() -> argparse.Namespace:
    default = TrainConfig()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="", help="folder, GGUF file or hub name; empty: embedded")
    add("--data", default=str(ROOT / "data_sample" / "requests.jsonl"))
    add("--categories", nargs="+", help="only these; all of the data")
    add("--orders", type=int, nargs="+", help="1 .. min(K, 4)")
    add("--steps", type=int, default=1000)
    add("--minutes", type=float, help="the clock ends it, in place of --steps")
    add("--tokens_per_category", type=int, default=20)
    add("--tokens", default="", help="a saved table: nothing is trained")
    add("--start", choices=("words", "name", "normal"), default="words")
    for name in KNOBS:
        value = getattr(default, name)
        add(f"--{name}", type=type(value), default=value)
    add("--bf16", action="store_true", help="on a CPU; on CUDA it always is")
    add("--measure_every", type=int, default=115, help="steps between two AUCs")
    add("--most", type=int, default=0, help="requests of a kind measured; 0: all")
    add("--no_answers", action="store_true", help="AUC only, no DSR and OR")
    add("--test", action="store_true", help="measure on the test split at the end")
    add("--sweep", help="a file with a line of flags for each run, all at once")
    add("--output", default="runs/real/run.json")
    return parser.parse_args()


def few(requests: list, most: int, seed: int = 0) -> list:
    """At most `most` requests of each kind, drawn with a seed; 0: all."""
    rng, count = random.Random(seed), {}
    chosen = []
    for request in rng.sample(requests, len(requests)):
        kind = request.category, bool(request.near)
        count[kind] = count.get(kind, 0) + 1
        if not most or count[kind] <= most:
            chosen.append(request)
    return chosen


def start(args, model, tokenizer, categories, requests) -> ControlTokens:
    """The saved table, or a fresh one that starts as --start says."""
    if args.tokens:
        args.steps = 0
        return ControlTokens.load(args.tokens, model)
    told = requests if args.start == "words" else ()
    tokens = ControlTokens.for_model(
        model, tokenizer, categories, args.tokens_per_category, told, seed=args.seed)
    if args.start == "normal":
        torch.manual_seed(args.seed)
        for vectors in tokens.vectors:
            vectors.data.normal_(0, mosaic.embedding_std(model, tokenizer))
    return tokens


class Job:
    """A backbone, its requests with its own answers, a table, and what is found."""

    def __init__(self, args: argparse.Namespace):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.args = args
        self.model, self.tokenizer, name = load_backbone(args.model, device)
        if args.bf16:
            self.model = self.model.to(torch.bfloat16)
        self.model.eval().requires_grad_(False)
        self.config = TrainConfig(**{knob: getattr(args, knob) for knob in KNOBS})
        requests = read_requests(args.data)
        every = dict.fromkeys(q.category for q in requests if q.category != NEUTRAL)
        self.categories = args.categories or [*every]
        requests = [q for q in requests if q.category in (*self.categories, NEUTRAL)]
        self.orders = args.orders or [*range(1, min(len(self.categories), 4) + 1)]
        self.tokens = start(args, self.model, self.tokenizer, self.categories, requests)
        began = time.time()
        self.learn = []
        if args.steps:
            self.learn = mosaic.training_references(
                self.model, self.tokenizer, requests, self.config)
        self.held = {split: self.answered(requests, split)
                     for split in ["train", "validation"] + ["test"] * args.test}
        self.held["train"] = few(self.held["train"], args.most or 15)
        self.result = {
            "command": f"python tests/benchmarks/real.py {shlex.join(sys.argv[1:])}",
            "model": name, "hardware": hardware(), "torch": torch.__version__,
            "transformers": transformers.__version__, "settings": vars(args),
            "learned_from": len(self.learn), "curve": [],
            "reference_seconds": round(time.time() - began)}

    def answered(self, requests: list, split: str) -> list[mosaic.Reference]:
        """The requests of a split that the backbone does not decline by itself."""
        asked = few([q for q in requests if q.split == split], self.args.most)
        found = mosaic.reference_answers(self.model, self.tokenizer, asked, 24)
        answered = [q for q in found if not mosaic.is_refusal(q.text)]
        print(f"{split}: {len(answered)} of {len(found)} answered by the backbone")
        return answered

    def auc(self, split: str) -> dict[int, float]:
        what = self.model, self.tokenizer, self.tokens, self.held[split]
        return {r: round(refusal_auc(*what, r), 4) for r in self.orders}

    def note(self, step: int, seconds: float, recent: list) -> None:
        """A point of the curve, into the file at once."""
        aucs = {split: self.auc(split) for split in ("train", "validation")}
        point = {"step": step, "seconds": round(seconds), **means(recent), "auc": aucs}
        self.result["curve"].append(point)
        print(json.dumps(point), flush=True)
        write(self.args.output, self.result)

    def tasks(self):
        """Batches of tasks with their rng, epoch after epoch without an end."""
        for epoch in itertools.count():
            rng = random.Random(f"{self.args.seed}, epoch {epoch}")
            config, every = self.config, self.categories
            sampler = OrderSampler(
                self.learn, every, every, config.positives_per_subset,
                config.negatives_per_positive, rng)
            for tasks in sampler.epoch(self.orders, config.batch_size):
                yield tasks, rng

    def train(self) -> None:
        """The loop of mosaic.train, measured along the way."""
        args, config = self.args, self.config
        refusal = mosaic.refusal_ids(self.model, self.tokenizer, mosaic.REFUSAL)
        optimizer = torch.optim.Adam(self.tokens.parameters())
        rate = config.learning_rate * mosaic.embedding_std(self.model, self.tokenizer)
        spent, recent = 0.0, []
        for step, (tasks, rng) in enumerate(self.tasks()):
            progress = spent / args.minutes / 60 if args.minutes else step / args.steps
            if step % args.measure_every == 0 or progress >= 1:
                self.note(step, spent, recent)
                recent = []
            if progress >= 1:
                break
            then = time.time()
            rows = mosaic.task_rows(self.tokens, tasks, refusal, rng)
            weights = mosaic.answer_weights(rows, config, progress)
            losses, shares = mosaic.batch_losses(self.model, tasks, rows, weights)
            loss = losses[0] + losses[1] + config.kd_weight * losses[2]
            cosine = (1 + math.cos(math.pi * progress)) / 2
            optimizer.param_groups[0]["lr"] = rate * cosine
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recent.append(torch.cat([losses.detach(), shares]))
            spent += time.time() - then
        self.tokens.save(str(Path(args.output).with_suffix(".safetensors")))

    def evaluate(self) -> None:
        """AUC, DSR, OR and near-miss OR on validation or, with --test, on test."""
        split = "test" if self.args.test else "validation"
        self.result[f"{split}_auc"] = self.auc(split)
        if self.args.no_answers:
            return

        def respond(prompts, policies):
            return generate(self.model, self.tokenizer, self.tokens, prompts, policies,
                            JUDGED_TOKENS, title=split)

        orders = range(1, len(self.categories) + 1)
        self.result[split] = mosaic.evaluate(
            respond, self.held[split], self.categories, orders, most_policies=5)
        print(split, self.result[f"{split}_auc"])
        for cell in self.result[split]:
            shares = {k: round(100 * cell[k]["rate"], 1)
                      for k in ("dsr", "over_refusal", "near_miss")}
            print(f"order {cell['order']}: {shares}")


def means(recent: list) -> dict:
    """Mean losses and first-token shares since the last measurement."""
    if not recent:
        return {}
    names = "refusal", "reference", "kd", "declines_active", "declines_others"
    values = torch.stack(recent).nanmean(0).tolist()
    return {name: round(value, 4) for name, value in zip(names, values)}


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def write(path: str, result: dict) -> None:
    with mosaic.beside(path) as part:
        Path(part).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    args = flags()
    os.makedirs(Path(args.output).parent, exist_ok=True)
    if not args.sweep:
        job = Job(args)
        if args.steps:
            job.train()
        job.evaluate()
        return write(args.output, job.result)
    lines = Path(args.sweep).read_text(encoding="utf-8").splitlines()
    jobs = [subprocess.Popen([sys.executable, __file__, *shlex.split(line)])
            for line in lines if line.strip() and not line.startswith("#")]
    raise SystemExit(max(job.wait() for job in jobs))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
