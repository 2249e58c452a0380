"""train_demo.py from outside: a short run, and what users get wrong."""

import functools
import io
import json
import re
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from types import SimpleNamespace

import datasets
import huggingface_hub
import pandas
import pytest
import torch
from conftest import EMBEDDED, ROOT, read
from safetensors.torch import load_file, save_file

import mosaic
import train_demo
from mosaic import NEUTRAL, ControlTokens, Request, TrainConfig

KEYS = {
    "model",
    "seed",
    "config",
    "backbone",
    "orders",
    "instruction",
    "drift",
    "seconds",
}


OLD = ("alcohol", "betting")


def demo(*flags, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / "train_demo.py"), *map(str, flags)],
        cwd=cwd,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def demo_here(monkeypatch, capsys):
    """As `demo`, in this process: without six seconds of imports."""

    def call(*flags, cwd):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["train_demo.py", *map(str, flags)])
        code = 0
        try:
            train_demo.run()
        except SystemExit as stopped:
            code = stopped.code
        said = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=said.out, stderr=said.err)

    return call


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with two categories' requests: all to train on, a few to test."""
    folder = tmp_path_factory.mktemp("demo")
    rows = [
        r
        for r in read("requests")
        if r["near"] in (None, "betting", "alcohol")
        and r["category"] in ("alcohol", "betting", "neutral")
    ]
    counts = {}
    with open(folder / "small.jsonl", "w", encoding="utf-8") as file:
        for row in rows:
            key = (row["category"], row["split"], row["near"])
            counts[key] = counts.get(key, 0) + 1
            if row["split"] == "train" or counts[key] <= 8:
                file.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(small):
    done = demo(
        "--data",
        "small.jsonl",
        "--epochs",
        4,
        "--orders",
        1,
        2,
        "--device",
        "cpu",
        cwd=small,
    )
    assert done.returncode == 0, done.stderr
    return done, json.loads((small / "runs" / "demo" / "results.json").read_text())


def test_a_short_run_beats_the_untouched_backbone(run):
    _, results = run
    assert set(results) == KEYS and results["model"].endswith("tiny_chat")
    assert results["backbone"]["refusal_rate"] <= 0.05
    assert [row["order"] for row in results["orders"]] == [1, 2]
    for row in results["orders"]:
        dsr, over = row["dsr"]["rate"], row["over_refusal"]["rate"]
        # Four epochs are few: at order 2 a third of all else is declined as well.
        assert dsr > 0.6 and dsr - over > 0.3 and over < 0.2 * row["order"] ** 2, row
        for name in ("dsr", "over_refusal", "near_miss"):
            cell = row[name]
            assert (
                0 <= cell["low"] <= cell["rate"] <= cell["high"] <= 1 and cell["n"] > 0
            )
    assert [row["order"] for row in results["instruction"]] == [1, 2]
    assert [set(row) for row in results["instruction"]] == [
        {"order", "policies", "dsr", "over_refusal", "near_miss", "degenerate"}
    ] * 2
    assert set(results["config"]) == {one.name for one in fields(train_demo.Flags)}
    assert set(results["backbone"]) == {"parameters", "refusal_rate", "n"}
    assert results["drift"]["kl"] >= 0 and 0 <= results["drift"]["top1_agreement"] <= 1
    assert set(results["seconds"]) == {"reference", "train", "evaluate"}


def test_a_run_says_what_is_trained_and_shows_answers_under_policies(run):
    done, _ = run
    read, trained, frozen = done.stdout.splitlines()[:3]
    assert "alcohol 90/8/8, betting 90/8/8, neutral 114/16/16" in read
    assert trained.startswith("trained: 1,920 numbers, 5 control tokens for each of")
    assert frozen.startswith("frozen:  3,737,280 weights")
    for row in ("untouched backbone", "written instruction", "MOSAIC"):
        assert f"\n{row}" in done.stdout
    for title in ("none |", "alcohol |", "betting |", "all |"):
        assert done.stdout.count(title) >= 2
    assert done.stdout.count("epoch ") == 4


def test_a_saved_table_is_evaluated_without_training(run, small, demo_here):
    _, results = run
    done = demo_here(
        "--data",
        "small.jsonl",
        "--tokens",
        "runs/demo/tokens.safetensors",
        "--output",
        "again",
        "--device",
        "cpu",
        cwd=small,
    )
    assert done.returncode == 0, done.stderr
    again = json.loads((small / "again" / "results.json").read_text())
    assert again["orders"] == results["orders"] and "epoch " not in done.stdout
    assert "trained: nothing\n" in done.stdout
    files = {p.name for p in (small / "again").iterdir()}
    assert files == {"results.json", "report.html"}


def test_a_saved_table_grows_by_a_category_and_keeps_its_vectors(run, small, demo_here):
    kept, counts = [], Counter()
    for row in read("requests"):
        counts[row["category"], row["split"], row["near"]] += 1
        if counts[row["category"], row["split"], row["near"]] <= 10:
            if {row["category"], row["near"]} <= {*OLD, "horror", "neutral", None}:
                kept.append(json.dumps(row) + "\n")
    (small / "grown.jsonl").write_text("".join(kept), encoding="utf-8")
    tokens = "runs/demo/tokens.safetensors"
    flags = ["--data", "grown.jsonl", "--tokens", tokens, "--add", "horror"]
    more = ["--epochs", 1, "--orders", 1, "--output", "grown", "--device", "cpu"]
    done = demo_here(*flags, *more, "--export", "served", cwd=small)
    assert done.returncode == 0, done.stderr
    assert "trained: 960 numbers, 5 control tokens for each of horror" in done.stdout
    assert "frozen:  the tokens of alcohol, betting; 3,737,280 weights" in done.stdout
    old, new = load_file(small / tokens), load_file(small / "grown/tokens.safetensors")
    assert set(new) == {*old, "horror"}
    assert all(torch.equal(old[name], new[name]) for name in old)
    template = (small / "served" / "chat_template.jinja").read_text()
    assert "<|horror:4|>" in template and "exported to served" in done.stdout


def test_the_report_is_one_page_that_shows_the_results_and_asks_nobody(run, small):
    _, results = run
    page = (small / "runs" / "demo" / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|<link|src=|https?:|@import", page)
    for cell in (*results["orders"], *results["instruction"]):
        for share in (cell["dsr"], cell["over_refusal"]):
            low, high = 100 * share["low"], 100 * share["high"]
            assert f"{100 * share['rate']:.1f}" in page
            assert f"{low:.1f} to {high:.1f}, {share['n']}" in page
    assert page.count("can&#x27;t help") + page.count("can't help") >= 2
    hostile = {"a: <b>&": ["<script>"] * 4}
    page = train_demo.report(results | {"model": "<i>"}, hostile)
    assert "<script" not in page and "<i>" not in page and "<b>" not in page


def test_a_chat_switches_its_policy_at_any_turn(run, small, backbone, tokenizer):
    tokens = ControlTokens.load(small / "runs/demo/tokens.safetensors", backbone)
    asked = [r["request"] for r in read("requests") if r["category"] == "alcohol"][:20]
    said = mosaic.generate(backbone, tokenizer, tokens, asked, [["alcohol"]] * 20, 9)
    asked = next(a for a, b in zip(asked, said) if mosaic.is_refusal(b))
    lines = ["/policy", "/on alcohol", asked, "/on golf", "/why", "/off alcohol"]
    lines += ["/reset", asked, "/quit", "never read"]
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "train_demo.py"),
            "--device",
            "cpu",
            "--chat",
            "runs/demo/tokens.safetensors",
        ],
        cwd=small,
        input="\n".join(lines),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = re.split(r"\[([^]]*)\] > ", done.stdout)[1:]
    policies, shown = found[::2], [text.strip() for text in found[1::2]]
    assert policies == ["no policy"] * 2 + ["alcohol"] * 4 + ["no policy"] * 3
    assert shown[0] == "declined: nothing; known: alcohol, betting"
    assert shown[2] == mosaic.REFUSAL and not mosaic.is_refusal(shown[7])
    for line in shown[3:5]:
        assert "/on X, /off X (X of alcohol, betting), /policy, /reset, /quit" in line
    assert len(shown[7]) > 20 and shown[1] == shown[5] == shown[6] == shown[8] == ""


def test_a_chat_keeps_its_history_until_reset_and_ends_with_the_input(
    backbone, tokenizer, tokens, tmp_path, monkeypatch, capsys
):
    ControlTokens.for_model(backbone, tokenizer, ["alcohol"]).save(tmp_path / "t")
    lines, seen = iter(["Hi", "And then?", "/reset", "Hi", None, "Hi"]), []

    def say(prompt):
        line = next(lines, EOFError)
        if line is EOFError:
            raise EOFError
        return line or "Stop me"

    def answer(model, tokenizer, tokens, prompts, policies, n, streamer):
        seen.append([turn["content"] for turn in prompts[0]])
        if seen[-1][-1] == "Stop me":
            raise KeyboardInterrupt
        return ["Well."]

    monkeypatch.setattr("builtins.input", say)
    monkeypatch.setattr(train_demo, "generate", answer)
    train_demo.chat(tmp_path / "t", backbone, tokenizer)
    assert seen[:3] == [["Hi"], ["Hi", "Well.", "And then?"], ["Hi"]]
    assert seen[4] == ["Hi", "Well.", "Stop me", "...", "Hi"]


def test_later_turns_are_training_requests_after_other_exchanges(backbone, tokenizer):
    asked = [
        Request(f"What about {x}?", "alcohol") for x in ("gin", "rum", "ale", "port")
    ]
    known = mosaic.reference_answers(backbone, tokenizer, asked, 12)
    flags = train_demo.Flags(later_turns=1.0, seed=1)
    later = train_demo.in_later_turns(asked, known, tokenizer, flags)
    assert {q.prompt[-1] for q in later} == {q.prompt for q in asked}
    assert {len(q.prompt) for q in later} == {3, 5} and later[0].category == "alcohol"
    by_prompt = {q.prompt: one.row.answer for q, one in known.items()}
    for q in later:
        said = tokenizer.decode(by_prompt[q.prompt[0]], skip_special_tokens=True)
        assert q.prompt[1] == said.strip()
    tokens = ControlTokens.for_model(backbone, tokenizer, ["alcohol"])
    learn = [*asked, *later, Request("Hi", "neutral")]
    mosaic.train(backbone, tokenizer, tokens, learn, TrainConfig(epochs=1))
    assert train_demo.in_later_turns(asked, known, tokenizer, train_demo.Flags()) == []


# --- Data of one's own ----------------------------------------------------------------


def test_a_byte_order_mark_and_windows_lines_are_no_mistake(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(
        b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode()
    )
    (tmp_path / "d.csv").write_bytes(b"\xef\xbb\xbfrequest,category\r\na,b\r\nc,b\r\n")
    found = train_demo.read_requests(str(tmp_path / "d.jsonl"))
    assert [q.prompt for q in found] == ["a", "c", "n"]
    found = train_demo.read_requests(str(tmp_path / "d.csv"))
    assert [q.prompt for q in found] == ["a", "c"]


def test_csv_parquet_jsonl_and_hub_datasets_are_read_alike(tmp_path, monkeypatch):
    rows = [
        {"text": f'say "{i}", or\nnot', "topic": ("a", "neutral")[i % 2]}
        for i in range(20)
    ]
    frame = pandas.DataFrame(rows)
    frame.to_csv(tmp_path / "d.csv", index=False)
    frame.to_parquet(tmp_path / "d.parquet")
    frame.to_json(tmp_path / "d.jsonl", orient="records", lines=True)
    found = [
        train_demo.read_requests(str(tmp_path / name), "text", "topic")
        for name in ("d.csv", "d.parquet", "d.jsonl")
    ]
    assert found[0] == found[1] == found[2] and found[0][4].prompt == 'say "4", or\nnot'
    counts = Counter(q.split for q in found[0])
    assert counts == {"train": 14, "validation": 5, "test": 1}
    frame[3:9].to_csv(tmp_path / "fewer.csv", index=False)  # each keeps its split
    fewer = train_demo.read_requests(str(tmp_path / "fewer.csv"), "text", "topic")
    assert fewer == found[0][3:9]

    hub = {"train": rows[:14], "test": rows[14:]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *name, **more: hub)
    found = train_demo.read_requests("someone/something", "text", "topic")
    assert [q.split for q in found] == ["train"] * 14 + ["test"] * 6


ROW = '{"request": "a", "category": "b", "split": "train"}\n'
TEST = '{"request": "c", "category": "b", "split": "test"}\n'
NEUTRAL_ROW = ROW.replace('"b"', '"neutral"').replace('"a"', '"n"')
GOOD = ROW + TEST + NEUTRAL_ROW
DATA = ["--data", "d.jsonl"]
WRONG = {  # name: (flags, content of d.jsonl, what the line must say)
    "unknown flag": (
        ["--epoch_count", "3"],
        None,
        "unknown flag --epoch_count, 3",
    ),
    "flag of a wrong type": (["--epochs", "many"], None, "argument --epochs"),
    "shortened flag": (["--epoch", "3"], None, "unknown flag"),
    "epochs of 0": (["--epochs", "0"], None, "--epochs is 0; it must be above 0"),
    "endless rate": (["--learning_rate", "inf"], None, "--learning_rate is inf"),
    "negative weight": (
        ["--kd_weight", "-1"],
        None,
        "--kd_weight is -1.0; it must be 0",
    ),
    "seed too large": (["--seed", str(10**20)], None, "it must lie in 0.."),
    "order of 0": (["--orders", "0"], None, "--orders [0] must lie in 1..5"),
    "order above K": (["--orders", "6"], None, "--orders [6] must lie in 1..5"),
    "unknown device": (["--device", "tpu"], None, "it must be cpu or cuda"),
    "output is a file": (
        [*DATA, "--output", "d.jsonl"],
        ROW,
        "d.jsonl cannot be written",
    ),
    "missing data": (DATA, None, "d.jsonl: no such file"),
    "empty data": (DATA, "", "d.jsonl: the file is empty"),
    "malformed data": (DATA, ROW + "{oops\n", "d.jsonl:2: not JSON"),
    "blank line": (DATA, ROW + "\n" + ROW, "d.jsonl:2: not JSON"),
    "null": (DATA, "null\n", "d.jsonl:1: not an object"),
    "array": (DATA, "[" + ROW.strip() + "]\n", "d.jsonl:1: not an object"),
    "no request": (DATA, ROW + '{"category": "b"}\n', "d.jsonl:2: request is None"),
    "no text": (
        DATA,
        '{"request": " ", "category": "b"}\n',
        "d.jsonl:1: request is ' '",
    ),
    "unknown split": (DATA, ROW.replace("train", "dev"), "d.jsonl:1: split is 'dev'"),
    "only neutral": (DATA, ROW.replace('"b"', '"neutral"'), "no request to learn from"),
    "no test split": (
        DATA,
        ROW + ROW.replace('"b"', '"neutral"'),
        "no request has split 'test'",
    ),
    "category without training": (
        DATA,
        ROW + TEST.replace('"b"', '"e"'),
        "d.jsonl:2: unknown category 'e'",
    ),
    "near to nothing": (
        DATA,
        ROW + ROW.replace('"b"', '"neutral", "near": "e"'),
        "unknown near 'e'",
    ),
    "near not neutral": (
        DATA,
        ROW.replace('"b"', '"b", "near": "b"'),
        "d.jsonl:1: near is 'b'; only",
    ),
    "neutral with a capital": (
        DATA,
        ROW + ROW.replace('"b"', '"Neutral "'),
        "d.jsonl:2: category 'Neutral'; write neutral for harmless requests",
    ),
    "no neutral": (
        DATA,
        ROW + TEST,
        "no training request of neutral, only of b; it takes",
    ),
    "request in two splits": (
        DATA,
        ROW + ROW.replace("train", "test").replace('"a"', '"A "'),
        "d.jsonl:2: the request of d.jsonl:1 again; take one out",
    ),
    "request twice without splits": (
        DATA,
        '{"request": "a", "category": "b"}\n' * 2,
        "d.jsonl:2: the request of d.jsonl:1 again",
    ),
    "another column": (
        [*DATA, "--category_column", "topic"],
        ROW,
        "no column 'topic', only request, category, split; name yours with",
    ),
    "unknown kind of file": (["--data", "."], None, ".: no such file"),
    "nothing to grow": (["--add", "golf"], None, "--add grows a saved table"),
    "export to what exists": (["--export", "."], None, "--export . exists already"),
    "export to the output": (
        ["--export", "runs/x", "--output", "runs/x/"],
        None,
        "--export runs/x exists already",
    ),
    "no table to talk under": (["--chat", "none"], None, "none is no table to use"),
    "tokens of 0": (["--tokens_per_category", "0"], None, "_category is 0; it must be"),
    "tokens below 0": (
        ["--tokens_per_category", "-3"],
        None,
        "is -3; it must be above",
    ),
    "half a token": (
        ["--tokens_per_category", "2.5"],
        None,
        "invalid int value: '2.5'",
    ),
    "epochs below 0": (["--epochs", "-1"], None, "--epochs is -1; it must be above 0"),
    "rate of 0": (["--learning_rate", "0"], None, "--learning_rate is 0.0; it must be"),
    "no rate": (["--learning_rate", "nan"], None, "--learning_rate is nan; it must be"),
    "turns above 1": (
        ["--later_turns", "1.5"],
        None,
        "--later_turns is 1.5; it must lie",
    ),
    "batch of 0": (
        ["--batch_size", "0"],
        None,
        "--batch_size is 0; it must be above 0",
    ),
    "weight without end": (["--kd_weight", "inf"], None, "--kd_weight is inf; it must"),
    "seed below 0": (
        ["--seed", "-1"],
        None,
        "--seed is -1; it must lie in 0..4294967295",
    ),
    "seed of words": (["--seed", "lucky"], None, "invalid int value: 'lucky'"),
    "order below 0": (["--orders", "-2"], None, "--orders [-2] must lie in 1..5"),
    "no order": (["--orders"], None, "argument --orders: expected at least one"),
    "one good order, one bad": (
        ["--orders", "1", "7"],
        None,
        "--orders [1, 7] must lie",
    ),
    "flag without value": (["--data"], None, "argument --data: expected one argument"),
    "bare word": (["demo"], None, "unknown flag demo; see"),
    "no GPU": (["--device", "cuda"], None, "torch sees no CUDA GPU; use --device cpu"),
    "output below a file": (
        [*DATA, "--output", "d.jsonl/deeper"],
        ROW,
        "d.jsonl/deeper cannot be written; name a folder that can",
    ),
    "broken UTF-8": (
        DATA,
        ROW.encode() + b'{"request": "\xff"}',
        "d.jsonl:2: not JSON",
    ),
    "array over lines": (DATA, f"[\n{ROW}]\n", "d.jsonl:1: not JSON in UTF-8"),
    "string": (DATA, '"hello"\n', "d.jsonl:1: not an object with fields"),
    "number": (DATA, ROW + "7\n", "d.jsonl:2: not an object with fields"),
    "no fields": (DATA, ROW + "{}\n", "d.jsonl:2: not an object with fields"),
    "two rows in a line": (DATA, ROW.strip() + ROW, "d.jsonl:1: not JSON in UTF-8"),
    "request null": (DATA, ROW.replace('"a"', "null"), "d.jsonl:1: request is None"),
    "request a number": (DATA, ROW.replace('"a"', "7"), "d.jsonl:1: request is 7"),
    "category empty": (DATA, ROW.replace('"b"', '""'), "d.jsonl:1: category is ''"),
    "category null": (DATA, ROW.replace('"b"', "null"), "d.jsonl:1: category is None"),
    "category a list": (
        DATA,
        ROW.replace('"b"', '["b"]'),
        "d.jsonl:1: category is ['b']",
    ),
    "split in capitals": (DATA, ROW.replace("train", "Train"), "1: split is 'Train'"),
    "split a number": (
        DATA,
        ROW.replace('"train"', "1"),
        "d.jsonl:1: split is 1; it must",
    ),
    "one row": (DATA, ROW, "no training request of neutral"),
    "only test rows": (DATA, TEST, "d.jsonl: no request to learn from"),
    "a request too long": (
        DATA,
        ROW + ROW.replace('"a"', '"' + "word " * 100_000 + '"') + NEUTRAL_ROW,
        "d.jsonl:2: a request of 100005 tokens; beside control tokens and answer 443",
    ),
    "CSV without header": (
        ["--data", "d.csv"],
        "a,b\nc,b\n",
        "no column 'request', only",
    ),
    "CSV with a ragged row": (
        ["--data", "d.csv"],
        "request,category\na,b\nc,b,d,e\n",
        "d.csv cannot be read",
    ),
    "empty CSV": (["--data", "d.csv"], "", "d.csv cannot be read"),
    "CSV with a header alone": (["--data", "d.csv"], "request,category\n", "d.csv"),
    "no Parquet": (["--data", "d.parquet"], ROW, "d.parquet cannot be read"),
    "missing CSV": (["--data", "none.csv"], None, "none.csv: no such file"),
    "bad row of a CSV": (
        ["--data", "d.csv"],
        "request,category,split\na,b,dev\n",
        "d.csv row 1: split is 'dev'; it must be",
    ),
    "text file": (["--data", "d.txt"], ROW, "d.txt: unknown kind of file; known are"),
    "missing dataset of the hub": (
        ["--data", "no/such"],
        None,
        "no/such cannot be read",
    ),
    "table is a text": (
        [*DATA, "--tokens", "d.jsonl"],
        ROW,
        "d.jsonl is no table to use",
    ),
    "table is a folder": (
        ["--tokens", "."],
        None,
        ". is a folder; name the tokens.safetensors in it",
    ),
    "model of no such name": (
        ["--model", "a b"],
        None,
        "no model folder a b; give one",
    ),
    "model is a file": ([*DATA, "--model", "d.jsonl"], GOOD, "no model folder d.jsonl"),
    "missing model": (["--model", "./none"], None, "no model folder ./none; give one"),
    "unreadable model": (["--model", "."], None, "model . cannot be used"),
    "missing table": (["--tokens", "none"], None, "none is no table to use here"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_gets_one_line_exit_code_2_and_no_file(
    name, tmp_path, monkeypatch, capsys
):
    flags, data, expected = WRONG[name]
    if data is not None:
        name = next((word for word in flags if word.startswith("d.")), "d.jsonl")
        data = data if isinstance(data, bytes) else data.encode()
        (tmp_path / name.split("/")[0]).write_bytes(data)
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_demo.py", "--device", "cpu", *flags])
    with pytest.raises(SystemExit) as stopped:
        train_demo.run()
    shown = capsys.readouterr()
    assert stopped.value.code == 2 and shown.out == ""
    assert expected in shown.err and len(shown.err.strip().splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_mistake_ends_the_process_itself_with_code_2(tmp_path):
    done = demo("--orders", 9, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    assert done.stderr.startswith("train_demo.py: --orders [9] must lie in 1..5")


def test_a_category_unknown_to_a_saved_table_is_named_with_its_line(
    run, small, tmp_path, demo_here
):
    (tmp_path / "d.jsonl").write_text(
        '{"request": "a", "category": "tobacco", "split": "test"}\n', encoding="utf-8"
    )
    table = small / "runs" / "demo" / "tokens.safetensors"
    flags = ["--data", "d.jsonl", "--tokens", table, "--device", "cpu"]
    done = demo_here(*flags, cwd=tmp_path)
    assert (
        done.returncode == 2 and "d.jsonl:1: unknown category 'tobacco'" in done.stderr
    )
    assert "alcohol, betting, neutral" in done.stderr


def broken_copy(folder, how):
    folder.mkdir()
    for file in EMBEDDED.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if how == "broken template":
        (folder / "chat_template.jinja").write_text("{% if messages %}never closed")
    elif how == "truncated weights":
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    else:
        weights = load_file(folder / "model.safetensors")
        if how == "a weight missing":
            del weights["model.layers.0.mlp.up_proj.weight"]
        elif how == "a wrong shape":
            weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(2, 2)
        else:
            weights["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "how, expected",
    [
        ("broken template", "cannot be used: Unexpected end of template"),
        ("truncated weights", "cannot be used"),
        ("a wrong shape", "up_proj.weight is [2, 2], its config says ["),
        ("a weight missing", "1 missing keys, first model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused_before_anything_runs(
    tmp_path, how, expected
):
    broken_copy(tmp_path / "broken", how)
    with pytest.raises(ValueError, match=re.escape(expected)):
        train_demo.load_backbone(str(tmp_path / "broken"), "cpu")


def test_a_weight_too_many_is_only_told(tmp_path, capsys):
    broken_copy(tmp_path / "more", "a weight too many")
    train_demo.load_backbone(str(tmp_path / "more"), "cpu")
    told = "has 1 weights that go unused, first model.layers.9.mlp.up_proj.weight"
    assert told in capsys.readouterr().out


def test_one_category_and_one_with_a_strange_name_go_to_the_end(tmp_path, demo_here):
    lines, counts = [], Counter()
    for row in read("requests"):
        kind = row["category"], row["split"]
        if row["category"] in ("sex", "neutral") and not row["near"]:
            counts[kind] += 1
            if counts[kind] <= 6:
                row["category"] = row["category"].replace("sex", "all")
                lines.append(json.dumps(row) + "\n")
    (tmp_path / "d.jsonl").write_text("".join(lines), encoding="utf-8")
    flags = ["--data", "d.jsonl", "--epochs", 1, "--device", "cpu"]
    done = demo_here(*flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = {path.name for path in (tmp_path / "runs" / "demo").iterdir()}
    assert files == {"tokens.safetensors", "results.json", "report.html"}
    assert done.stdout.count("         all | ") == 3


def test_without_the_hub_a_cuda_machine_falls_back_and_a_named_model_does_not(
    monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(train_demo, "ON_CUDA", str(tmp_path))  # an empty folder
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)
    model, _, name = train_demo.load_backbone("", "cuda")
    assert name.endswith("tiny_chat") and model.dtype == torch.bfloat16
    assert capsys.readouterr().out.count("taking the embedded backbone instead") == 1
    with pytest.raises(ValueError, match="cannot be used"):
        train_demo.load_backbone(str(tmp_path), "cuda")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    ],
)
def test_too_little_memory_gets_one_line_with_the_flag(monkeypatch, capsys, error):
    def main():
        raise error

    monkeypatch.setattr(train_demo, "main", main)
    with pytest.raises(SystemExit) as stopped:
        train_demo.run()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert "memory" in said and "lower --batch_size" in said
    error.args = ("sizes do not match",)  # a defect of ours keeps its traceback
    with pytest.raises(RuntimeError, match="sizes"):
        train_demo.run()


def test_a_character_that_the_console_lacks_does_not_end_a_run(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    monkeypatch.setattr(train_demo, "main", lambda: print("a \u2265 b", flush=True))
    train_demo.run()
    assert raw.getvalue().split() == [b"a", b"?", b"b"]


def test_a_trained_table_outlives_an_evaluation_that_fails(
    small, tmp_path, monkeypatch, capsys
):
    def evaluate(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_demo, "evaluate", evaluate)
    few = functools.partial(TrainConfig, positives_per_subset=4)
    monkeypatch.setattr(train_demo, "TrainConfig", few)
    monkeypatch.chdir(tmp_path)
    flags = ["--data", str(small / "small.jsonl"), "--epochs", "1", "--orders", "1"]
    monkeypatch.setattr(sys, "argv", ["train_demo.py", "--device", "cpu", *flags])
    with pytest.raises(SystemExit):
        train_demo.run()
    kept = sorted(path.name for path in (tmp_path / "runs" / "demo").iterdir())
    assert kept == ["tokens.safetensors", "training.pt"]


def test_categories_are_read_without_the_blanks_around_them(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("request,category,near\na, b ,\nc,neutral ,b \n")
    first, second = train_demo.read_requests(str(path))
    assert (first.category, second.category, second.near) == ("b", NEUTRAL, "b")


def test_a_chat_forgets_its_oldest_turns_where_the_model_has_no_more_room(
    backbone, tokenizer, tmp_path, monkeypatch, capsys
):
    ControlTokens.for_model(backbone, tokenizer, ["alcohol"]).save(tmp_path / "t")
    lines, seen = iter(["Hi " * 60, "And " * 60, "Then " * 60, "much " * 999]), []

    def say(prompt):
        if line := next(lines, None):
            return line
        raise EOFError

    def answer(model, tokenizer, tokens, prompts, policies, n, streamer):
        room = model.config.max_position_embeddings
        assert len(mosaic.prompt_ids(tokenizer, prompts[0])) + 5 + n <= room
        seen.append([turn["content"].split()[0] for turn in prompts[0]])
        return ["Well."]

    monkeypatch.setattr("builtins.input", say)
    monkeypatch.setattr(train_demo, "generate", answer)
    train_demo.chat(tmp_path / "t", backbone, tokenizer)
    assert seen[0] == ["Hi"] and seen[-1][-1] == "Then" and "Hi" not in seen[-1]
    assert all(said[0] != "Well." for said in seen)  # whole exchanges go
    assert len(seen) == 3 and "too long: 251 tokens fit" in capsys.readouterr().out


def test_the_demo_asks_the_network_for_nothing(monkeypatch):
    asked = []

    def resolve(*arguments, **more):
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    train_demo.load_backbone("", "cpu")
    assert len(train_demo.read_requests(train_demo.Flags().data)) == 1000
    assert asked == []


def test_without_a_network_a_hub_name_is_looked_for_once(monkeypatch):
    asked = []

    def resolve(host, *more):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(ValueError, match="cannot be used: .*not known"):
        train_demo.load_backbone("nobody/nothing", "cpu")
    assert 1 <= len(asked) <= 2
