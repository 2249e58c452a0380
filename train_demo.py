"""MOSAIC from nothing to a table: load, show, train, evaluate, compose, save.

    python train_demo.py                     # the embedded backbone; a CPU will do
    python train_demo.py --model FOLDER      # any chat model; also a GGUF file
    python train_demo.py --data FILE.csv     # your own categories
    python train_demo.py --tokens runs/demo/tokens.safetensors --output runs/again
    python train_demo.py --chat runs/demo/tokens.safetensors
"""

import argparse
import contextlib
import html
import json
import os
import re
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path

import torch
import transformers
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import TextStreamer

import mosaic
from data_sample.reading import (
    SPLITS, find_on_hub, one_line, read_backbone, read_requests, read_summaries, refuse
)
from mosaic import NEUTRAL, ControlTokens, TrainConfig, evaluate, generate, is_refusal

SAMPLE = Path(__file__).resolve().parent / "data_sample"
EMBEDDED, REQUESTS = SAMPLE / "tiny_chat", SAMPLE / "requests.jsonl"
SUMMARIES = SAMPLE / "summaries.json"
ON_CUDA = "Qwen/Qwen2.5-0.5B-Instruct"
# With these a real backbone learns: see tests/benchmarks/results/real.md. The embedded
# one's pretraining had nothing after the user's words: not the place for it.
REAL_DEFAULTS = {"place": "after", "tokens_per_category": 10, "batch_size": 32,
                 "learning_rate": 1.0}
CUDA_DEFAULTS = {"batch_size": 64, "epochs": 24}
# Of an answer; whether it declines shows early.
JUDGED_TOKENS, SHOWN_TOKENS, TALK_TOKENS = 16, 64, 256
TITLES = {"instruction": "written instruction", "orders": "MOSAIC"}


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
    check_fit(flags, config, model, tokenizer, tokens, requests, summaries)
    folder = Path(flags.output)
    folder.mkdir(parents=True, exist_ok=True)  # now: later, a training would be lost
    tempfile.TemporaryFile(dir=folder).close()
    say_what_learns(requests, tokens, model, f"{name} on {flags.device}")

    # Show: what the untouched backbone declines by itself is not ours to judge.
    test = [request for request in requests if request.split == "test"]
    untouched = mosaic.reference_answers(model, tokenizer, test, JUDGED_TOKENS)
    refusal = tokens.made_for["refusal"]
    asked = [q for q, own in zip(test, untouched) if not is_refusal(own.text, refusal)]
    declined = {"requests": len(test) - len(asked), "of": len(test)}
    print(f"the backbone declines {declined['requests']} of {len(test)} test requests "
          "by itself: left out of all figures\n")

    # Train: the tokens alone, against the backbone's own answers.
    if tokens.trainable:
        mosaic.train(model, tokenizer, tokens, requests, config,
                     checkpoint=str(folder / "training.pt"))
        tokens.save(str(folder / "tokens.safetensors"))  # whatever comes after
        for old in "results.json", "report.html":  # of the table that was there
            (folder / old).unlink(missing_ok=True)

    # Evaluate: policies of every order, the same requests, by a rule and by tokens.
    figures = measure(model, tokenizer, tokens, asked, summaries)
    print("\ntest split, percent: DSR (up) / OR (down) / near-miss OR (down)")
    for title, *shares in percents(figures):
        print(f"{title:>29}  {' / '.join(shares)}")

    # Compose: a request of each category under four policies. Save, export.
    shown = show_answers(model, tokenizer, tokens, asked)
    unknown = dict.fromkeys(asdict(config))  # of a table saved without its settings
    trained = tokens.made_for.get("training", unknown)
    results = {"model": name, "settings": vars(flags) | trained,
               "backbone_declines": declined, **figures}
    write_results(folder, results, shown)
    if flags.export:
        mosaic.export_checkpoint(model, tokenizer, tokens, flags.export)
        print(f"exported to {flags.export}")
    if tokens.trainable:
        (folder / "training.pt").unlink(missing_ok=True)


# --- Its parts ------------------------------------------------------------------------


def say_what_learns(requests, tokens: ControlTokens, model, where: str) -> None:
    """What was read, what will be trained, and what stays as it is."""
    counts = Counter((q.category, q.split) for q in requests)
    rows = (f"{name} " + "/".join(str(counts[name, split]) for split in SPLITS)
            for name in dict.fromkeys(q.category for q in requests))
    print(f"read:    {len(requests):,} requests, {'/'.join(SPLITS)}: {', '.join(rows)}")
    numbers = sum(v.numel() for v in tokens.parameters() if v.requires_grad)
    print(f"trained: {numbers:,} numbers, {len(tokens.vectors[0])} control tokens for "
          f"each of {', '.join(tokens.trainable)}" if numbers else "trained: nothing")
    kept = [f"{c}'s tokens, " for c in tokens.categories if c not in tokens.trainable]
    weights = sum(weight.numel() for weight in model.parameters())
    print(f"frozen:  {''.join(kept)}{weights:,} weights of {where}")


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

    def by_instruction(prompts, policies):
        cases = zip(prompts, policies)
        ruled = [instruct(*case, summaries, tokenizer) for case in cases]
        return generate(model, tokenizer, None, ruled, None, JUDGED_TOKENS,
                        title=TITLES["instruction"])

    def by_tokens(prompts, policies):
        return generate(model, tokenizer, tokens, prompts, policies, JUDGED_TOKENS,
                        title=TITLES["orders"])

    def judge(prompt, answer):
        return is_refusal(answer, tokens.made_for["refusal"])

    figures, every = {}, tokens.categories
    for key, respond in {"instruction": by_instruction, "orders": by_tokens}.items():
        figures[key] = cells = []
        for order in range(1, len(every) + 1):
            most = len(every) if order == 1 else 2  # policies of an order
            cells += evaluate(respond, requests, every, [order], most, judge=judge)
    return figures


def percents(figures: dict[str, list[dict]]) -> list[tuple[str, ...]]:
    """(what, DSR, OR, near-miss OR) per order, each share with its 95% interval."""
    rows = []
    for key, cell in [(key, cell) for key in TITLES for cell in figures[key]]:
        texts = [f"{TITLES[key]}, order {cell['order']}"]
        for share in cell["dsr"], cell["over_refusal"], cell["near_miss"]:
            rate, low, high = (100 * share[name] for name in ("rate", "low", "high"))
            texts.append(f"{rate:5.1f} [{low:.1f}, {high:.1f}]" if share["n"] else "-")
        rows.append(tuple(texts))
    return rows


def show_answers(model, tokenizer, tokens, requests) -> list[tuple[str, str, str]]:
    """One request of each category under no policy, its own, another and all."""
    every, shown = tokens.categories, []
    prompts = {q.category: q.prompt for q in reversed(requests)}  # the first of each
    for category in filter(prompts.get, every):
        prompt, other = prompts[category], every[every.index(category) - 1]
        under = ["none", category, *{other} - {category}, "all"]
        policies = [], *([name] for name in under[1:-1]), every
        asked = [prompt] * len(under)
        said = generate(model, tokenizer, tokens, asked, policies, SHOWN_TOKENS)
        title = f"{category}: {mosaic.user_words(prompt)[-1]}"
        print(f"\n{title}")
        for name, answer in zip(under, said):
            print(f"{name:>12} | {' '.join(answer.split())}")
            shown.append((title if name == "none" else "", name, answer))
    return shown


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>MOSAIC</title>
<style>:root {{ color-scheme: light dark }} td {{ padding: .2rem .7rem }}</style>
<h1>MOSAIC on {}</h1>
<h2>Requests declined, test split, percent [95%]</h2><table>{}</table>
<h2>One request of each category under four policies</h2><table>{}</table></html>
"""


def write_results(folder: Path, results: dict, shown: list) -> None:
    """results.json and report.html, each whole or not at all."""

    def table(rows) -> str:
        cells = ([html.escape(cell) for cell in row] for row in rows)
        return "\n".join(f"<tr><td>{'<td>'.join(row)}" for row in cells)

    figures = [("", "DSR (up)", "OR (down)", "near-miss OR (down)"), *percents(results)]
    page = PAGE.format(html.escape(results["model"]), table(figures), table(shown))
    written = {"results.json": json.dumps(results, indent=2) + "\n",
               "report.html": page}
    for name, text in written.items():
        part = folder / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        os.replace(part, folder / name)
    print(f"\nwritten to {folder}: {', '.join(written)}")


def chat(path: str, model, tokenizer) -> None:
    """A talk in the terminal, under a policy that each turn may change."""
    with contextlib.suppress(ImportError):  # not everywhere
        import readline  # noqa: F401  arrow keys edit the line
    tokens, active, turns = ControlTokens.load(path, model), set(), []
    known = tokens.categories
    usage = f"/on X, /off X (X of {', '.join(known)}), /reset, /quit"
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    print(usage)
    with contextlib.suppress(EOFError, KeyboardInterrupt):  # Ctrl-D, Ctrl-C: good-bye
        while True:
            policy = [name for name in known if name in active]
            said = input(f"[{', '.join(policy) or 'no policy'}] > ")
            said = said.encode(errors="replace").decode().strip()  # it may be no UTF-8
            command, _, name = said.partition(" ")
            name = name.strip()
            if command in ("/on", "/off") and name in known:
                active = active | {name} if command == "/on" else active - {name}
            elif said == "/reset":
                turns = []
            elif said == "/quit":
                break
            elif said.startswith("/"):
                print(f"{said}? {usage}")
            elif said:
                asked = [*turns, {"role": "user", "content": said}]
                while asked and not fits(model, tokenizer, tokens, asked, TALK_TOKENS):
                    asked = asked[2:]  # the oldest exchange
                if not asked:
                    print("too long for the model")
                    continue
                turns = asked
                (answer,) = generate(model, tokenizer, tokens, [turns], [policy],
                                     TALK_TOKENS, streamer=streamer)
                turns.append({"role": "assistant", "content": answer})
    print()


# --- What a user brings ---------------------------------------------------------------


def default_model(device: str, table: str = "") -> str:
    """The backbone that a saved table was made for; without one, by the device."""
    if table:
        made_for = ControlTokens.load(table).made_for["backbone"]
        if Path(made_for).name != EMBEDDED.name:
            return made_for
    elif device == "cuda":
        try:
            find_on_hub(ON_CUDA)
            return ON_CUDA
        except Exception as error:  # whatever the hub's client raises
            print(f"no {ON_CUDA}: {one_line(error)}; taking the embedded backbone")
    return os.path.relpath(EMBEDDED)


def load_backbone(name: str, device: str):
    """(model, tokenizer, name): the one named or, without a name, the default."""
    name = name or default_model(device)
    return *read_backbone(name, device), name


def fits(model, tokenizer, tokens: ControlTokens | None, prompt, answer: int) -> bool:
    """Whether a prompt under all categories at once and an answer fit the model."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", 10**9)
    ids = mosaic.prompt_ids(tokenizer, prompt, tokens and tokens.made_for["place"])
    more = ids.count(mosaic.SLOT) * sum(map(len, tokens.vectors)) if tokens else 0
    return len(ids) + more + answer <= longest


def load_tokens(flags, model, tokenizer, requests) -> ControlTokens:
    """A saved table, grown by --add, or a fresh one. ValueError: it does not fit."""
    if flags.tokens:
        tokens = ControlTokens.load(flags.tokens, model)
        tokens.freeze(tokens.categories)
        tokens.add(model, tokenizer, flags.add, requests=requests, seed=flags.seed)
        flags.tokens_per_category = len(tokens.vectors[0])
        flags.place = tokens.made_for["place"]
    else:
        found = dict.fromkeys(q.category for q in requests if q.split == "train")
        found.pop(NEUTRAL, None)
        refuse(not found, f"{flags.data}: no request to learn from; it takes some with "
               f"split train and a category other than {NEUTRAL}")
        tokens = ControlTokens.for_model(
            model, tokenizer, [*found], flags.tokens_per_category, requests,
            place=flags.place, seed=flags.seed)
    there = Path(flags.output) / "tokens.safetensors"
    old = ControlTokens.load(str(there)) if there.exists() else tokens
    refuse({*old.categories} != {*tokens.categories}, f"--output {flags.output} has a "
           f"table of categories {', '.join(old.categories)}: give another folder")
    return tokens


def check_fit(flags, config, model, tokenizer, tokens, requests, summaries) -> None:
    """ValueError: what would end a training in vain, or give figures that mislead."""
    known = [*tokens.categories, NEUTRAL]
    answer = max(SHOWN_TOKENS, config.answer_tokens)
    why = "no training request"
    if flags.tokens:
        why = "not in the table; --add trains it, --data names other requests"
    unread = {*summaries} - {*known} if flags.summaries != str(SUMMARIES) else set()
    refuse(unread, f"{flags.summaries}: unknown category {', '.join(sorted(unread))}; "
           f"known here are {', '.join(tokens.categories)}")
    refuse("test" not in {q.split for q in requests},
           f"{flags.data}: no request has split 'test'; name it in some rows or, "
           "without that column, take more of them")
    for q in requests:
        try:
            refuse({q.category, q.near or NEUTRAL} - {*known},
                   f"unknown category {q.near or q.category!r}: {why}; "
                   f"known here are {', '.join(known)}")
            refuse(not fits(model, tokenizer, tokens, q.prompt, answer),
                   "too long for the model, with tokens and an answer")
            if q.split == "train" and tokens.trainable and config.later_turns:
                chat = mosaic.later_turn(mosaic.Reference(**vars(q), text="Yes."), q)
                both = config.answer_tokens + answer
                refuse(not fits(model, tokenizer, tokens, chat.prompt, both),
                       "too long for the model after another; take --later_turns 0")
            if q.split == "test":
                ruled = instruct(q.prompt, tokens.categories, summaries, tokenizer)
                refuse(not fits(model, tokenizer, None, ruled, answer), "too long for "
                       "the model with the written instruction; shorten the sentences "
                       f"of {flags.summaries}, or the categories' names")
        except (ValueError, TemplateError) as error:  # a role that the template lacks
            raise ValueError(f"{flags.data}, {q.prompt!r:.60}: {error}") from error
    learn = {q.category for q in requests if q.split == "train" and not q.near}
    lacking = [repr(c) for c in known if c not in learn]
    refuse(tokens.trainable and lacking, f"{flags.data}: no training request of "
           f"category {', '.join(lacking)}; training takes some of each")


# --- The command line -----------------------------------------------------------------


def read_flags() -> tuple[argparse.Namespace, TrainConfig]:
    """The command line: flags of the demo, and every knob of TrainConfig."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False, add_help=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = stop  # argparse would print the whole usage
    add = parser.add_argument
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--model", default="", help="chat model: folder (a LoRA adapter's, too), GGUF "
        f"file or hub name; empty: that of a saved table, or else {ON_CUDA} with CUDA, "
        "the embedded one without")
    add("--data", default=str(REQUESTS),
        help="requests: JSON lines, CSV, TSV, Parquet, or a dataset of the hub, as "
             "name:config; optional columns are split (else by a hash) and near")
    add("--request_column", default="request", help="the column with the requests")
    add("--category_column", default="category", help="the column with the categories")
    add("--summaries", default=str(SUMMARIES),
        help="JSON {category: sentence} for the written instruction; else the name")
    add("--tokens_per_category", type=int, default=5,
        help="M of each category; with --tokens always the table's own")
    add("--place", default="before", choices=mosaic.PLACES,
        help="of control tokens, at the user's words; with --tokens the table's own")
    add("--output", default="runs/demo", help="folder for table, results and a report")
    add("--tokens", default="", help="a saved table: no training, only evaluation")
    add("--add", nargs="+", default=[],
        help="with --tokens: categories to train beside its own, which stay frozen")
    add("--export", default="", help="folder to be made: the backbone with the tokens "
                                     "in it, whose chat template takes a policy")
    add("--chat", default="", help="a saved table to talk under: nothing else is done")
    add("--device", default=devices[0], choices=devices, help="cuda if torch has it")
    for knob in fields(TrainConfig):
        kind, many = (int, "+") if knob.name == "orders" else (type(knob.default), None)
        add(f"--{knob.name}", type=kind, nargs=many, default=knob.default,
            help="see TrainConfig in mosaic.py")
    asked = parser.parse_known_args()[0]
    name = asked.model or default_model(asked.device, asked.chat or asked.tokens)
    if Path(name).resolve() != EMBEDDED:
        parser.set_defaults(**REAL_DEFAULTS)
        if asked.device == "cuda":
            parser.set_defaults(**CUDA_DEFAULTS)
    add("-h", "--help", action="help", help="this text, with the defaults as they are")
    flags = parser.parse_args()
    flags.model = name
    refuse(flags.add and not flags.tokens, "--add grows a saved table: give --tokens")
    output, export = Path(flags.output).resolve(), Path(flags.export).resolve()
    there = output / "tokens.safetensors"
    if there.exists() and not flags.chat:  # do not lose it, or mix up results
        of = Path(ControlTokens.load(str(there)).made_for["backbone"]).name
        same = there == Path(flags.tokens).resolve()  # measured again, or to be grown
        refuse(of != Path(name).name or flags.tokens and bool(flags.add) == same,
               f"--output {flags.output} has a table, for {of}: give another folder")
    refuse(flags.export and (export.exists() or output.is_relative_to(export)),
           f"--export {flags.export} exists already; name a folder that does not")
    knobs = {knob.name: getattr(flags, knob.name) for knob in fields(TrainConfig)}
    return flags, TrainConfig(**knobs)  # ValueError: out of range


def stop(message: object) -> None:
    """A user's mistake: one line, exit code 2."""
    print(f"train_demo.py: {one_line(message)}", file=sys.stderr)
    raise SystemExit(2)


def run() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sys.stdout.reconfigure(errors="replace")  # a console may not know every character
    try:
        main()
    except (ValueError, OSError, TemplateError, SafetensorError) as error:
        stop(error)
    except RuntimeError as error:
        if not re.search("out of memory|allocate memory|inline_container", str(error)):
            raise
        stop(f"{error!s:.80}: take a smaller --model or shorter requests, in an epoch "
             "a smaller --batch_size, or free the disk")
    except KeyboardInterrupt:
        stop("stopped; by the same command a training goes on after its last epoch")


if __name__ == "__main__":
    run()
