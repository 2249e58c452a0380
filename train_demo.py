"""MOSAIC from nothing to a table: load, show, train, evaluate, compose, save.

    python train_demo.py                     # the embedded backbone; a CPU will do
    python train_demo.py --model FOLDER      # any chat model that transformers loads
    python train_demo.py --data FILE.csv     # your own categories
    python train_demo.py --tokens runs/demo/tokens.safetensors --output runs/again
    python train_demo.py --chat runs/demo/tokens.safetensors
"""

import contextlib
import html
import json
import math
import os
import random
import re
import sys
import time
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import datasets
import pandas
import torch
import transformers
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from jinja2 import TemplateError
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TextStreamer
)

import mosaic
from mosaic import NEUTRAL, ControlTokens, Request, TrainConfig, evaluate, generate

HERE = Path(__file__).resolve().parent
EMBEDDED = HERE / "data_sample" / "tiny_chat"
ON_CUDA = "Qwen/Qwen2.5-0.5B-Instruct"
TALK_TOKENS = 256  # answers in a chat are cut here
ANSWER_TOKENS = 64  # those that are shown or learned from
JUDGED_TOKENS = 8  # those that are only judged: whether one declines shows early
FORM = '{"request": "...", "category": "...", "split": "train"}'
SPLITS = ("train", "validation", "test")
HUB_NAME = r"\w[\w.-]*/[\w.-]+"


def flag(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class Flags:
    """Every flag of the demo."""

    model: str = flag("", "chat model, folder or hub name; empty: the embedded one, or "
                          f"{ON_CUDA} on CUDA")
    data: str = flag(str(HERE / "data_sample" / "requests.jsonl"),
                     "requests: .jsonl, .csv or .parquet file, or dataset of the hub, "
                     "with columns for request and category and, optionally, split "
                     "(60 / 20 / 20 by a hash where there is none) and near")
    request_column: str = flag("request", "the column of --data with the requests")
    category_column: str = flag("category", "the column of --data with the categories")
    tokens_per_category: int = flag(5, "M, control tokens of each category")
    orders: list[int] = field(default_factory=lambda: [1, 2, 3, 4], metadata={
        "help": "policy sizes to train on; evaluation takes all"})
    epochs: int = flag(8, "passes over the sampled tasks")
    learning_rate: float = flag(0.01, "of Adam")
    batch_size: int = flag(16, "tasks in a step; lower it where memory is short")
    kd_weight: float = flag(1.0, "lambda, weight of the distillation loss")
    later_turns: float = flag(0.0, "share of the training requests that also come "
                                   "after one or two other exchanges")
    seed: int = flag(0, "of start values and sampling")
    output: str = flag("runs/demo", "folder for the table, the results and a report")
    tokens: str = flag("", "a saved table: no training, only evaluation on --data")
    add: list[str] = field(default_factory=list, metadata={
        "help": "with --tokens: categories to train beside its own, which stay frozen"})
    export: str = flag("", "folder to be made: the backbone with the tokens in it, an "
                           "ordinary checkpoint whose chat template takes a policy")
    chat: str = flag("", "a saved table to talk under: nothing else is done")
    device: str = flag("", "cpu or cuda; empty: cuda where there is one")


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>MOSAIC</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root {{ color-scheme: light dark; font: 16px/1.4 system-ui, sans-serif }}
body {{ max-width: 72rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ overflow-wrap: anywhere }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }}
th, td {{ padding: .4rem .7rem; text-align: left; vertical-align: top;
          border-bottom: 1px solid #8886; min-width: 5rem }}
</style></head><body><h1>MOSAIC on {model}</h1>
<h2>Requests declined, test split, percent</h2>{figures}
<h2>One request of each category under four policies</h2>{answers}
<h2>Settings</h2>{settings}</body></html>
"""


# --- The story ------------------------------------------------------------------------


def main() -> None:
    flags = read_flags()
    device = flags.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if flags.chat:
        return chat(flags.chat, *load_backbone(flags.model, device)[:2])
    # Load: a frozen backbone, and a table of control tokens for it.
    requests = read_requests(flags.data, flags.request_column, flags.category_column)
    model, tokenizer, name = load_backbone(flags.model, device)
    tokens = load_tokens(flags, model, tokenizer, requests)
    parameters = sum(weight.numel() for weight in model.parameters())
    say_what_learns(requests, tokens, f"{parameters:,} weights of {name} on {device}")

    # Ask: what the untouched backbone declines by itself.
    size = 16 * flags.batch_size  # answers at once: without gradients there is room
    answer = partial(
        generate, model, tokenizer, max_new_tokens=JUDGED_TOKENS, batch_size=size)
    test = [request for request in requests if request.split == "test"]
    asked = [request.prompt for request in test]
    answers = answer(None, asked, title="untouched")
    plain = dict(zip(asked, answers))

    # Train: the tokens alone, against the backbone's own answers.
    started = referred = trained = time.time()
    if learns := not flags.tokens or bool(flags.add):
        referred, trained = train(flags, model, tokenizer, tokens, requests)

    # Evaluate: the policies of every order, the same test requests for each method.
    system = takes_system(tokenizer)
    ways = {
        "untouched backbone": lambda prompts, policies: [plain[p] for p in prompts],
        "written instruction": lambda prompts, policies: answer(
            None, [instruct(p, policy, system) for p, policy in zip(prompts, policies)],
            title="written instruction"),
        "MOSAIC": lambda prompts, policies: answer(
            tokens, prompts, policies, title="MOSAIC"),
    }
    orders = range(1, len(tokens.categories) + 1)
    table = {title: evaluate(respond, test, tokens.categories, orders, seed=flags.seed)
             for title, respond in ways.items()}
    policies = [*([category] for category in tokens.categories), tokens.categories]
    moved = mosaic.drift(model, tokenizer, tokens, test, policies, size // 4)
    evaluated = time.time()
    print_table(table, moved)

    # Compose: a request of each category under four policies. Save, export.
    shown = show_answers(model, tokenizer, tokens, test)
    declined = mosaic.share(mosaic.openings_judge(asked, answers))
    results = {
        "model": name, "seed": flags.seed, "config": asdict(flags),
        "backbone": {"parameters": parameters, "refusal_rate": declined["rate"],
                     "n": declined["n"]},
        "orders": table["MOSAIC"], "drift": moved,
        "instruction": table["written instruction"],
        "seconds": {"reference": referred - started, "train": trained - referred,
                    "evaluate": evaluated - trained}}
    write_results(flags.output, learns, results, shown)
    if flags.export:
        mosaic.export_checkpoint(model, tokenizer, tokens, flags.export)
        print(f"exported to {flags.export}")


# --- Its parts ------------------------------------------------------------------------


def train(
    flags, model, tokenizer, tokens: ControlTokens, requests
) -> tuple[float, float]:
    """Train and save the table; returns when references, and when tokens were ready."""
    config = TrainConfig(
        orders=tuple(flags.orders), epochs=flags.epochs, kd_weight=flags.kd_weight,
        learning_rate=flags.learning_rate, batch_size=flags.batch_size, seed=flags.seed)
    learn = [request for request in requests if request.split == "train"]
    some = config.answer_tokens, 4 * config.batch_size
    known = mosaic.reference_answers(model, tokenizer, learn, *some)
    later = in_later_turns(learn, known, tokenizer, flags)
    if later:
        known |= mosaic.reference_answers(model, tokenizer, later, *some)
    referred = time.time()
    learn = learn + later
    mosaic.train(model, tokenizer, tokens, learn, config, known, unfinished(flags))
    tokens.save(Path(flags.output) / "tokens.safetensors")  # whatever comes after
    return referred, time.time()


def say_what_learns(requests, tokens: ControlTokens, frozen: str) -> None:
    """What was read, what will be trained, and what stays as it is."""
    counts = Counter((q.category, q.split) for q in requests)
    names = dict.fromkeys(q.category for q in requests)
    said = (f"{name} " + "/".join(str(counts[name, split]) for split in SPLITS)
            for name in names)
    print(f"read:    {len(requests):,} requests, {'/'.join(SPLITS)}: {', '.join(said)}")
    learn, every = tokens.trainable, tokens.categories
    numbers = sum(v.numel() for v in tokens.parameters() if v.requires_grad)
    print(f"trained: {numbers:,} numbers, {len(tokens.vectors[0])} control tokens for "
          f"each of {', '.join(learn)}" if learn else "trained: nothing")
    kept = ", ".join(name for name in every if name not in learn)
    print(f"frozen:  {f'the tokens of {kept}; ' * bool(kept)}{frozen}\n")


def takes_system(tokenizer) -> bool:
    """Whether the chat template knows system messages (Gemma's refuses them)."""
    try:
        shown = mosaic.prompt_ids(tokenizer, instruct("Hi", ["zebras"], True))
    except TemplateError:
        return False
    return "zebras" in tokenizer.decode(shown)  # some leave them out in silence


def instruct(prompt: str, policy, system: bool) -> list[dict[str, str]]:
    """The paper's in-context baseline: the policy as a written rule, no tokens.

    In a system message or, without one, before the user's words.
    """
    rule = f"Do not talk about {' or '.join(policy)}. Answer everything else."
    if not system:
        return [{"role": "user", "content": f"{rule}\n\n{prompt}"}]
    return [{"role": "system", "content": rule}, {"role": "user", "content": prompt}]


def print_table(table: dict[str, list[dict]], moved: dict[str, float]) -> None:
    """DSR / OR per order, near-miss OR over all orders, in percent; then the drift."""
    heads = [f"order {cell['order']}" for cell in table["MOSAIC"]] + ["near-miss OR"]
    print("\ntest split, percent: DSR (up) / OR (down)")
    print(" " * 20 + "".join(f"{head:>14}" for head in heads))
    for title, cells in table.items():
        shown = [f"{percent([cell['dsr']])} / {percent([cell['over_refusal']])}"
                 for cell in cells]
        shown.append(percent([cell["near_miss"] for cell in cells]))
        print(f"{title:20}" + "".join(f"{cell:>14}" for cell in shown))
    print(f"\ndrift on neutral answers: KL {moved['kl']:.4f} nats a token, "
          f"the same token first in {moved['top1_agreement']:.1%}\nempty or degenerate "
          f"answers: {percent([cell['degenerate'] for cell in table['MOSAIC']])}%")


def percent(shares: list[dict[str, float]]) -> str:
    """The shares as one, "-" where nothing was asked."""
    n = sum(one["n"] for one in shares)
    hits = sum(one["rate"] * one["n"] for one in shares)
    return f"{100 * hits / n:.1f}" if n else "-"


def show_answers(
    model, tokenizer, tokens: ControlTokens, test: list[Request]
) -> dict[str, list[str]]:
    """One request of each category under no policy, its own, another and all."""
    every, shown = tokens.categories, {}
    for i, category in enumerate(every):
        prompt = next((q.prompt for q in test if q.category == category), None)
        if prompt is None:
            continue
        names = ("none", category, every[i - 1], "all")
        answers = generate(
            model, tokenizer, tokens, [prompt] * 4,
            [[], [category], [every[i - 1]], every], ANSWER_TOKENS)
        shown[f"{category}: {prompt}"] = answers
        print(f"\n{category}: {prompt}")
        for name, answer in zip(names, answers):
            print(f"{name:>12} | {answer}")
    return shown


def in_later_turns(learn: list[Request], known, tokenizer, flags) -> list[Request]:
    """Training requests again, as the second or third of a talk: policies last."""
    draw, again = random.Random(flags.seed), []
    for request in draw.sample(learn, round(flags.later_turns * len(learn))):
        before = []
        for other in draw.sample(learn, draw.choice((1, 2))):
            answer = tokenizer.decode(known[other].row.answer, skip_special_tokens=True)
            before += [other.prompt, answer.strip()]
        again.append(replace(request, prompt=(*before, request.prompt)))
    return again


def unfinished(flags: Flags) -> Path:
    """The file that a stopped run leaves in its folder, and the next one takes up."""
    Path(flags.output).mkdir(parents=True, exist_ok=True)
    return Path(flags.output) / "training.pt"


def chat(path: str, model, tokenizer) -> None:
    """A talk in the terminal, under a policy that each turn may change."""
    with contextlib.suppress(ImportError):  # not everywhere
        import readline  # noqa: F401  arrow keys edit the line
    tokens, policy, turns = ControlTokens.load(path, model), [], []
    room = room_for_prompt(model, tokens, TALK_TOKENS)
    known = ", ".join(tokens.categories)
    help_line = f"/on X, /off X (X of {known}), /policy, /reset, /quit"
    print(help_line)
    while True:
        try:
            said = input(f"[{', '.join(policy) or 'no policy'}] > ").strip()
            said = said.encode(errors="replace").decode()  # whatever a pipe brings
        except (EOFError, KeyboardInterrupt):
            return print()
        command, _, name = said.partition(" ")
        if command in ("/on", "/off") and name in tokens.categories:
            active = {*policy, name} if command == "/on" else {*policy} - {name}
            policy = list(mosaic.canonical(active, tokens.categories))
        elif said == "/policy":
            print(f"declined: {', '.join(policy) or 'nothing'}; known: {known}")
        elif said == "/reset":
            turns = []
        elif said == "/quit":
            return
        elif said.startswith("/"):
            print(f"{said}? {help_line}")
        elif said:
            turns.append({"role": "user", "content": said})
            while turns and len(mosaic.prompt_ids(tokenizer, turns)) > room:
                turns = turns[2:]  # the oldest exchange
            if not turns:
                print(f"too long: {room} tokens fit")
                continue
            streamer = TextStreamer(
                tokenizer, skip_prompt=True, skip_special_tokens=True)
            try:
                (answer,) = generate(
                    model, tokenizer, tokens, [turns], [policy], TALK_TOKENS,
                    streamer=streamer)
            except KeyboardInterrupt:  # enough of this answer
                answer = "..."
                print()
            turns.append({"role": "assistant", "content": answer})


def load_backbone(name: str, device: str):
    """(model, tokenizer, name): fp32 on a CPU, bf16 on CUDA. ValueError: no model."""
    if not name and device == "cuda":
        try:
            return load_backbone(ON_CUDA, device)
        except ValueError as error:
            print(f"{error}; taking the embedded backbone instead")
    name = name or os.path.relpath(EMBEDDED)
    if not os.path.isdir(name) and not re.fullmatch(HUB_NAME, name):
        raise ValueError(f"no model folder {name}; give one with a transformers "
                         f"checkpoint, or a hub name such as {ON_CUDA}")
    try:
        if not os.path.isdir(name) and not try_to_load_from_cache(name, "config.json"):
            get_hf_file_metadata(hf_hub_url(name, "config.json"))  # one try, not twelve
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, loading = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.bfloat16 if device == "cuda" else torch.float32,
            output_loading_info=True, ignore_mismatched_sizes=True)
        model = model.to(device)  # may not fit
        mosaic.prompt_ids(tokenizer, "Hi")  # is there a template that works?
    except Exception as error:  # anything at all can be wrong with a checkpoint
        raise ValueError(f"model {name} cannot be used: {one_line(error)}") from error
    for key, found, wanted in loading["mismatched_keys"]:
        raise ValueError(f"model {name}: {key} is {[*found]}, its config says "
                         f"{[*wanted]}; get the whole checkpoint")
    if keys := sorted(loading["missing_keys"]):  # these weights would be random
        raise ValueError(f"model {name} has {len(keys)} missing keys, first {keys[0]}; "
                         "get the whole checkpoint")
    if keys := sorted(loading["unexpected_keys"]):
        print(f"model {name} has {len(keys)} weights that go unused, first {keys[0]}")
    return model, tokenizer, name


def room_for_prompt(model, tokens: ControlTokens, answer: int) -> int:
    """How many tokens fit the model beside all control tokens and an answer."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", 10**9)
    return longest - sum(map(len, tokens.vectors)) - answer


def load_tokens(
    flags: Flags, model, tokenizer, requests: list[Request]
) -> ControlTokens:
    """A saved table, grown by --add, or a fresh one. ValueError: it does not fit."""
    train = [q for q in requests if q.split == "train" and not q.near]
    learn = dict.fromkeys(q.category for q in train)
    if flags.tokens:
        tokens = ControlTokens.load(flags.tokens, model)
        tokens.freeze(tokens.categories)
        tokens.add(model, tokenizer, flags.add, seed=flags.seed)
    elif found := [category for category in learn if category != NEUTRAL]:
        tokens = ControlTokens.for_model(
            model, tokenizer, found, flags.tokens_per_category, flags.seed)
    else:
        raise ValueError(f"{flags.data}: no request to learn from; it takes some with "
                         f"split train and a category other than {NEUTRAL}")
    known = [*tokens.categories, NEUTRAL]
    for number, q in enumerate(requests):
        for key, value in (("category", q.category), ("near", q.near or NEUTRAL)):
            if value not in known:
                raise ValueError(f"{at(flags.data, number)}: unknown {key} {value!r}; "
                                 f"known here are {', '.join(known)}")
    if lacking := [name for name in known if name not in learn and tokens.trainable]:
        raise ValueError(
            f"{flags.data}: no training request of {lacking[0]}, only of "
            f"{', '.join(learn)}; it takes some of each category of the table, and "
            f"{NEUTRAL} ones such as those in data_sample/requests.jsonl")
    room = room_for_prompt(model, tokens, ANSWER_TOKENS)
    for number, q in enumerate(requests):
        if (length := len(mosaic.prompt_ids(tokenizer, q.prompt))) > room:
            raise ValueError(f"{at(flags.data, number)}: a request of {length} tokens; "
                             f"beside control tokens and answer {room} fit the model")
    if "test" not in {q.split for q in requests}:
        raise ValueError(f"{flags.data}: no request has split 'test'; take more rows")
    if flags.orders == Flags().orders:  # not asked for: as far as there are categories
        flags.orders = [r for r in flags.orders if r <= len(tokens.categories)]
    if not set(flags.orders) <= set(range(1, len(tokens.categories) + 1)):
        raise ValueError(f"--orders {flags.orders} must lie in "
                         f"1..{len(tokens.categories)}, the number of categories")
    return tokens


def read_requests(
    path: str, request: str = "request", category: str = "category"
) -> list[Request]:
    """The requests of a file or hub dataset. ValueError: names file, line and fix.

    Where no row has a split a hash of its text gives each its own, 60 / 20 / 20: the
    same in every file, so that a table that grows is not tested on what it has learned.
    """
    requests, seen = [], {}
    for number, row in enumerate(read_rows(path, (request, category))):
        here, split, near = at(path, number), row.get("split"), row.get("near")
        for key in (request, category):
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise ValueError(f"{here}: {key} is {row.get(key)!r}; it must "
                                 f"be some text, as in {FORM}")
        kind = row[category].strip()
        near = near.strip() if isinstance(near, str) else near
        if kind.lower() == NEUTRAL != kind:
            raise ValueError(f"{here}: category {kind!r}; write {NEUTRAL} for harmless "
                             "requests, or name the category otherwise")
        if split not in (None, *SPLITS):
            raise ValueError(f"{here}: split is {split!r}; it must be train, "
                             "validation or test")
        if near and kind != NEUTRAL:
            raise ValueError(f"{here}: near is {near!r}; only {NEUTRAL} "
                             "requests can be near misses")
        there = seen.setdefault(row[request].strip().lower(), (here, split))
        if there != (here, split) and (split is None or there[1] != split):
            raise ValueError(f"{here}: the request of {there[0]} again; take one out, "
                             "or the test split would leak")
        requests.append(Request(row[request], kind, split or "train", near))
    if not any(split for _, split in seen.values()):
        fifths = (zlib.crc32(text.encode()) % 5 for text in seen)  # in their order
        requests = [replace(q, split=SPLITS[max(0, part - 2)])
                    for q, part in zip(requests, fifths)]
    return requests


def at(path: str, number: int) -> str:
    """Where a row is: a line of JSONL, else counted from 1, without a header."""
    return f"{path}{':' if path.endswith('.jsonl') else ' row '}{number + 1}"


def read_rows(path: str, columns: tuple[str, str]) -> list[dict]:
    """The rows of a file or hub dataset, as they are. ValueError: it has none."""
    kinds = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
    kind = kinds.get(Path(path).suffix)
    if not os.path.isfile(path) and (kind or not re.fullmatch(HUB_NAME, path)):
        raise ValueError(f"{path}: no such file")
    if os.path.isfile(path) and not kind:
        raise ValueError(f"{path}: unknown kind of file; known are {', '.join(kinds)}")
    if kind == "json" and (wrong := bad_line(path)):
        raise ValueError(f"{wrong}; each line of --data is like {FORM}")
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else: a call over the network
    try:  # streaming: nothing is copied into a cache
        parts = datasets.load_dataset(
            kind or path, data_files=path if kind else None, streaming=True)
        own = len(parts) > 1  # splits of a dataset of the hub
        rows = [row | ({"split": name} if own else {}) for name, part in parts.items()
                for row in part]
    except Exception as error:  # as many kinds as there are readers
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from error
    if not rows:
        raise ValueError(f"{path}: the file is empty")
    if lacking := [name for name in columns if name not in rows[0]]:
        found = ", ".join(map(str, rows[0]))
        raise ValueError(f"{path}: no column {lacking[0]!r}, only {found}; name yours "
                         "with --request_column and --category_column")
    return rows


def bad_line(path: str) -> str:
    """Where and why a file is not JSON lines; empty if it is."""
    number = 0
    try:
        with open(path, "rb") as file:  # bytes: so that a bad one has its own line
            for number, line in enumerate(file, 1):
                row = json.loads(line.decode("utf-8-sig"))
                if not isinstance(row, dict) or not row:
                    return f"{path}:{number}: not an object with fields"
    except ValueError as error:
        return f"{path}:{number}: not JSON in UTF-8 ({one_line(error)})"
    return "" if number else f"{path}: the file is empty"


def read_flags() -> Flags:
    parser = HfArgumentParser(
        Flags, description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = stop  # argparse would print the whole usage
    try:
        (flags,) = parser.parse_args_into_dataclasses()
    except ValueError as error:
        unknown = one_line(error).split(":", 1)[-1].strip(" []").replace("'", "")
        stop(f"unknown flag {unknown}; see python train_demo.py --help")
    for name in ("tokens_per_category", "epochs", "learning_rate", "batch_size"):
        if not 0 < getattr(flags, name) < math.inf:
            stop(f"--{name} is {getattr(flags, name)}; it must be above 0")
    if not 0 <= flags.kd_weight < math.inf:
        stop(f"--kd_weight is {flags.kd_weight}; it must be 0 or more")
    for path in filter(os.path.isdir, (flags.tokens, flags.chat)):
        stop(f"{path} is a folder; name the tokens.safetensors in it")
    if flags.add and not flags.tokens:
        stop("--add grows a saved table; name it with --tokens")
    taken = os.path.exists(flags.export) or (
        os.path.realpath(flags.export) == os.path.realpath(flags.output))
    if flags.export and taken:
        stop(f"--export {flags.export} exists already; name a folder that does not")
    if not 0 <= flags.later_turns <= 1:
        stop(f"--later_turns is {flags.later_turns}; it must lie in 0..1")
    if not 0 <= flags.seed < 2**32:
        stop(f"--seed is {flags.seed}; it must lie in 0..{2**32 - 1}")
    if flags.device not in ("", "cpu", "cuda"):
        stop(f"--device is {flags.device!r}; it must be cpu or cuda")
    if flags.device == "cuda" and not torch.cuda.is_available():
        stop("--device is cuda, but torch sees no CUDA GPU; use --device cpu")
    place = Path(flags.output).absolute()  # asked now: later, a training would be lost
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        stop(f"--output {flags.output} cannot be written; name a folder that can")
    return flags


def write_results(
    output: str, learned: bool, results: dict, shown: dict
) -> None:
    """results.json and report.html beside a new table, each whole or not at all."""
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    if learned:
        (folder / "training.pt").unlink(missing_ok=True)
    written = {"results.json": json.dumps(results, indent=2) + "\n",
               "report.html": report(results, shown)}
    for name, text in written.items():
        with mosaic.beside(folder / name) as part:
            Path(part).write_text(text, encoding="utf-8")
    saved = ["tokens.safetensors"] * learned + [*written]
    print(f"\nwritten to {folder}: {', '.join(saved)}")


def report(results: dict, shown: dict[str, list[str]]) -> str:
    """One page of HTML with nothing from elsewhere: figures, answers, settings."""
    names = {"dsr": "DSR (up)", "over_refusal": "OR (down)",
             "near_miss": "near-miss OR (down)"}
    rows = {}
    methods = {"MOSAIC": results["orders"], "instruction": results["instruction"]}
    for method, cell in ((m, cell) for m, cells in methods.items() for cell in cells):
        row = rows[f"{method}, order {cell['order']}"] = {}
        for key, name in names.items():
            n, rate, *ends = (cell[key][one] for one in ("n", "rate", "low", "high"))
            row[name] = 100 * rate if n else math.nan
            row[f"95%, n of {name}"] = "{:.1f} to {:.1f}, ".format(
                *(100 * end for end in ends)) + str(n)
    figures = pandas.DataFrame(rows).T.style.format(precision=1, na_rep="-")
    for name, color in zip(names.values(), ("#4a90d9aa", "#d9534faa", "#e09f3eaa")):
        figures.bar(subset=[name], vmin=0, vmax=100, color=color)
    columns = ["no policy", "its own", "another's", "all"]
    answers = pandas.DataFrame(list(shown.values()), list(shown), columns)
    settings = pandas.DataFrame({"value": results["config"]})
    with pandas.option_context("display.max_colwidth", None):
        return PAGE.format(
            model=html.escape(results["model"]), figures=figures.to_html(),
            answers=answers.to_html(border=0), settings=settings.to_html(border=0))


def one_line(message: object) -> str:
    return " ".join(str(message).split())[:400] or type(message).__name__


def stop(message: str) -> None:
    """A user's mistake: one line, exit code 2."""
    print(f"train_demo.py: {one_line(message)}", file=sys.stderr)
    raise SystemExit(2)


def run() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sys.stdout.reconfigure(errors="replace")  # a console may not know every character
    try:
        main()
    except (ValueError, OSError) as error:
        stop(str(error))
    except RuntimeError as error:
        if not re.search("out of|allocate memory", str(error)):  # on CUDA, on a CPU
            raise
        stop(f"{one_line(error)[:80]}: lower --batch_size or take a smaller --model")
    except KeyboardInterrupt:
        stop("stopped; the same command goes on after the last whole epoch")


if __name__ == "__main__":
    run()
