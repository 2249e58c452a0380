"""The paper's tables and figures, remade on the embedded backbone.

    python tests/benchmarks/paper.py --all --readme  # everything, and README's table
    python tests/benchmarks/paper.py --table 1 3 --figure 4 --beyond objective
    python tests/benchmarks/paper.py --all --quick   # every cell on a tiny budget

A cell is one training with its measurements; several tables share it. A finished cell
is a file in the folder results, and is not run again unless its settings, the data, the
backbone or VERSION have changed: a run that was stopped goes on. Test split throughout,
without what the backbone declines by itself. Pictures need matplotlib.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import mosaic
import palette
import peers
import report
from data_sample.reading import read_requests, read_summaries
from measure import write_whole
from mosaic import NEUTRAL, ControlTokens, Policy, Prompt, Request, Row, TrainConfig
from train_demo import (
    EMBEDDED, JUDGED_TOKENS, REQUESTS, SUMMARIES, instruct, load_backbone
)

PLACE = "before"  # as in the paper; see train_demo.REAL_DEFAULTS
VERSION = 8  # raise it when code changes what a cell trains or measures
LORA_RATE = 0.003  # Adam's, for adapters: tried once on validation, not tuned


@dataclass(frozen=True)
class Cell:
    """One training with its measurements; all defaults: MOSAIC-5.

    The shipped table has twice the epochs.
    """

    method: str = "mosaic"  # or untouched, instruction, sft, orpo, growth, palette
    tokens: int = 5
    orders: tuple[int, ...] = (1, 2, 3, 4)
    optimizer: str = "muon"
    objective: str = "default"  # weights of positions; sum: 1, mean: 1 / length
    kd: float = 1.0
    negatives: float = 1.0
    epochs: int = 4  # half of the default; what is compared has as many
    seed: int = 0

    @property
    def name(self) -> str:
        """The method and whatever is not default: a file's name."""
        plain, values = Cell(self.method), dataclasses.asdict(self).items()
        changed = [f"{k}{v}" for k, v in values if v != getattr(plain, k)]
        name = "_".join([self.method, *changed])
        return "".join(c for c in name if c.isalnum() or c in "._-")


def seeds(n: int, **changes) -> list[Cell]:
    return [Cell(seed=seed, **changes) for seed in range(n)]


GRID: dict[str, dict[str, list[Cell]]] = {
    "table 1": {
        "untouched backbone": seeds(1, method="untouched"),
        "in context": seeds(1, method="instruction"),
        "MOSAIC-5": seeds(3),
        "MOSAIC-5, 8 epochs": seeds(1, epochs=8),
        "MOSAIC-20": seeds(1, tokens=20),
        "SFT (LoRA)": seeds(1, method="sft"),
        "ORPO (LoRA)": seeds(1, method="orpo"),
    },
    "objective": {
        "first 3, later 0.3, then 1": seeds(3),
        "sum": seeds(3, objective="sum"),
        "mean of each answer": seeds(3, objective="mean"),
        "first 3, later 0.3, then 1; Adam": seeds(1, optimizer="adam"),
        "first 3, later 0.3, then 1; 8 epochs": seeds(1, epochs=8),
    },
    "figure 4": {
        "MOSAIC-5": seeds(1),
        # The same number of steps, all on order 1.
        "without compositions": seeds(1, orders=(1, 1, 1, 1)),
        "without KD": seeds(1, kd=0.0),
    },
    "figure 5": {str(n): seeds(1, negatives=n) for n in (0.5, 1.0, 2.0, 4.0)},
    "table 3": {"growth": seeds(1, method="growth")},
    "palette": {"Palette": seeds(1, method="palette")},
}


# --- What is trained, and on what -----------------------------------------------------


class Lab:
    """The backbone with its requests and its own answers to them, made once."""

    def __init__(self, quick: bool):
        self.model, self.tokenizer, _ = load_backbone(str(EMBEDDED), "cpu")
        self.model.eval().requires_grad_(False)
        requests, self.quick = read_requests(str(REQUESTS)), quick
        if quick:  # the first of each group and split
            groups = {(q.category, q.near, q.split): q for q in reversed(requests)}
            requests = [*reversed(groups.values())]
        self.requests = requests
        self.summaries = read_summaries(str(SUMMARIES))
        names = dict.fromkeys(q.category for q in requests)
        self.categories = [name for name in names if name != NEUTRAL]
        # The later turns among them are drawn once, for all seeds and methods.
        self.learn = mosaic.training_references(
            self.model, self.tokenizer, requests, TrainConfig(), place=PLACE)
        self.test = self.answered([q for q in requests if q.split == "test"])
        self.plain = [q for q in self.test if q.category == NEUTRAL and not q.near]
        # The second turn: each request after a harmless one and its answer.
        rng = random.Random(0)
        self.second = self.answered(
            [mosaic.later_turn(rng.choice(self.plain), q) for q in self.test])

    def answered(self, requests: list[Request]) -> list[mosaic.Reference]:
        """Those that the backbone does not decline by itself, with its answers."""
        found = mosaic.reference_answers(
            self.model, self.tokenizer, requests, JUDGED_TOKENS, place=PLACE)
        return [q for q in found if not mosaic.is_refusal(q.text)]

    def config(self, cell: Cell) -> TrainConfig:
        changes = {"positives_per_subset": round(200 / (1 + cell.negatives))}  # as many
        if cell.method in ("sft", "orpo"):  # steps, whatever the ratio of negatives
            changes["learning_rate"] = LORA_RATE
        if cell.objective == "sum":
            changes |= {"first_weight": 1.0, "later_weight": 1.0}
        if self.quick:
            changes |= {"positives_per_subset": 2}
        return TrainConfig(
            orders=None if cell.method == "growth" else cell.orders, seed=cell.seed,
            epochs=1 if self.quick else cell.epochs, optimizer=cell.optimizer,
            kd_weight=cell.kd, negatives_per_positive=cell.negatives, **changes)

    def fresh(self, names: list[str], cell: Cell, requests: list) -> ControlTokens:
        return ControlTokens.for_model(
            self.model, self.tokenizer, names, cell.tokens, requests,
            place=PLACE, seed=cell.seed)


class Way:
    """A way to steer: control tokens, an adapter, a written policy, or none of them.

    The adapter reads the policy as written, by names; the instruction has summaries.
    """

    def __init__(self, lab: Lab, tokens=None, updates=None, summaries=None):
        self.lab, self.tokens, self.summaries = lab, tokens, summaries
        self.updates = updates or {}

    def row(self, prompt: Prompt, policy: Policy, answer=()) -> Row:
        lab = self.lab
        if self.summaries is not None:
            prompt = instruct(prompt, policy, self.summaries, lab.tokenizer)
        active = policy if self.tokens else ()
        return mosaic.control_row(lab.tokenizer, self.tokens, active, prompt, answer)

    def respond(self, prompts: list[Prompt], policies: list[Policy]) -> list[str]:
        """Answers as `mosaic.evaluate` wants them."""
        lab, rows = self.lab, [self.row(p, s) for p, s in zip(prompts, policies)]
        with peers.merged(lab.model, self.updates):
            out = mosaic.generate_ids(lab.model, lab.tokenizer, rows, JUDGED_TOKENS)
        return [lab.tokenizer.decode(ids, skip_special_tokens=True) for ids in out]

    def numbers(self) -> int:
        """How many numbers were trained."""
        if self.tokens:
            return sum(v.numel() for v in self.tokens.parameters())
        return peers.count(self.lab.model) if self.updates else 0


@contextlib.contextmanager
def objective(name: str) -> Iterator[None]:
    """Let `mosaic.train` take the mean over each answer in place of a weighted sum."""

    def mean(rows, config, progress):
        return torch.tensor([1 / len(row.answer) for row in rows for _ in row.answer])

    ours = mosaic.answer_weights
    mosaic.answer_weights = mean if name == "mean" else ours
    try:
        yield
    finally:
        mosaic.answer_weights = ours


def learn(lab: Lab, cell: Cell) -> Way:
    """Train what a cell names."""
    config = lab.config(cell)
    if cell.method == "untouched":
        return Way(lab)
    if cell.method == "instruction":
        return Way(lab, summaries=lab.summaries)
    if cell.method == "mosaic":
        tokens = lab.fresh(lab.categories, cell, lab.requests)
        with objective(cell.objective):
            mosaic.train(
                lab.model, lab.tokenizer, tokens, lab.requests, config, lab.learn)
        return Way(lab, tokens)
    loss = {"sft": peers.sft_loss, "orpo": peers.orpo_loss}[cell.method]
    updates = peers.train_lora(
        lab.model, lab.tokenizer, lab.categories, lab.learn, loss, config)
    return Way(lab, updates=updates, summaries={})


# Each stage of table 3: the one it goes on from, and the categories it adds.
STAGES = {
    "initial": (None, ["alcohol", "betting"]),
    "+1": ("initial", ["horror"]),
    "+1+1": ("+1", ["sex"]),
    "+2": ("initial", ["horror", "sex"]),
}


def growth(lab: Lab, cell: Cell) -> dict:
    """Table 3: two categories, then more, each time with the older tokens frozen.

    No stage sees requests of categories that come later, nor is asked any; their near
    misses are neutral ones.
    """
    stages, tables = {}, {}
    for stage, (before, names) in STAGES.items():
        known = [*(tables[before].categories if before else ()), *names, NEUTRAL]
        requests = [q for q in lab.requests if q.category in known]
        words = {q.prompt for q in requests}
        references = [q for q in lab.learn if q.category in known  # and turns before it
                      and words.issuperset(mosaic.user_words(q.prompt))]
        if before:
            tokens = copy.deepcopy(tables[before])
            tokens.freeze(tokens.categories)
            tokens.add(lab.model, lab.tokenizer, names, None, requests, cell.seed)
        else:
            tokens = lab.fresh(names, cell, requests)
        mosaic.train(lab.model, lab.tokenizer, tokens, lab.requests, lab.config(cell),
                     references)
        tables[stage] = tokens
        asked = [q for q in lab.test if q.category in known]
        orders = range(1, len(tokens.categories) + 1)
        stages[stage] = {
            "categories": tokens.categories,
            "orders": mosaic.evaluate(
                Way(lab, tokens).respond, asked, tokens.categories, orders)}
    return {"stages": stages}


# --- What is measured -----------------------------------------------------------------


@torch.no_grad()
def drift(lab: Lab, way: Way, order: int) -> dict[str, float]:
    """{"kl", "same"}: what policies of an order do to answers to neutral requests.

    Per token of the backbone's own answers: KL(without || with) in nats, and how often
    both put the same token first. Five policies at most.
    """
    policies = mosaic.subsets(lab.categories, order, 5, random.Random(0))
    own = [Row(q.bare, None, q.answer) for q in lab.plain]
    base, _ = mosaic.answer_logits(lab.model, own)  # (N, V)
    kl = same = 0.0
    for policy in policies:
        rows = [way.row(q.prompt, policy, q.answer) for q in lab.plain]
        with peers.merged(lab.model, way.updates):
            logits, _ = mosaic.answer_logits(lab.model, rows)  # (N, V)
        kl += mosaic.counterfactual_kd(base, logits).item() / len(base)
        same += (base.argmax(-1) == logits.argmax(-1)).float().mean().item()
    return {"kl": kl / len(policies), "same": same / len(policies)}


def measure(lab: Lab, cell: Cell) -> dict:
    """Train a cell; DSR, OR and near-miss OR by order, second turn, drift."""
    if cell.method == "palette":
        return palette.cell(cell.seed, lab.quick)
    if cell.method == "growth":
        return growth(lab, cell)
    way, every = learn(lab, cell), lab.categories
    most = 2 if lab.quick else 5  # policies of an order
    odd = range(1, len(every) + 1, 2)  # 1, 3, 5
    orders = range(1, len(every) + 1)
    asked = {"test": len(lab.test), "second turn": len(lab.second)}
    return {
        "numbers": way.numbers(), "asked": asked,
        "orders": mosaic.evaluate(way.respond, lab.test, every, orders, most),
        "second_turn": mosaic.evaluate(way.respond, lab.second, every, odd, most),
        "drift": {str(r): drift(lab, way, r) for r in odd}}


# --- Cells and their files ------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def lab_for(quick: bool) -> Lab:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return Lab(quick)


def settings(cell: Cell, quick: bool) -> dict:
    """What a cell's file must agree with to be kept."""
    files = [REQUESTS, SUMMARIES, *sorted(EMBEDDED.glob("*.*"))]
    if cell.method == "palette":
        files += palette.FILES
    content = b"".join(Path(path).read_bytes() for path in files)
    about = {
        "version": VERSION, "quick": quick, "lora_rate": LORA_RATE,
        "data and backbone": hashlib.sha256(content).hexdigest()[:16],
        "config": {name: value for name, value in dataclasses.asdict(
            TrainConfig()).items() if not hasattr(cell, name)},
        **dataclasses.asdict(cell)}
    if cell.method == "palette":
        about["config"] = dataclasses.asdict(palette.Settings())
    if cell.method == "growth":
        about["known"] = "only requests of known categories, in start and turns, too"
    return json.loads(json.dumps(about))  # tuples become lists


def finished(cell: Cell, flags) -> dict | None:
    """A cell's kept result; None if there is none with these settings."""
    path = Path(flags.results) / f"{cell.name}.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return kept if kept.get("settings") == settings(cell, flags.quick) else None


def run(cell: Cell, flags) -> str:
    """Train and measure a cell and write its file; returns its name."""
    torch.set_num_threads(1)  # a worker for each core does more than threads
    if finished(cell, flags):  # by another run of this script
        return cell.name
    began = time.time()
    result = measure(lab_for(flags.quick), cell) | {
        "settings": settings(cell, flags.quick), "seconds": round(time.time() - began),
        "hardware": report.hardware()}
    write_whole(Path(flags.results) / f"{cell.name}.json", json.dumps(result) + "\n")
    return cell.name


def read_flags(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--all", action="store_true", help="every table and figure")
    add("--table", nargs="+", default=[], choices=["1", "3"])
    add("--figure", nargs="+", default=[], choices=["4", "5"])
    add("--beyond", nargs="+", default=[], choices=["objective", "palette"])
    add("--quick", action="store_true", help="does every cell run?")
    add("--workers", type=int, default=os.cpu_count(), help="cells at once")
    add("--results", default="", help="folder of the cells' files")
    add("--report", action="store_true", help="train nothing, show what is finished")
    add("--readme", action="store_true", help="with --all: write README's table, too")
    flags = parser.parse_args(argv)
    flags.results = flags.results or str(
        ROOT / "runs" / "quick" if flags.quick else HERE / "results")
    names = [f"table {n}" for n in flags.table] + [f"figure {n}" for n in flags.figure]
    flags.asked = [*GRID] if flags.all else names + flags.beyond
    if not flags.asked:
        parser.error("name a --table, --figure or --beyond, or --all")
    if flags.readme and (not flags.all or flags.quick):
        parser.error("--readme goes with --all and without --quick")
    return flags


def main() -> None:
    flags = read_flags()
    folder = Path(flags.results)
    folder.mkdir(parents=True, exist_ok=True)
    grid = {name: GRID[name] for name in flags.asked}
    cells = dict.fromkeys(itertools.chain(
        *(some for rows in grid.values() for some in rows.values())))
    waiting = [c for c in cells if not flags.report and not finished(c, flags)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(flags.workers, context) as pool:
        jobs = [pool.submit(run, cell, flags) for cell in waiting]
        bar = tqdm(as_completed(jobs), "cells", total=len(jobs), disable=not jobs)
        for job in bar:
            if job.exception():
                pool.shutdown(cancel_futures=True)
            bar.write(f"finished: {job.result()}", file=sys.stderr)
    rows = report.rows_of(grid, {cell: finished(cell, flags) for cell in cells})
    lacking = [title for name, some in grid.items() for title in some
               if title not in rows.get(name, {})]
    text = report.markdown(rows, lacking)
    print(text)
    if flags.all:
        report.pictures(rows, folder)
        (folder / "README.md").write_text(text, encoding="utf-8")
    if flags.readme:
        path = ROOT / "README.md"
        text = report.write_readme(path.read_text(encoding="utf-8"), rows["table 1"])
        write_whole(path, text)


if __name__ == "__main__":
    main()
