"""What a user brings: a backbone, and labelled requests; from files or from the hub.

Whatever cannot be read as it looks is refused in one line that says where it stands and
how to mend it: a label misread in silence would be trained on.
"""

import csv
import glob
import itertools
import json
import os
import re
import unicodedata
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import datasets
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import RemoteEntryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer

from mosaic import NEUTRAL, Model, Request, Tokenizer, as_messages, prompt_ids

SPLITS = "train", "validation", "test"
SPLIT_NAMES = {"val": "validation", "valid": "validation", "dev": "validation",
               **{split: split for split in SPLITS}}
ROLES = "system", "user", "assistant"
FORM = '{"request": "...", "category": "...", "split": "train"}'
LISTED = r"""\s*\[?\s*{\s*["'](role|content|from|value)["']"""  # saved as text


def refuse(wrong: object, message: str) -> None:
    """ValueError with this message where something is wrong."""
    if wrong:
        raise ValueError(message)


def one_line(message: object) -> str:
    return " ".join(str(message).split())[:400] or type(message).__name__


# --- A backbone -----------------------------------------------------------------------


def read_backbone(name: str, device: str) -> tuple[Model, Tokenizer]:
    """A model, fp32 on a CPU and bf16 on CUDA, and its tokenizer. ValueError: none.

    `name` is a folder, a GGUF file, a LoRA adapter's folder, or a name of the hub.
    """
    source, options = find_model(name)
    options["trust_remote_code"] = False  # else transformers asks, and runs it on a "y"
    dtype, loading = torch.bfloat16 if device == "cuda" else torch.float32, {}
    try:
        if not os.path.isdir(source):
            find_on_hub(source)
            print(f"loading {name} from the hub or its cache", flush=True)
        if os.path.isfile(f"{source}/adapter_config.json"):
            from peft import AutoPeftModelForCausalLM

            with warnings.catch_warnings():  # an adapter of which nothing is found
                warnings.filterwarnings("error", ".*missing adapter keys")
                model = AutoPeftModelForCausalLM.from_pretrained(
                    source, dtype=dtype, **options).merge_and_unload()
            if not os.path.isfile(f"{source}/tokenizer_config.json"):  # it adds none
                source = model.config._name_or_path
        else:
            model, loading = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, output_loading_info=True,
                ignore_mismatched_sizes=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = model.to(device)  # may not fit
        prompt_ids(tokenizer, "Hi", "after")  # does its template work?
        model.config._name_or_path = name  # of an adapter or GGUF file, not its base
        causal = is_causal(model)  # does it run?
    except Exception as error:  # anything at all can be wrong with a checkpoint
        where = "" if os.path.isdir(source) else "no such folder, and on the hub: "
        what = f"model {name} cannot be used: {where}{one_line(error)}"
        raise ValueError(what) from error
    for kind in "mismatched", "missing", "unexpected":
        if keys := sorted(loading.get(f"{kind}_keys", ())):
            told = f"model {name} has {len(keys)} {kind} weights, first {keys[0]}"
            refuse(kind != "unexpected", f"{told}; get the whole checkpoint")
            print(f"{told}: left out")
    refuse(not causal, f"model {name} reads what comes after a word, as BERT "
           "does; take one that writes from left to right")
    return model, tokenizer


def find_on_hub(name: str) -> None:
    """One look for a checkpoint, kept here or on the hub; from_pretrained takes 19."""
    if not try_to_load_from_cache(name, "config.json"):
        try:
            get_hf_file_metadata(hf_hub_url(name, "config.json"))
        except RemoteEntryNotFoundError:
            raise ValueError("it has no config.json; fetch a GGUF file or a LoRA "
                             "folder with `hf download` and name that") from None


@torch.no_grad()
def is_causal(model: Model) -> bool:
    """Whether what follows a word leaves the model's states at the word as they are."""
    model.eval()  # with dropout they would differ in any case
    ids = torch.tensor([[0, 1], [0, 2]], device=model.device)
    states = model(ids, output_hidden_states=True).hidden_states[-1][:, 0].float()
    return ((states[0] - states[1]).norm() <= 0.01 * states.norm()).item()


def find_model(name: str) -> tuple[str, dict]:
    """(what from_pretrained takes, its options). ValueError: nothing is there."""
    path = Path(name)
    if path.is_dir() and not (path / "config.json").exists():
        found = sorted(path.glob("*.gguf"))
        refuse(found[1:], f"several files; name one of {', '.join(map(str, found))}")
        path = found[0] if found else path
    if path.is_file() and path.suffix.lower() == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    is_hub = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?(?<!\.gguf)", name)
    refuse(not path.is_dir() and (path.exists() or not is_hub),
           f"no model {name}; give the folder of a checkpoint, a GGUF file, or a hub "
           "name such as Qwen/Qwen2.5-0.5B-Instruct")
    return name, {}


# --- From rows to requests ------------------------------------------------------------


def read_summaries(path: str) -> dict[str, str]:
    """{category: what it covers, in a sentence}."""
    try:
        found = json.loads("".join(read_lines(path)))
    except json.JSONDecodeError:
        found = None
    refuse(not isinstance(found, dict) or {*map(type, found.values())} - {str},
           f'{path}: it must be JSON like {{"alcohol": "Drinks with alcohol."}}')
    return found


def read_requests(
    path: str, request: str = "request", category: str = "category"
) -> list[Request]:
    """The requests of a file or hub dataset. ValueError: names file, line and fix.

    A request is a text or, outside CSV, a list of chat messages. An assistant's message
    at the end of a list, the answer in data sets for TRL, is left out. Where no row has
    a split a hash of the text gives each its own, 60 / 20 / 20: the same in every file,
    so that a table that grows is not tested on what it has learned.
    """
    seen, spelled, filled, count = {}, {}, {}, 0  # each with its first place
    for count, (here, row) in enumerate(read_rows(path), 1):
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
            for label in "split", "category", "near":  # two splits: the test would leak
                refuse(getattr(one, label) != getattr(same, label),
                       f"the request of {there} again, with another {label}; keep one")
        except ValueError as error:
            raise ValueError(f"{here}: {error}") from None
    refuse(not seen, f"{path}: no rows to read; one is like {FORM}")
    if repeats := count - len(seen):
        print(f"{path}: repeated rows (request, category, split) merged: {repeats:,}")
    return [one for _, one in seen.values()]


def read_request(row: dict, request: str, category: str) -> Request:
    """The request of a row. ValueError: what is wrong with it."""
    refuse(not row or not isinstance(row, dict),
           f"not an object with fields, as in {FORM}")
    if request == "request" and "request" not in row and "messages" in row:
        request = "messages"
    for name in (request, category):
        refuse(name not in row, f"no column {name!r}, only {', '.join(row)}; name "
               "yours with --request_column and --category_column")
    for name in row:  # else it would go unread
        refuse(name != name.lower() in ("split", "near"),
               f"column {name!r}; write {name.lower()!r}")
    prompt, kind = read_prompt(request, row[request]), row[category]
    refuse(not isinstance(kind, str) or re.fullmatch(r"\s*([-+]?[\d.,]+)?\s*", kind),
           f"{category} is {kind!r:.80}; it must be a category's name, in words")
    kind, split, near = kind.strip(), cell(row, "split"), cell(row, "near")
    refuse(kind.lower() == NEUTRAL != kind, f"category {kind!r}; write {NEUTRAL} for "
           "harmless requests, or name the category otherwise")
    fits = kind == NEUTRAL and isinstance(near, str) and near.lower() != NEUTRAL
    refuse(near is not None and not fits, f"near is {near!r}; only {NEUTRAL} requests "
           "can be near misses, of a category")
    refuse(split is not None and str(split) not in SPLIT_NAMES,
           f"split is {split!r}; it must be train, validation or test")
    fifth = zlib.crc32(text_of(prompt).encode()) % 5
    by_hash = SPLITS[max(0, fifth - 2)]
    return Request(prompt, kind, SPLIT_NAMES.get(split, by_hash), near)


def read_prompt(column: str, value: object) -> str | list[dict[str, str]]:
    """A text, or chat messages up to the last of the user, without an answer to it."""
    if not isinstance(value, list):
        wrong = not isinstance(value, str) or re.match(LISTED, value)
        refuse(wrong or not value.strip(), f"{column} is {value!r:.80}; it must be "
               "some text, or a list of messages, which CSV cannot hold")
        return value
    for turn in value:
        known = isinstance(turn, dict) and turn.get("role") in ROLES
        refuse(not known or not isinstance(turn.get("content"), str),
               f'{column} holds {turn!r:.80}; a message is like {{"role": "user", '
               f'"content": "..."}}, its role one of {", ".join(ROLES)}')
    turns = [{key: turn[key] for key in ("role", "content")} for turn in value]
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
    return "\n".join(turn["content"] for turn in as_messages(prompt)).strip().lower()


def spelling(category: str) -> str:
    """What two spellings of one category have in common."""
    seen = "".join(c for c in category if unicodedata.category(c) != "Cf")
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", seen)).casefold()


# --- From files to rows ---------------------------------------------------------------


def read_rows(path: str) -> Iterator[tuple[str, dict]]:
    """(place, row) of a file or hub dataset. ValueError: there is none to read."""
    kinds = {".jsonl": json_rows, ".ndjson": json_rows, ".json": json_rows,
             ".csv": csv_rows, ".tsv": csv_rows, ".parquet": typed_rows}
    name, ending = path.partition(":")[0], Path(path).suffix.lower()
    if os.path.isfile(path):
        refuse(ending not in kinds,
               f"{path}: unknown kind of file; known are {', '.join(kinds)}")
        return kinds[ending](path)
    is_hub = re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]+(:[^/].*)?", path)
    is_local = os.path.isdir(name) or re.search(r"\.[A-Za-z]{2,7}$", name)
    refuse(is_local or not is_hub,
           f"{path}: {'a folder' if os.path.isdir(path) else 'no such file'}; name a "
           "file, or a dataset of the hub")
    return typed_rows(path)


def read_lines(path: str) -> Iterator[str]:
    """The lines of a text file, with a newline at their ends, whatever the system."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            refuse(re.search("[\udc80-\udcff]", line),  # in place of a byte
                   f"{path}:{number}: not in UTF-8; save the file as UTF-8")
            yield line


def once(pairs: list[tuple[str, object]], where: str = "") -> dict:
    """{name: value}. ValueError: a name is there twice, and one would go unread."""
    names = [name for name, _ in pairs if name]
    for name in names:
        refuse(names.count(name) > 1, f"{where}{name!r} is there twice; rename one")
    return dict(pairs)


def json_rows(path: str) -> Iterator[tuple[str, dict]]:
    """Objects, one a line or, in .json, all in one list."""
    whole = "".join(read_lines(path))
    listed = path.lower().endswith(".json") and whole.lstrip().startswith("[")
    for line, text in enumerate([whole] if listed else whole.split("\n"), 1):
        if not text.strip():
            continue
        try:
            found = json.loads(text.rstrip(), object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            line += getattr(error, "lineno", 1) - 1
            why = getattr(error, "msg", error)
            raise ValueError(f"{path}:{line}: not JSON ({why}); each line is like "
                             f"{FORM}, or all of a .json a list of such") from None
        if listed:
            yield from ((f"{path} row {i}", row) for i, row in enumerate(found, 1))
        else:
            yield f"{path}:{line}", found


def csv_rows(path: str) -> Iterator[tuple[str, dict]]:
    """Rows of words between commas, semicolons (as Excel in Europe writes) or tabs."""
    lines, columns, start = [*read_lines(path)], [], 1
    marks = "\t" if path.lower().endswith(".tsv") else ",;\t"
    mark = max(marks, key="".join(lines[:1]).count)
    csv.field_size_limit(2**31 - 1)  # else a long cell is an error
    rows = csv.reader(lines, delimiter=mark, strict=True, skipinitialspace=True)
    try:
        for cells in rows:
            here, start = f"{path}:{start}", rows.line_num + 1  # cells of several lines
            if not columns:
                columns = [name.strip() for name in cells]
                once([*zip(columns, cells)], f"{here}: column ")
            elif any(cells):
                refuse([name.strip("\ufeff \t") for name in cells] == columns,
                       f"{here}: the header again; take it out")
                refuse(len(cells) > len(columns),
                       f"{here}: {len(cells)} cells, but {len(columns)} columns; put "
                       f'"quotes" around a cell with {mark!r} in it')
                # Excel leaves out the last cells of rows where they are empty.
                yield here, dict(itertools.zip_longest(columns, cells, fillvalue=""))
    except csv.Error as error:
        raise ValueError(f'{path}:{start}: {error}; put "quotes" around the whole cell '
                         'and write "" for each inside') from None


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
                for column, names in classes.items():
                    row[column] = names.get(row[column], row[column])
                yield " ".join([path, *own.values(), f"row {number}"]), row | own
    except Exception as error:  # as many kinds as there are readers
        raise ValueError(f"{path} cannot be read (a config of the hub is named as in "
                         f"{name}:CONFIG): {one_line(error)}") from error
