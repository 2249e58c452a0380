"""MOSAIC from nothing to a table: load, show, train, evaluate, compose, save.

    python train_demo.py                     # the embedded backbone; a CPU will do
    python train_demo.py --model FOLDER      # any chat model; also a GGUF file
    python train_demo.py --data FILE.csv     # your own categories
    python train_demo.py --tokens runs/demo/tokens.safetensors --output runs/again
    python train_demo.py --chat runs/demo/tokens.safetensors
"""

import argparse
import contextlib
import csv
import glob
import html
import importlib.util
import itertools
import json
import os
import re
import sys
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path

import datasets
import torch
import transformers
from huggingface_hub import (
    get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
)
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import mosaic
from mosaic import (
    NEUTRAL, ControlTokens, Request, TrainConfig, evaluate, generate, is_refusal
)

HERE = Path(__file__).resolve().parent
EMBEDDED = HERE / "data_sample" / "tiny_chat"
REQUESTS = HERE / "data_sample" / "requests.jsonl"
SUMMARIES = HERE / "data_sample" / "summaries.json"
ON_CUDA = "Qwen/Qwen2.5-0.5B-Instruct"
CUDA_DEFAULTS = {"batch_size": 64, "epochs": 32}  # what real models want
QWEN_RATE = 2.0  # in TrainConfig's units: tried on Qwen2.5-Coder-0.5B
SPLITS = "train", "validation", "test"
SPLIT_NAMES = {"val": "validation", "valid": "validation", "dev": "validation",
               **{split: split for split in SPLITS}}
ROLES = ("system", "user", "assistant")
FORM = '{"request": "...", "category": "...", "split": "train"}'
LISTED = r"""\[\s*{\s*["'](role|content)["']"""  # messages that were saved as text
JUDGED_TOKENS = 16  # of an answer: whether it declines shows early
SHOWN_TOKENS = 64
TITLES = {"instruction": "written instruction", "orders": "MOSAIC"}
TALK_TOKENS = 256


# --- The story ------------------------------------------------------------------------


def main() -> None:
    flags, config = read_flags()
    if flags.chat:
        return chat(flags.chat, *load_backbone(flags.model, flags.device)[:2])

    # Load: a frozen backbone, labelled requests, and a table of control tokens.
    requests = read_requests(flags.data, flags.request_column, flags.category_column)
    summaries = read_summaries(flags.summaries)
    model, tokenizer, name = load_backbone(flags.model, flags.device)
    tokens = load_tokens(flags, model, tokenizer, requests)
    check_fit(flags, config, model, tokenizer, tokens, requests)
    say_what_learns(requests, tokens, model, f"{name} on {flags.device}")

    # Show: what the untouched backbone declines by itself is not ours to judge.
    test = [request for request in requests if request.split == "test"]
    untouched = mosaic.reference_answers(model, tokenizer, test, JUDGED_TOKENS)
    refusal = tokens.made_for["refusal"]
    asked = [q for q, own in zip(test, untouched) if not is_refusal(own.text, refusal)]
    declined = {"requests": len(test) - len(asked), "of": len(test)}
    print("the backbone declines {requests} of {of} test requests by itself: left out "
          "of all figures\n".format(**declined))

    # Train: the tokens alone, against the backbone's own answers.
    started = time.time()
    learns, folder = bool(tokens.trainable), Path(flags.output)
    if learns:
        folder.mkdir(parents=True, exist_ok=True)
        mosaic.train(model, tokenizer, tokens, requests, config,
                     checkpoint=str(folder / "training.pt"))
        tokens.save(str(folder / "tokens.safetensors"))  # whatever comes after
    trained = time.time()

    # Evaluate: policies of every order, the same requests, by a rule and by tokens.
    figures = measure(model, tokenizer, tokens, asked, summaries)
    print_figures(figures)
    seconds = {"train": trained - started, "evaluate": time.time() - trained}

    # Compose: a request of each category under four policies. Save, export.
    shown = show_answers(model, tokenizer, tokens, asked)
    results = {"model": name, "settings": vars(flags) | asdict(config),
               "seconds": seconds, "backbone_declines": declined, **figures}
    write_results(folder, results, shown)
    if learns:
        (folder / "training.pt").unlink()
    if flags.export:
        mosaic.export_checkpoint(model, tokenizer, tokens, flags.export)
        print(f"exported to {flags.export}, read back and compared")


# --- Its parts ------------------------------------------------------------------------


def say_what_learns(requests, tokens: ControlTokens, model, where: str) -> None:
    """What was read, what will be trained, and what stays as it is."""
    counts = Counter((q.category, q.split) for q in requests)
    names = dict.fromkeys(q.category for q in requests)
    rows = (f"{name} " + "/".join(str(counts[name, split]) for split in SPLITS)
            for name in names)
    print(f"read:    {len(requests):,} requests, {'/'.join(SPLITS)}: {', '.join(rows)}")
    numbers = sum(v.numel() for v in tokens.parameters() if v.requires_grad)
    learn = ", ".join(tokens.trainable)
    print(f"trained: {numbers:,} numbers, {len(tokens.vectors[0])} control tokens for "
          f"each of {learn}" if learn else "trained: nothing")
    kept = ", ".join(name for name in tokens.categories if name not in tokens.trainable)
    weights = sum(weight.numel() for weight in model.parameters())
    kept = f"the tokens of {kept}; " if kept else ""
    print(f"frozen:  {kept}{weights:,} weights of {where}")


def instruct(prompt, policy, summaries: dict[str, str], tokenizer) -> list[dict]:
    """The paper's in-context baseline: the policy as a written rule, no tokens.

    A sentence for each category; in a system message or, where the chat template knows
    none (Gemma's), before the user's words.
    """
    rules = " ".join(f"- {summaries.get(name, name)}" for name in policy)
    rule = (f"Decline requests on any of these subjects: {rules} "
            f'Then say only "{mosaic.REFUSAL}" Answer everything else as usual.')
    messages = mosaic.as_messages(prompt)
    ruled = [{"role": "system", "content": rule}, *messages]
    with contextlib.suppress(TemplateError):
        if rule in mosaic.render(tokenizer, ruled):  # some leave it out in silence
            return ruled
    first = messages[0] | {"content": f"{rule}\n\n{messages[0]['content']}"}
    return [first, *messages[1:]]


def measure(model, tokenizer, tokens, requests, summaries) -> dict[str, list[dict]]:
    """Figures of every order, for each of TITLES."""

    def by_tokens(prompts, policies):
        return generate(model, tokenizer, tokens, prompts, policies, JUDGED_TOKENS,
                        title="MOSAIC")

    def by_instruction(prompts, policies):
        pairs = zip(prompts, policies)
        ruled = [instruct(prompt, s, summaries, tokenizer) for prompt, s in pairs]
        return generate(model, tokenizer, None, ruled, None, JUDGED_TOKENS,
                        title="written instruction")

    def judge(prompt, answer):
        return is_refusal(answer, tokens.made_for["refusal"])

    def by_order(respond):
        every, cells = tokens.categories, []
        for order in range(1, len(every) + 1):
            most = len(every) if order == 1 else 2  # policies of an order
            cells += evaluate(respond, requests, every, [order], most, judge=judge)
        return cells

    return {"instruction": by_order(by_instruction), "orders": by_order(by_tokens)}


def print_figures(figures: dict[str, list[dict]]) -> None:
    """DSR, OR and near-miss OR per order, in percent."""
    print("\ntest split, percent: DSR (up) / OR (down) / near-miss OR (down)")
    for key, title in TITLES.items():
        print(title)
        for cell in figures[key]:
            print(f"  order {cell['order']}  " + " / ".join(percents(cell)))


def percents(cell: dict) -> list[str]:
    """Its three shares with their 95% intervals, "-" where nothing was asked."""
    texts = []
    for share in cell["dsr"], cell["over_refusal"], cell["near_miss"]:
        rate, low, high = (100 * share[key] for key in ("rate", "low", "high"))
        texts.append(f"{rate:5.1f} [{low:.1f}, {high:.1f}]" if share["n"] else "-")
    return texts


def show_answers(model, tokenizer, tokens, requests) -> list[tuple[str, str, str]]:
    """One request of each category under no policy, its own, another and all."""
    every, shown = tokens.categories, []
    for i, category in enumerate(every):
        prompt = next((q.prompt for q in requests if q.category == category), None)
        if prompt is None:
            continue
        policies = [], [category], [every[i - 1]], every
        answers = generate(
            model, tokenizer, tokens, [prompt] * 4, policies, SHOWN_TOKENS)
        title = f"{category}: {mosaic.last_words(prompt)}"
        print(f"\n{title}")
        for name, answer in zip(("none", category, every[i - 1], "all"), answers):
            print(f"{name:>12} | {' '.join(answer.split())}")
            shown.append((title, name, answer))
            title = ""  # the report has it once
    return shown


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
                (answer,) = generate(model, tokenizer, tokens, [turns], [policy],
                                     TALK_TOKENS, streamer=streamer)
            except KeyboardInterrupt:  # enough of this answer
                answer = "..."
                print()
            turns.append({"role": "assistant", "content": answer})


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>MOSAIC</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root {{ color-scheme: light dark; font: 16px/1.4 system-ui, sans-serif }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }}
th, td {{ padding: .3rem .7rem; text-align: left; border-bottom: 1px solid #8886 }}
</style></head><body><h1>MOSAIC on {model}</h1>
<h2>Requests declined, test split, percent [95%]</h2><table>{figures}</table>
<h2>One request of each category under four policies</h2><table>{answers}</table>
<h2>Settings</h2><table>{settings}</table></body></html>
"""


def write_results(folder: Path, results: dict, shown: list) -> None:
    """results.json and report.html, each whole or not at all."""

    def rows(lines) -> str:
        cells = ([html.escape(str(cell)) for cell in line] for line in lines)
        return "\n".join(f"<tr><td>{'<td>'.join(line)}" for line in cells)

    figures = [["", "DSR (up)", "OR (down)", "near-miss OR (down)"]] + [
        [f"{title}, order {cell['order']}", *percents(cell)]
        for key, title in TITLES.items() for cell in results[key]]
    page = PAGE.format(model=html.escape(results["model"]), figures=rows(figures),
                       answers=rows(shown), settings=rows(results["settings"].items()))
    folder.mkdir(parents=True, exist_ok=True)
    written = {"results.json": json.dumps(results, indent=2) + "\n",
               "report.html": page}
    for name, text in written.items():
        with mosaic.beside(str(folder / name)) as part:
            Path(part).write_text(text, encoding="utf-8")
    print(f"\nwritten to {folder}: {', '.join(written)}")


# --- What a user brings ---------------------------------------------------------------


def load_backbone(name: str, device: str):
    """(model, tokenizer, name): fp32 on a CPU, bf16 on CUDA. ValueError: no model.

    `name` is a folder, a GGUF file, a LoRA adapter's folder, or a name of the hub.
    """
    if not name and device == "cuda":
        try:
            return load_backbone(ON_CUDA, device)
        except ValueError as error:
            print(f"{error}; taking the embedded backbone instead")
    name = name or os.path.relpath(EMBEDDED)
    source, options = find_model(name)
    options["trust_remote_code"] = False  # else transformers asks, and runs it on a "y"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    try:
        if not (os.path.isdir(source) or try_to_load_from_cache(source, "config.json")):
            get_hf_file_metadata(hf_hub_url(source, "config.json"))  # one try, not 19
        if os.path.isfile(f"{source}/adapter_config.json"):
            from peft import AutoPeftModelForCausalLM

            adapted = AutoPeftModelForCausalLM.from_pretrained(
                source, dtype=dtype, **options)
            model, loading = adapted.merge_and_unload(), {}
            if not os.path.isfile(f"{source}/tokenizer_config.json"):  # it adds none
                source = model.config._name_or_path
        else:
            model, loading = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, output_loading_info=True,
                ignore_mismatched_sizes=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = model.to(device)  # may not fit
        mosaic.prompt_ids(tokenizer, "Hi", place=True)  # does its template work?
        mosaic.check_backbone(model)
    except Exception as error:  # anything at all can be wrong with a checkpoint
        why = one_line(error)
        if "trust_remote_code" in str(error):
            why = "it needs code of its own to be run (trust_remote_code); take another"
        raise ValueError(f"model {name} cannot be used: {why}") from error
    for key, found, wanted in loading.get("mismatched_keys", ()):
        raise ValueError(f"model {name}: {key} is {[*found]}, its config says "
                         f"{[*wanted]}; get the whole checkpoint")
    if keys := sorted(loading.get("missing_keys", ())):  # they would be random
        raise ValueError(f"model {name} has {len(keys)} missing keys, first {keys[0]}; "
                         "get the whole checkpoint")
    if keys := sorted(loading.get("unexpected_keys", ())):
        print(f"model {name} has {len(keys)} weights that go unused, first {keys[0]}")
    return model, tokenizer, name


def find_model(name: str) -> tuple[str, dict]:
    """(what from_pretrained takes, its options). ValueError: nothing is there."""
    path = Path(name)
    if path.is_dir() and not (path / "config.json").exists():
        found = sorted(path.glob("*.gguf"))
        several = ", ".join(map(str, found))
        refuse(len(found) > 1, f"several GGUF files; name one of {several}")
        path = found[0] if found else path
    if path.suffix.lower() == ".gguf":
        refuse(not path.is_file(), f"no file {name}")
        needed = [p for p in ("gguf", "accelerate") if not importlib.util.find_spec(p)]
        refuse(needed, f"to read {name}: pip install {' '.join(needed)}")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        adapter = (path / "adapter_config.json").is_file()
        refuse(adapter and not importlib.util.find_spec("peft"),
               f"{name} is an adapter: pip install peft, or merge it")
        return name, {}
    is_hub = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name)
    refuse(path.exists() or path.is_absolute() or not is_hub,
           f"no model folder {name}; give one with a transformers checkpoint, or a hub "
           f"name such as {ON_CUDA}")
    return name, {}


def room_for_prompt(model, tokens: ControlTokens, answer: int) -> int:
    """How many tokens fit the model beside all control tokens and an answer."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", 10**9)
    return longest - sum(map(len, tokens.vectors)) - answer


def load_tokens(flags, model, tokenizer, requests: list[Request]) -> ControlTokens:
    """A saved table, grown by --add, or a fresh one. ValueError: it does not fit."""
    learn = [q for q in requests if q.split == "train" and not q.near]
    if flags.tokens:
        tokens = ControlTokens.load(flags.tokens, model)
        tokens.freeze(tokens.categories)
        tokens.add(model, tokenizer, flags.add, requests=learn, seed=flags.seed)
        return tokens
    found = [c for c in dict.fromkeys(q.category for q in learn) if c != NEUTRAL]
    refuse(not found, f"{flags.data}: no request to learn from; it takes some with "
           f"split train and a category other than {NEUTRAL}")
    return ControlTokens.for_model(
        model, tokenizer, found, flags.tokens_per_category, learn, seed=flags.seed)


def check_fit(flags, config, model, tokenizer, tokens, requests) -> None:
    """ValueError, before anything runs: requests, table and settings do not fit."""
    known = [*tokens.categories, NEUTRAL]
    for q in requests:
        for key, value in (("category", q.category), ("near", q.near or NEUTRAL)):
            if value not in known:
                raise ValueError(f"{at(flags, q)}: unknown {key} {value!r}; known here "
                                 f"are {', '.join(known)}")
    learn = {q.category for q in requests if q.split == "train" and not q.near}
    for name in known if tokens.trainable else ():
        refuse(name not in learn, f"{flags.data}: no training request of {name}; it "
               f"takes some of each category, and {NEUTRAL} ones such as those in "
               "data_sample/requests.jsonl")
    refuse("test" not in {q.split for q in requests},
           f"{flags.data}: no request has split 'test'; take more rows")
    k, orders = len(tokens.categories), config.orders or ()
    refuse(not {*orders} <= {*range(1, k + 1)},
           f"--orders {[*orders]} must lie in 1..{k}, the number of categories")
    mosaic.refusal_ids(model, tokenizer, tokens.made_for["refusal"])  # can it end?
    room = room_for_prompt(model, tokens, max(SHOWN_TOKENS, config.answer_tokens))
    for q in requests:
        try:
            length = len(mosaic.prompt_ids(tokenizer, q.prompt))
            refuse(length > room, f"a request of {length} tokens; beside control "
                   f"tokens and answer {room} fit the model")
        except (ValueError, TemplateError) as error:  # a role that the template lacks
            raise ValueError(f"{at(flags, q)}: {error}") from error


def read_summaries(path: str) -> dict[str, str]:
    """{category: what it covers, in a sentence}, for the written instruction."""
    try:
        found = json.loads("".join(read_lines(path)))
    except json.JSONDecodeError:
        found = None
    refuse(not isinstance(found, dict) or {*map(type, found.values())} - {str},
           f'{path}: it must be JSON like {{"alcohol": "Drinks with alcohol."}}')
    return found


# --- Data of one's own ----------------------------------------------------------------


def read_requests(
    path: str, request: str = "request", category: str = "category"
) -> list[Request]:
    """The requests of a file or hub dataset. ValueError: names file, line and fix.

    A request is a text or, outside CSV, a list of chat messages. An assistant's message
    at the end of a list, the answer in data sets for TRL, is left out. Where no row has
    a split a hash of the text gives each its own, 60 / 20 / 20: the same in every file,
    so that a table that grows is not tested on what it has learned.
    """
    return [*placed_requests(path, request, category).values()]


def at(flags, request: Request) -> str:
    """Where a request stands. Reads the data again, as only a mistake asks."""
    columns = flags.request_column, flags.category_column
    places = placed_requests(flags.data, *columns).items()
    return next((here for here, one in places if one == request), flags.data)


def refuse(wrong: object, message: str) -> None:
    """ValueError with this message where something is wrong."""
    if wrong:
        raise ValueError(message)


def placed_requests(path: str, request: str, category: str) -> dict[str, Request]:
    """{place: request}, each request at the first place where it stands."""
    seen, spelled, filled, count = {}, {}, {}, 0
    for count, (here, row) in enumerate(read_rows(path), 1):
        if count == 1:
            request = request_column(path, row, request, category)
        try:
            one = read_request(row, request, category)
            filled.setdefault(cell(row, "split") is not None, here)
            refuse(len(filled) == 2, f"split is {row.get('split')!r}, other than in "
                   f"{[*filled.values()][0]}; fill it in every row or in none")
            for name in filter(None, (one.category, one.near)):
                there, known = spelled.setdefault(spelling(name), (here, name))
                refuse(name != known, f"category {name!r}, but {known!r} in {there}; "
                       "choose one spelling")
            there, same = seen.setdefault(text_of(one.prompt), (here, one))
            refuse(one.split != same.split, f"the request of {there} again; take one "
                   "out, or the test split would leak")
            refuse((one.category, one.near) != (same.category, same.near),
                   f"the request of {there} again, with another category or near; keep "
                   "the row that is right")
        except ValueError as error:
            raise ValueError(f"{here}: {error}") from None
    refuse(not seen, f"{path}: the file is empty (no rows); one is like {FORM}")
    if repeats := count - len(seen):
        print(f"{path}: repeated rows (request, category, split) merged: {repeats:,}")
    return dict(seen.values())


def request_column(path: str, row: dict, request: str, category: str) -> str:
    """The column with the requests: `messages` where there is no `request`."""
    if request == "request" and "request" not in row and "messages" in row:
        request = "messages"
    for name in (request, category):
        refuse(name not in row, f"{path}: no column {name!r}, only {', '.join(row)}; "
               "name yours with --request_column and --category_column")
    for name in row:  # else it would go unread
        refuse(name != name.lower() in ("split", "near"),
               f"{path}: column {name!r}; write {name.lower()!r}")
    return request


def read_request(row: dict, request: str, category: str) -> Request:
    """The request of a row. ValueError: what is wrong with it."""
    prompt, kind = row.get(request), row.get(category)
    if isinstance(prompt, list):
        prompt = read_messages(request, prompt)
    elif not isinstance(prompt, str) or re.match(LISTED, prompt) or not prompt.strip():
        raise ValueError(f"{request} is {prompt!r:.80}; it must be some text, as in "
                         f"{FORM}, or a list of messages, which CSV cannot hold")
    refuse(not isinstance(kind, str) or re.fullmatch(r"\s*([-+]?[\d.,]+)?\s*", kind),
           f"{category} is {kind!r:.80}; it must be some text, the name of a category "
           f"in words, as in {FORM}")
    kind, split, near = kind.strip(), cell(row, "split"), cell(row, "near")
    refuse(kind.lower() == NEUTRAL != kind, f"category {kind!r}; write {NEUTRAL} for "
           "harmless requests, or name the category otherwise")
    refuse(near and (kind != NEUTRAL or str(near).lower() == NEUTRAL),
           f"near is {near!r}; only {NEUTRAL} requests can be near misses, of others")
    refuse(not isinstance(near, str | None), f"near is {near!r}; name a category")
    refuse(split is not None and str(split) not in SPLIT_NAMES,
           f"split is {split!r}; it must be train, validation or test")
    fifth = zlib.crc32(text_of(prompt).encode()) % 5
    return Request(
        prompt, kind, SPLIT_NAMES.get(split, SPLITS[max(0, fifth - 2)]), near)


def read_messages(column: str, turns: list) -> list[dict[str, str]]:
    """Chat messages up to the last of the user, without an answer to it."""
    for turn in turns:
        known = isinstance(turn, dict) and turn.get("role") in ROLES
        refuse(not known or not isinstance(turn.get("content"), str),
               f'{column} holds {turn!r:.80}; a message is like {{"role": "user", '
               f'"content": "..."}}, its role one of {", ".join(ROLES)}')
    turns = [{key: turn[key] for key in ("role", "content")} for turn in turns]
    asked = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
    refuse(not asked or asked[-1]["role"] != "user" or not asked[-1]["content"].strip(),
           f"{column} must end with some text of the user's, or with one answer to it")
    return asked


def cell(row: dict, column: str) -> object:
    """What a cell that may be empty holds, without the blanks around; None: nothing."""
    value = row.get(column)
    return (value.strip() or None) if isinstance(value, str) else value


def text_of(prompt: str | list[dict[str, str]]) -> str:
    """What two prompts have in common that are the same to a reader."""
    turns = [prompt] if isinstance(prompt, str) else [q["content"] for q in prompt]
    return "\n".join(turns).strip().lower()


def spelling(category: str) -> str:
    """What two spellings of one category have in common."""
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", category)).casefold()


def read_rows(path: str) -> Iterator[tuple[str, dict]]:
    """(place, row) of a file or hub dataset. ValueError: there is none to read."""
    kinds = {".jsonl": json_rows, ".ndjson": json_rows, ".json": json_rows,
             ".csv": csv_rows, ".tsv": csv_rows, ".parquet": typed_rows}
    name, ending = path.partition(":")[0], Path(path).suffix.lower()
    if os.path.isfile(path):
        refuse(ending not in kinds,
               f"{path}: unknown kind of file; known are {', '.join(kinds)}")
        return kinds[ending](path)
    refuse(os.path.isdir(name), f"{path}: no such file, but a folder; name one in it")
    is_hub = re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]+(:.+)?", path)
    refuse(not is_hub or re.search(r"\.[A-Za-z]{2,7}$", name),  # as files' names end
           f"{path}: no such file; name one, or a dataset of the hub")
    return typed_rows(path)


def read_lines(path: str) -> Iterator[str]:
    """The lines of a text file, with a newline at their ends, whatever the system."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            refuse(re.search("[\udc80-\udcff]", line),  # in place of a byte
                   f"{path}:{number}: not in UTF-8; save the file as UTF-8")
            yield line


def once(pairs: Iterable[tuple[str, object]], where: str = "") -> dict:
    """{name: value}. ValueError: a name is there twice, and one would go unread."""
    found = {}
    for name, value in pairs:
        refuse(name and name in found, f"{where}{name!r} is there twice; rename one")
        found[name] = value
    return found


def json_rows(path: str) -> Iterator[tuple[str, dict]]:
    """Objects, one a line or, in .json, all in one list."""
    whole = "".join(read_lines(path)) if path.lower().endswith(".json") else ""
    listed = whole.lstrip().startswith("[")
    for line, text in enumerate([whole] if listed else read_lines(path), 1):
        if not text.strip():
            continue
        try:
            found = json.loads(text.rstrip(), object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            line += getattr(error, "lineno", 1) - 1
            wrong = getattr(error, "msg", error)
            raise ValueError(f"{path}:{line}: not JSON ({wrong}); each line is like "
                             f"{FORM}, or all of a .json a list of such") from None
        for number, row in enumerate(found if listed else [found], 1):
            here = f"{path} row {number}" if listed else f"{path}:{line}"
            refuse(not row or not isinstance(row, dict),
                   f"{here}: not an object with fields, as in {FORM}")
            yield here, row


def csv_rows(path: str) -> Iterator[tuple[str, dict]]:
    """Rows of words between commas, semicolons (as Excel in Europe writes) or tabs."""
    lines = read_lines(path)
    header, columns, here = next(lines, ""), [], f"{path}:1"
    marks = "\t" if path.lower().endswith(".tsv") else ",;\t"
    mark = next((mark for mark in marks if mark in header), marks[0])
    rows = csv.reader(itertools.chain([header], lines), delimiter=mark, strict=True,
                      skipinitialspace=True)
    try:
        for cells in rows:
            if not columns:
                columns = [name.strip() for name in cells]
                once(zip(columns, cells), f"{here}: column ")
            elif any(cells):
                refuse(len(cells) != len(columns),
                       f"{here}: {len(cells)} cells, but {len(columns)} columns; put "
                       f'"quotes" around a cell with {mark!r} in it')
                yield here, dict(zip(columns, cells))
            here = f"{path}:{rows.line_num + 1}"  # a cell may hold several lines
    except csv.Error as error:
        raise ValueError(f'{here}: {error}; put "quotes" around the whole cell, and '
                         'write "" for each inside') from None


def typed_rows(path: str) -> Iterator[tuple[str, dict]]:
    """Rows of Parquet or of the hub (NAME or NAME:CONFIG), classes by their names."""
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else: a call over the network
    name, config = (path.split(":", 1) + [None])[:2]
    is_file = os.path.isfile(path)
    what = ("parquet", None, None, glob.escape(path)) if is_file else (name, config)
    try:  # streaming: nothing is copied into a cache
        parts = datasets.load_dataset(*what, streaming=True)
        for part, rows in parts.items():
            own = {"split": part} if len(parts) > 1 else {}
            if own and part not in SPLIT_NAMES:
                print(f"{path}: split {part} is left out; {', '.join(SPLITS)} are read")
                continue
            kinds = getattr(rows, "features", None) or {}
            classes = {column: dict(enumerate(kind.names)) for column, kind
                       in kinds.items() if isinstance(kind, datasets.ClassLabel)}
            for number, row in enumerate(rows, 1):
                named = {column: names.get(row[column], row[column])
                         for column, names in classes.items()}
                where = " ".join([path, *own.values(), f"row {number}"])
                yield where, row | named | own
    except Exception as error:  # as many kinds as there are readers
        hint = "" if is_file else f" (a config is named as in {name}:CONFIG)"
        raise ValueError(f"{path} cannot be read{hint}: {one_line(error)}") from error


# --- The command line -----------------------------------------------------------------


def read_flags() -> tuple[argparse.Namespace, TrainConfig]:
    """The command line: flags of the demo, and every knob of TrainConfig."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = stop  # argparse would print the whole usage
    add = parser.add_argument
    add("--model", default="", help="chat model: folder, GGUF file or hub name; empty: "
                                    f"the embedded one, or {ON_CUDA} on CUDA")
    add("--data", default=str(REQUESTS),
        help="requests: .jsonl, .json, .csv, .tsv or .parquet, or a dataset of the hub "
             "(name:config), with columns for request and category and, optionally, "
             "split (60/20/20 by a hash where there is none) and near")
    add("--request_column", default="request", help="the column with the requests")
    add("--category_column", default="category", help="the column with the categories")
    add("--summaries", default=str(SUMMARIES),
        help="JSON {category: sentence} for the written instruction; else the name")
    add("--tokens_per_category", type=int, default=20, help="M; the paper has 5")
    add("--output", default="runs/demo", help="folder for table, results and a report")
    add("--tokens", default="", help="a saved table: no training, only evaluation")
    add("--add", nargs="+", default=[],
        help="with --tokens: categories to train beside its own, which stay frozen")
    add("--export", default="", help="folder to be made: the backbone with the tokens "
                                     "in it, whose chat template takes a policy")
    add("--chat", default="", help="a saved table to talk under: nothing else is done")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda")
    for knob in fields(TrainConfig):
        if knob.name == "orders":
            add("--orders", type=int, nargs="+", help="sizes of policies; 1..min(K, 4)")
        else:
            add(f"--{knob.name}", type=type(knob.default), default=knob.default,
                help="see TrainConfig in mosaic.py")
    asked = parser.parse_known_args()[0]
    if asked.device == "cuda":
        parser.set_defaults(**CUDA_DEFAULTS)
        if not asked.model:
            parser.set_defaults(learning_rate=QWEN_RATE)
    flags = parser.parse_args()
    knobs = {knob.name: getattr(flags, knob.name) for knob in fields(TrainConfig)}
    knobs["orders"] = knobs["orders"] and tuple(knobs["orders"])
    config = TrainConfig(**knobs)  # ValueError: out of range
    check_flags(flags)
    return flags, config


def check_flags(flags: argparse.Namespace) -> None:
    """ValueError: flags do not go together, or a path cannot be."""
    m, export, device = flags.tokens_per_category, flags.export, flags.device
    refuse(m < 1, f"--tokens_per_category {m} must be above 0")
    for path in filter(os.path.isdir, (flags.tokens, flags.chat)):
        refuse(path, f"{path} is a folder; name the tokens.safetensors in it")
    refuse(flags.add and not flags.tokens,
           "--add grows a saved table; name it with --tokens")
    same = os.path.realpath(export) == os.path.realpath(flags.output)
    refuse(export and (same or os.path.exists(export)),
           f"--export {export} exists already; name a folder that does not")
    refuse(device not in ("cpu", "cuda"),
           f"--device is {device!r}; it must be cpu or cuda")
    refuse(device == "cuda" and not torch.cuda.is_available(),
           "--device is cuda, but torch sees no CUDA GPU; use --device cpu")
    place = Path(flags.output).absolute()  # asked now: later, a training would be lost
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    refuse(not there.is_dir() or not os.access(there, os.W_OK),
           f"--output {flags.output} cannot be written; name a folder that can")


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
        if not re.search("out of memory|allocate memory", str(error)):  # CUDA, CPU
            raise
        stop(f"{one_line(error)[:80]}: lower --batch_size or take a smaller --model")
    except KeyboardInterrupt:
        stop("stopped; the same command goes on after the last whole epoch")


if __name__ == "__main__":
    run()
