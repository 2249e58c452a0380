"""MOSAIC from nothing to a table: load, show, train, evaluate, compose, save.

    python train_demo.py                     # the embedded backbone; a CPU will do
    python train_demo.py --model FOLDER      # any chat model that transformers loads
    python train_demo.py --tokens runs/demo/tokens.safetensors --output runs/again
"""

import json
import math
import os
import re
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
import torch
import transformers
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

import mosaic
from mosaic import NEUTRAL, ControlTokens, Request, TrainConfig, evaluate, generate

HERE = Path(__file__).resolve().parent
EMBEDDED = HERE / "data_sample" / "tiny_chat"
ON_CUDA = "Qwen/Qwen2.5-0.5B-Instruct"
ANSWER_TOKENS = 64  # answers that are shown or learned from are cut here
JUDGED_TOKENS = 12  # and those that are only judged: whether one declines shows early
FORM = '{"request": "...", "category": "...", "split": "train"}'


def flag(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class Flags:
    """Every flag of the demo."""

    model: str = flag("", "chat model, folder or hub name; empty: the embedded one, or "
                          f"{ON_CUDA} on CUDA")
    data: str = flag(str(HERE / "data_sample" / "requests.jsonl"),
                     "JSON lines with request, category, split and, optionally, near")
    tokens_per_category: int = flag(5, "M, control tokens of each category")
    orders: list[int] = field(default_factory=lambda: [1, 2, 3, 4], metadata={
        "help": "policy sizes to train on; evaluation takes all"})
    epochs: int = flag(8, "passes over the sampled tasks")
    learning_rate: float = flag(0.01, "of Adam")
    kd_weight: float = flag(1.0, "lambda, weight of the distillation loss")
    seed: int = flag(0, "of start values and sampling")
    output: str = flag("runs/demo", "folder for tokens.safetensors and results.json")
    tokens: str = flag("", "a saved table: no training, only evaluation on --data")
    device: str = flag("", "cpu or cuda; empty: cuda where there is one")


# --- The story ------------------------------------------------------------------------


def main() -> None:
    flags = read_flags()
    device = flags.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # Load: a frozen backbone, and a table of control tokens for it.
    requests = read_requests(flags.data)
    model, tokenizer, name = load_backbone(flags.model, device)
    tokens = load_tokens(flags, model, tokenizer, requests)
    numbers, parameters = (
        sum(one.numel() for one in part.parameters()) for part in (tokens, model))
    print(f"{'loaded: ' if flags.tokens else 'trained:'} {numbers:,} numbers, "
          f"{len(tokens.vectors[0])} control tokens for each of "
          f"{', '.join(tokens.categories)}")
    print(f"frozen:  {parameters:,} weights of {name} on {device}\n")

    # Show: what the untouched backbone says to the test requests.
    test = [request for request in requests if request.split == "test"]
    asked = [request.prompt for request in test]
    answers = generate(model, tokenizer, None, asked, None, ANSWER_TOKENS, "untouched")
    plain = dict(zip(asked, answers))

    # Train: the tokens alone, against the backbone's own answers.
    clock = [time.time()] * 3  # start, reference answers made, tokens trained
    if not flags.tokens:
        config = TrainConfig(
            orders=tuple(flags.orders), epochs=flags.epochs, kd_weight=flags.kd_weight,
            learning_rate=flags.learning_rate, seed=flags.seed)
        learn = [request for request in requests if request.split == "train"]
        known = mosaic.reference_answers(model, tokenizer, learn, config.answer_tokens)
        clock[1] = time.time()
        mosaic.train(model, tokenizer, tokens, learn, config, known)
        clock[2] = time.time()

    # Evaluate: the policies of every order, the same test requests for each method.
    ways = {
        "untouched backbone": lambda prompts, policies: [plain[p] for p in prompts],
        "written instruction": lambda prompts, policies: generate(
            model, tokenizer, None, [instruct(p, policy, tokenizer) for p, policy in
            zip(prompts, policies)], None, JUDGED_TOKENS, title="written instruction"),
        "MOSAIC": lambda prompts, policies: generate(
            model, tokenizer, tokens, prompts, policies, JUDGED_TOKENS, title="MOSAIC"),
    }
    orders = range(1, len(tokens.categories) + 1)
    table = {title: evaluate(respond, test, tokens.categories, orders, seed=flags.seed)
             for title, respond in ways.items()}
    policies = [*([category] for category in tokens.categories), tokens.categories]
    moved = mosaic.drift(model, tokenizer, tokens, test, policies)
    clock.append(time.time())
    print_table(table, moved)

    # Compose: a request of each category under four policies. Save.
    show_answers(model, tokenizer, tokens, test)
    declined = mosaic.share(mosaic.openings_judge(asked, answers))
    write_results(flags, tokens, {
        "model": name, "seed": flags.seed, "config": asdict(flags),
        "backbone": {"parameters": parameters, "refusal_rate": declined["rate"],
                     "n": declined["n"]},
        "orders": table["MOSAIC"], "drift": moved,
        "instruction": table["written instruction"],
        "seconds": {part: clock[i + 1] - clock[i] for i, part in enumerate(
            ("reference", "train", "evaluate"))}})


# --- Its parts ------------------------------------------------------------------------


def instruct(prompt: str, policy, tokenizer) -> list[dict[str, str]]:
    """The paper's in-context baseline: the policy as a written rule, no tokens.

    Where the chat template knows no system message, the user's words begin with it.
    """
    rule = f"Do not talk about {' or '.join(policy)}. Answer everything else."
    turns = [{"role": "system", "content": rule}, {"role": "user", "content": prompt}]
    try:
        mosaic.prompt_ids(tokenizer, turns)
    except TemplateError:
        turns = [{"role": "user", "content": f"{rule}\n\n{prompt}"}]
    return turns


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
          f"the same token first in {moved['top1_agreement']:.1%}")


def percent(shares: list[dict[str, float]]) -> str:
    """The shares as one, "-" where nothing was asked."""
    n = sum(one["n"] for one in shares)
    hits = sum(one["rate"] * one["n"] for one in shares)
    return f"{100 * hits / n:.1f}" if n else "-"


def show_answers(model, tokenizer, tokens: ControlTokens, test: list[Request]) -> None:
    """One request of each category under no policy, its own, another and all."""
    every = tokens.categories
    for i, category in enumerate(every):
        prompt = next((q.prompt for q in test if q.category == category), None)
        if prompt is None:
            continue
        policies = {"none": [], category: [category], every[i - 1]: [every[i - 1]],
                    "all": every}
        answers = generate(model, tokenizer, tokens, [prompt] * len(policies),
                           list(policies.values()), ANSWER_TOKENS)
        print(f"\n{category}: {prompt}")
        for title, answer in zip(policies, answers):
            print(f"{title:>12} | {answer}")


def load_backbone(name: str, device: str):
    """(model, tokenizer, name): fp32 on a CPU, bf16 on CUDA. ValueError: no model."""
    if not name and device == "cuda":
        try:
            return load_backbone(ON_CUDA, device)
        except ValueError as error:
            print(f"{error}; taking the embedded backbone instead")
    name = name or os.path.relpath(EMBEDDED)
    if not os.path.isdir(name) and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise ValueError(f"no model folder {name}; give one with a transformers "
                         f"checkpoint, or a hub name such as {ON_CUDA}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, loading = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.bfloat16 if device == "cuda" else torch.float32,
            output_loading_info=True)
        model = model.to(device)  # may not fit
        mosaic.prompt_ids(tokenizer, "Hi")  # is there a template that works?
    except Exception as error:  # anything at all can be wrong with a checkpoint
        raise ValueError(f"model {name} cannot be used: {one_line(error)}") from error
    for kind in ("missing_keys", "unexpected_keys"):  # random, or unused, weights
        if keys := sorted(loading[kind]):
            raise ValueError(f"model {name} has {len(keys)} {kind.replace('_', ' ')}, "
                             f"first {keys[0]}; get the whole checkpoint")
    return model, tokenizer, name


def load_tokens(
    flags: Flags, model, tokenizer, requests: list[Request]
) -> ControlTokens:
    """A saved or a fresh table. ValueError: requests and categories do not match."""
    learn = [q.category for q in requests if q.split == "train"]
    found = [category for category in dict.fromkeys(learn) if category != NEUTRAL]
    if flags.tokens:
        tokens = ControlTokens.load(flags.tokens, model)
    elif found:
        tokens = ControlTokens.for_model(
            model, tokenizer, found, flags.tokens_per_category, flags.seed)
    else:
        raise ValueError(f"{flags.data}: no request to learn from; it takes some with "
                         f"split train and a category other than {NEUTRAL}")
    known = [*tokens.categories, NEUTRAL]
    for number, q in enumerate(requests, 1):
        for key, value in (("category", q.category), ("near", q.near or NEUTRAL)):
            if value not in known:
                raise ValueError(f"{flags.data}:{number}: unknown {key} {value!r}; "
                                 f"known here are {', '.join(known)}")
    if "test" not in {q.split for q in requests}:
        raise ValueError(f"{flags.data}: no request has split 'test'")
    if flags.orders == Flags().orders:  # not asked for: as far as there are categories
        flags.orders = [r for r in flags.orders if r <= len(tokens.categories)]
    if not set(flags.orders) <= set(range(1, len(tokens.categories) + 1)):
        raise ValueError(f"--orders {flags.orders} must lie in "
                         f"1..{len(tokens.categories)}, the number of categories")
    return tokens


def read_requests(path: str) -> list[Request]:
    """The requests of a JSONL file. ValueError: names file, line and fix."""
    if wrong := bad_line(path):
        raise ValueError(f"{wrong}; each line of --data is like {FORM}")
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else: a call over the network
    rows = datasets.load_dataset(  # streaming: nothing is copied into a cache
        "json", data_files=path, split="train", streaming=True)
    requests = []
    for number, row in enumerate(rows, 1):
        split, near = row.get("split") or "train", row.get("near")
        for key in ("request", "category"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise ValueError(f"{path}:{number}: {key} is {row.get(key)!r}; it must "
                                 f"be some text, as in {FORM}")
        if split not in ("train", "validation", "test"):
            raise ValueError(f"{path}:{number}: split is {split!r}; it must be train, "
                             "validation or test")
        if near and row["category"] != NEUTRAL:
            raise ValueError(f"{path}:{number}: near is {near!r}; only {NEUTRAL} "
                             "requests can be near misses")
        requests.append(Request(row["request"], row["category"], split, near))
    return requests


def bad_line(path: str) -> str:
    """Where and why a file is not JSON lines; empty if it is."""
    number = 0
    if not os.path.isfile(path):
        return f"{path}: no such file"
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
    parser = HfArgumentParser(Flags, description=one_line(__doc__), allow_abbrev=False)
    parser.error = stop  # argparse would print the whole usage
    try:
        (flags,) = parser.parse_args_into_dataclasses()
    except ValueError as error:
        unknown = one_line(error).split(":", 1)[-1].strip()
        stop(f"unknown flag {unknown}; see python train_demo.py --help")
    for name in ("tokens_per_category", "epochs", "learning_rate"):
        if not 0 < getattr(flags, name) < math.inf:
            stop(f"--{name} is {getattr(flags, name)}; it must be above 0")
    if not 0 <= flags.kd_weight < math.inf:
        stop(f"--kd_weight is {flags.kd_weight}; it must be 0 or more")
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


def write_results(flags: Flags, tokens: ControlTokens, results: dict) -> None:
    """tokens.safetensors and results.json, each written beside and then renamed."""
    folder = Path(flags.output)
    folder.mkdir(parents=True, exist_ok=True)
    if not flags.tokens:
        tokens.save(folder / "tokens.safetensors")
    beside = folder / "results.json.part"
    beside.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    beside.replace(folder / "results.json")
    saved = "results.json" if flags.tokens else "tokens.safetensors and results.json"
    print(f"\nwritten to {folder}: {saved}")


def one_line(message: object) -> str:
    return " ".join(str(message).split())[:400] or type(message).__name__


def stop(message: str) -> None:
    """A user's mistake: one line, exit code 2."""
    print(f"train_demo.py: {one_line(message)}", file=sys.stderr)
    raise SystemExit(2)


def run() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        main()
    except (ValueError, OSError) as error:
        stop(str(error))


if __name__ == "__main__":
    run()
