"""The paper's tables and figures, remade; and what goes beyond it.

    python tests/benchmarks/paper.py --all         # two cores: two hours at most
    python tests/benchmarks/paper.py --table 1 3 --figure 4 --beyond unseen
    python tests/benchmarks/paper.py --all --quick   # every cell on a tiny budget
    python tests/benchmarks/paper.py --all --readme  # and README's results: ten seeds

A cell is one training with its measurements; several tables share it. A finished cell
is a file in the folder results, and is not run again unless its settings, the data or
the backbone have changed: a run that was stopped goes on. Test split throughout. Plots
need matplotlib; without it there are tables only. --model takes another backbone (and
its own --results), --mmlu JSON lines in MMLU's form for accuracies in table 2.
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
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import mosaic
import palette
import peers
import report
from mosaic import NEUTRAL, ControlTokens, OrderSampler, Task, TrainConfig
from train_demo import (
    EMBEDDED,
    JUDGED_TOKENS,
    instruct,
    load_backbone,
    read_requests,
    takes_system,
)

# The adapters' rate of Adam, and four epochs for them: tried once, on validation
# (SFT, two epochs: DSR 89 / 88 / 91 at orders 1, 3, 5), not tuned.
ADAPTERS, LORA_RATE = ("orpo", "sft", "added"), 0.003


@dataclass(frozen=True)
class Cell:
    """One training with its measurements; all defaults: MOSAIC-5."""

    method: str = "mosaic"  # or untouched, instruction, orpo, sft, ..
    tokens: int = 5
    epochs: int = 8
    orders: tuple[int, ...] = (1, 2, 3, 4)
    kd: float = 1.0
    negatives: float = 1.0
    half: bool = False  # train on half of each order's subsets
    seed: int = 0

    @property
    def name(self) -> str:
        """The method and whatever is not default: a file's name."""
        plain, fields = Cell(self.method), dataclasses.asdict(self).items()
        changed = [f"{k}{v}" for k, v in fields if v != getattr(plain, k)]
        kept = "_".join([self.method, *changed])
        return "".join(c for c in kept if c.isalnum() or c in "._-")


SEEDS = range(3)
SHORT = functools.partial(Cell, epochs=4)  # figures compare among themselves
GRID: dict[str, dict[str, list[Cell]]] = {
    "table 1": {
        "untouched backbone": [Cell("untouched")],
        "in context": [Cell("instruction")],
        # Half the epochs of SFT: a task is two answers, and so costs the same.
        "ORPO (LoRA)": [Cell("orpo", epochs=2, seed=seed) for seed in SEEDS],
        "SFT (LoRA)": [Cell("sft", epochs=4, seed=seed) for seed in SEEDS],
        "SFT, adapters added": [Cell("added", epochs=4)],
        "MOSAIC-2": [Cell(tokens=2, seed=seed) for seed in SEEDS],
        "MOSAIC-5": [Cell(seed=seed) for seed in SEEDS],
    },
    "table 3": {"growth": [Cell("growth")]},
    "figure 3": {str(m): [SHORT(tokens=m)] for m in (1, 2, 3, 5, 8)},
    "figure 4": {
        "MOSAIC-5": [SHORT()],
        # The same number of steps, all on order 1.
        "without compositions": [SHORT(orders=(1, 1, 1, 1))],
        "without KD": [SHORT(kd=0.0)],
        "without both": [SHORT(orders=(1, 1, 1, 1), kd=0.0)],
    },
    "figure 5": {str(n): [SHORT(negatives=float(n))] for n in (0.5, 1, 2, 4)},
    "figure 6": {
        str(kd): [SHORT(kd=kd)] for kd in (0.0, 0.2, 0.4, 0.8, 1.0, 1.2, 1.6, 2.4)
    },
    "unseen": {"half of the subsets": [SHORT(half=True)], "all": [SHORT()]},
    "permutations": {"MOSAIC-5": [Cell()]},
    "palette": {"Palette": [Cell("palette")]},
    "seeds": {"MOSAIC-5": [Cell(seed=seed) for seed in range(10)]},
}
GRID["table 2"] = GRID["table 1"]


# --- What is trained, and on what -----------------------------------------------------


class Lab:
    """A backbone with its requests and their reference answers, made once."""

    def __init__(self, folder: str, quick: bool, mmlu: str = ""):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.tokenizer, _ = load_backbone(folder or str(EMBEDDED), device)
        self.model.eval().requires_grad_(False)
        requests = read_requests(str(ROOT / "data_sample" / "requests.jsonl"))
        if quick:  # one of each group and split
            few = {(q.category, q.near, q.split): q for q in requests}
            requests = list(few.values())
        self.quick = quick
        self.learn = [q for q in requests if q.split == "train"]
        self.test = [q for q in requests if q.split == "test"]
        names = dict.fromkeys(q.category for q in self.learn)
        self.categories = [name for name in names if name != NEUTRAL]
        self.plain = [q for q in self.test if q.category == NEUTRAL and not q.near]
        self.known = mosaic.reference_answers(
            self.model, self.tokenizer, self.learn + self.plain
        )
        lines = Path(mmlu).read_text(encoding="utf-8").splitlines() if mmlu else []
        self.mmlu = [json.loads(line) for line in lines]

    def config(self, cell: Cell, **changes) -> TrainConfig:
        budget = {"epochs": 1, "positives_per_subset": 2} if self.quick else {}
        settings = {
            "orders": cell.orders,
            "epochs": cell.epochs,
            "kd_weight": cell.kd,
            "negatives_per_positive": cell.negatives,
            "seed": cell.seed,
        }
        return TrainConfig(**(settings | changes | budget))


class Way:
    """A way to steer the backbone: what it reads, and what is added to its weights."""

    def __init__(self, lab: Lab, tokens=None, adapters=(), written=False):
        self.lab, self.tokens, self.adapters = lab, tokens, adapters
        self.system = takes_system(lab.tokenizer)
        self.written = written

    def prompt(self, text: str, policy: mosaic.Policy) -> mosaic.Prompt:
        return instruct(text, policy, self.system) if self.written else text

    def row(self, text: str, policy: mosaic.Policy, answer=()) -> mosaic.Row:
        ids = mosaic.prompt_ids(self.lab.tokenizer, self.prompt(text, policy))
        active = policy if self.tokens else ()
        return mosaic.control_row(self.tokens, active, ids, answer)

    def under(self, policy: mosaic.Policy) -> contextlib.AbstractContextManager:
        """The backbone with the updates of a policy; its old bits afterwards."""
        chosen = [self.adapters[c] for c in policy if c in self.adapters]
        chosen += [self.adapters[None]] if None in self.adapters else []
        names = {name for one in chosen for name in one}
        total = {name: sum(one[name] for one in chosen) for name in names}
        return peers.merged(self.lab.model, total)

    def numbers(self) -> int:
        """How many numbers were trained."""
        if self.tokens:
            return sum(v.numel() for v in self.tokens.parameters())
        return peers.count(self.lab.model) * len(self.adapters)

    def said(self, rows: list[mosaic.Row]) -> list[str]:
        """The answers to rows, as far as they are judged."""
        out = mosaic.generate_ids(
            self.lab.model, self.lab.tokenizer, rows, JUDGED_TOKENS
        )
        decode = functools.partial(self.lab.tokenizer.decode, skip_special_tokens=True)
        return [decode(ids).strip() for ids in out]

    def respond(self, prompts: list[str], policies: list) -> list[str]:
        """Answers as `mosaic.evaluate` wants them, a policy at a time."""
        answers = {}
        for policy in dict.fromkeys(map(tuple, policies)):
            at = [i for i, one in enumerate(policies) if tuple(one) == policy]
            with self.under(policy):
                said = self.said([self.row(prompts[i], policy) for i in at])
            answers |= zip(at, said)
        return [answers[i] for i in range(len(prompts))]

    def respond_in(self, turn: tuple[str, ...]) -> list[str]:
        """Answers to the test requests with the token sets in this very order."""
        control = torch.cat([self.tokens.compose([name]) for name in turn])
        ids = functools.partial(mosaic.prompt_ids, self.lab.tokenizer)
        return self.said([mosaic.Row(ids(q.prompt), control) for q in self.lab.test])


def learn(lab: Lab, cell: Cell) -> Way:
    """Train what a cell names."""
    if cell.method in ("untouched", "instruction"):
        return Way(lab, written=cell.method == "instruction")
    every = lab.categories
    if cell.method == "mosaic":
        tokens = ControlTokens.for_model(
            lab.model, lab.tokenizer, every, cell.tokens, cell.seed
        )
        config = lab.config(cell)
        mosaic.train(lab.model, lab.tokenizer, tokens, lab.learn, config, lab.known)
        return Way(lab, tokens)
    config = lab.config(cell, learning_rate=LORA_RATE)
    loss = peers.orpo_loss if cell.method == "orpo" else peers.sft_loss

    def adapter(ids, config, trained):
        sampler = OrderSampler(
            lab.learn, every, trained, config.positives_per_subset,
            config.negatives_per_positive, random.Random(cell.seed),
        )  # fmt: skip
        return peers.train_lora(
            lab.model, lab.tokenizer, ids, sampler, lab.known, loss, config
        )

    if cell.method != "added":
        rule = peers.by_rule(lab.tokenizer)
        return Way(lab, adapters={None: adapter(rule, config, every)}, written=True)
    # One at a time, on the plain prompt; the budget in all is that of the others.
    alone = dataclasses.replace(config, orders=(1,) * len(config.orders))
    plain = lambda prompt, policy: mosaic.prompt_ids(lab.tokenizer, prompt)
    return Way(lab, adapters={c: adapter(plain, alone, [c]) for c in every})


def halves(categories: list[str]) -> dict[int, list[tuple[str, ...]]]:
    """Half of the subsets of each order but the last, drawn by a seed."""
    draw, half = random.Random(0), {}
    for r in range(1, len(categories)):
        every = mosaic.subsets(categories, r, 10**6, draw)
        half[r] = draw.sample(every, (len(every) + 1) // 2)
    return half


@contextlib.contextmanager
def only(seen: dict[int, list[tuple[str, ...]]]) -> Iterator[None]:
    """Let samplers draw these subsets and no others."""
    every = mosaic.subsets
    mosaic.subsets = lambda names, r, *_: sorted(seen[r])
    try:
        yield
    finally:
        mosaic.subsets = every


# --- What is measured -----------------------------------------------------------------


def judged(lab: Lab, way: Way, categories=None) -> list[dict]:
    """DSR, OR and near-miss OR per order, as `mosaic.evaluate` gives them."""
    categories = categories or lab.categories
    orders = range(1, len(categories) + 1)
    return mosaic.evaluate(way.respond, lab.test, categories, orders)


@torch.no_grad()
def utility(lab: Lab, way: Way, order: int) -> dict[str, float]:
    """{"kl", "top1", "perplexity", "mmlu"} on neutral requests, policies of an order.

    Perplexity: of the backbone's own answers, under the way. Five policies at most.
    """
    policies = mosaic.subsets(lab.categories, order, 5, random.Random(0))
    known = [lab.known[q] for q in lab.plain]
    base = mosaic.teacher_logits(lab.model, lab.tokenizer, known)  # (N, V)
    sums, right = torch.zeros(3, dtype=torch.float64), []
    for policy in policies:
        rows = [way.row(q.prompt, policy, lab.known[q].row.answer) for q in lab.plain]
        with way.under(policy):
            batch = mosaic.make_batch(lab.model, lab.tokenizer, rows)
            logits, labels, _ = mosaic.answer_logits(lab.model, batch)
            right += accuracy(lab, way, policy)
        same = (base.argmax(-1) == logits.argmax(-1)).float().mean()
        kl = mosaic.counterfactual_kd(base, logits)
        sums += torch.stack([kl, same, F.cross_entropy(logits, labels)]).cpu()
    kl, same, loss = (sums / len(policies)).tolist()
    found = {"kl": kl, "top1": same, "perplexity": float(torch.tensor(loss).exp())}
    return found | ({"mmlu": sum(right) / len(right)} if right else {})


def accuracy(lab: Lab, way: Way, policy: mosaic.Policy) -> list[float]:
    """MMLU's accuracy under a policy, as a list of one; empty without a file."""
    if not lab.mmlu:
        return []
    found = mosaic.multiple_choice_accuracy(
        lab.model, lab.tokenizer, way.tokens, lab.mmlu, policy if way.tokens else (),
        lambda text: way.prompt(text, policy),
    )  # fmt: skip
    return [found["rate"]]


def by_side(found: Iterable[tuple[str, Task, str]]) -> dict[str, dict]:
    """{side: {"dsr", "over_refusal"}} of (side, task, answer), near misses left out."""
    sides = {}
    for side, task, answer in found:
        if not task.request.near:
            kinds = sides.setdefault(side, {"dsr": [], "over_refusal": []})
            kind = "dsr" if task.refuse else "over_refusal"
            kinds[kind].append(mosaic.is_refusal(answer))
    return {
        side: {kind: mosaic.share(refused) for kind, refused in kinds.items()}
        for side, kinds in sides.items()
    }


def unseen(lab: Lab, way: Way) -> dict[str, dict]:
    """{order: {"seen", "unseen"}}: DSR and OR under either half of the subsets."""

    def asked(r: int, seen: list) -> Iterator[tuple[str, Task, str]]:
        for policy in mosaic.subsets(lab.categories, r, 32, random.Random(0)):
            said = way.respond([q.prompt for q in lab.test], [policy] * len(lab.test))
            side = "seen" if policy in seen else "unseen"
            yield from ((side, Task(q, policy), a) for q, a in zip(lab.test, said))

    return {str(r): by_side(asked(r, s)) for r, s in halves(lab.categories).items()}


def permuted(lab: Lab, way: Way) -> dict[str, dict]:
    """{order: {"canonical", "permuted"}}: DSR and OR with the token sets in any order.

    All other permutations of every subset at order 3, a sample of 5 at order 4 and of
    24 at order 5.
    """

    def asked(r: int, most: int) -> Iterator[tuple[str, Task, str]]:
        for policy in mosaic.subsets(lab.categories, r, 32, random.Random(0)):
            others = [p for p in itertools.permutations(policy) if p != policy]
            for turn in [policy, *random.Random(0).sample(others, most)]:
                side = "canonical" if turn == policy else "permuted"
                said = zip(lab.test, way.respond_in(turn))
                yield from ((side, Task(q, policy), answer) for q, answer in said)

    counts = {3: 5, 4: 5, 5: 24}
    return {str(r): by_side(asked(r, most)) for r, most in counts.items()}


# Each stage of table 3: the one it goes on from, and the categories it adds.
STAGES = {
    "initial": (None, ["alcohol", "betting"]),
    "+1": ("initial", ["horror"]),
    "+1+1": ("+1", ["sex"]),
    "+2": ("initial", ["horror", "sex"]),
}


def growth(lab: Lab, cell: Cell) -> dict:
    """Table 3: two categories, then more, each time with the older tokens frozen."""
    found, tables = {}, {}
    for stage, (before, names) in STAGES.items():
        if before:
            tokens = copy.deepcopy(tables[before])
            tokens.freeze(tokens.categories)
            tokens.add(lab.model, lab.tokenizer, names, seed=cell.seed)
        else:
            tokens = ControlTokens.for_model(
                lab.model, lab.tokenizer, names, cell.tokens, cell.seed
            )
        config = lab.config(cell, orders=None)
        mosaic.train(lab.model, lab.tokenizer, tokens, lab.learn, config, lab.known)
        old = tables[before].vectors if before else []
        assert all(map(torch.equal, old, tokens.vectors)), "a frozen vector has moved"
        tables[stage] = tokens
        orders = judged(lab, Way(lab, tokens), tokens.categories)
        found[stage] = {"categories": list(tokens.categories), "orders": orders}
    return {"stages": found}


# --- Cells and their files ------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def lab_for(model: str, quick: bool, mmlu: str) -> Lab:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return Lab(model, quick, mmlu)


def measure(lab: Lab, cell: Cell) -> dict:
    if cell.method == "palette":
        return palette.cell(cell.seed, lab.quick)
    if cell.method == "growth":
        return growth(lab, cell)
    half = only(halves(lab.categories)) if cell.half else contextlib.nullcontext()
    with half:
        way = learn(lab, cell)
    result = {"numbers": way.numbers()}
    if cell in itertools.chain(*GRID["unseen"].values()):
        result["subsets"] = unseen(lab, way)
    if cell.half:
        return result
    result["orders"] = judged(lab, way)
    if cell in itertools.chain(*GRID["table 2"].values()):
        orders = range(1, len(lab.categories) + 1)
        result["utility"] = {str(r): utility(lab, way, r) for r in orders}
    if cell in GRID["permutations"]["MOSAIC-5"]:
        result["permutations"] = permuted(lab, way)
    return result


# Of all cells: raise it when code changes what one trains or measures.
VERSION = 3


def settings(cell: Cell, flags) -> dict:
    """What a cell's file must agree with to be kept."""
    data, folder = ROOT / "data_sample", Path(flags.model or EMBEDDED)
    made_of = [data / "requests.jsonl", *sorted(folder.glob("*.*"))]
    made_of += [Path(flags.mmlu)] if flags.mmlu else []
    if cell.method == "palette":
        words = (data / "words" / f"{name}.txt" for name in ("professional", "unsafe"))
        made_of += [data / "professional.jsonl", data / "held_out.jsonl", *words]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in made_of))
    about = {"version": VERSION, "quick": flags.quick, "model": flags.model}
    about |= {"data and backbone": digest.hexdigest()[:16]} | dataclasses.asdict(cell)
    if cell.method in ADAPTERS:
        about["lora_rate"] = LORA_RATE
    if cell.method == "palette":
        about["palette"] = dataclasses.asdict(palette.Settings())
    return about


def file_of(cell: Cell, flags) -> Path:
    return Path(flags.results) / f"{cell.name}.json"


def finished(cell: Cell, flags) -> dict | None:
    """A cell's kept result; None if there is none with these settings."""
    path = file_of(cell, flags)
    kept = json.loads(path.read_text()) if path.exists() else {}
    asked = json.loads(json.dumps(settings(cell, flags)))  # tuples become lists
    return kept if kept.get("settings") == asked else None


def run(cell: Cell, flags) -> str:
    """Train and measure a cell and write its file; returns its name."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // flags.workers))
    start = time.time()
    if finished(cell, flags):  # by another run of this script
        return cell.name
    lab = lab_for(flags.model, flags.quick, flags.mmlu)
    before = mosaic.checksum(lab.model)
    result = measure(lab, cell)
    assert mosaic.checksum(lab.model) == before, "the backbone has changed"
    result["settings"] = settings(cell, flags)
    result["seconds"] = time.time() - start
    result["hardware"] = report.hardware(torch.get_num_threads())
    path = file_of(cell, flags)
    path.parent.mkdir(parents=True, exist_ok=True)
    with mosaic.beside(path) as part:
        Path(part).write_text(json.dumps(result) + "\n", encoding="utf-8")
    return cell.name


def read_flags(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every table and figure")
    parser.add_argument("--table", nargs="+", default=[], choices=["1", "2", "3"])
    parser.add_argument("--figure", nargs="+", default=[], choices=[*"3456"])
    beyond = ["unseen", "permutations", "palette", "seeds"]
    parser.add_argument("--beyond", nargs="+", default=[], choices=beyond)
    parser.add_argument("--quick", action="store_true", help="does every cell run?")
    parser.add_argument("--workers", type=int, default=2, help="cells run at once")
    parser.add_argument("--results", default="", help="folder of the cells' files")
    parser.add_argument("--model", default="", help="instead of the embedded backbone")
    parser.add_argument("--mmlu", default="", help="JSON lines in MMLU's form")
    parser.add_argument(
        "--readme", action="store_true", help="seeds, and README's results"
    )
    flags = parser.parse_args(argv)
    if not flags.results:
        flags.results = str(ROOT / "runs/quick" if flags.quick else HERE / "results")
    names = [f"table {t}" for t in flags.table] + [f"figure {f}" for f in flags.figure]
    every = [name for name in GRID if name != "seeds" or flags.readme]
    flags.asked = (every if flags.all else names) + flags.beyond
    if not flags.asked:
        parser.error("name a --table, --figure or --beyond, or --all")
    if flags.readme and (not flags.all or flags.quick or flags.model):
        parser.error("--readme goes with --all, and without --quick and --model")
    return flags


def main() -> None:
    flags = read_flags()
    grid = {name: GRID[name] for name in flags.asked}
    cells = dict.fromkeys(
        cell for rows in grid.values() for some in rows.values() for cell in some
    )
    waiting = [cell for cell in cells if not finished(cell, flags)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(flags.workers, context) as pool:
        jobs = [pool.submit(run, cell, flags) for cell in waiting]
        bar = tqdm(as_completed(jobs), "cells", total=len(jobs), disable=not jobs)
        for job in bar:
            if job.exception():
                pool.shutdown(cancel_futures=True)
            bar.write(f"finished: {job.result()}", file=sys.stderr)
    found = {cell.name: finished(cell, flags) for cell in cells}
    rows, folder = report.rows_of(grid, found), Path(flags.results)
    report.plots(rows, folder)
    text = report.markdown(rows)
    print(text)
    if flags.all:
        (folder / "README.md").write_text(text, encoding="utf-8")
    if flags.readme:
        path = ROOT / "README.md"
        text = report.write_readme(path.read_text(encoding="utf-8"), rows)
        with mosaic.beside(path) as part:
            Path(part).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
