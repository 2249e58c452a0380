"""train_demo.py from outside: a short run, and what users get wrong."""

import json
import re
import socket
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from conftest import EMBEDDED, ROOT, read
from safetensors.torch import load_file, save_file

import train_demo

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


def demo(*flags, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / "train_demo.py"), *map(str, flags)],
        cwd=cwd,
        capture_output=True,
        text=True,
    )


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
        assert row["dsr"]["rate"] > 0.6 and row["over_refusal"]["rate"] < 0.15, row
        for name in ("dsr", "over_refusal", "near_miss"):
            cell = row[name]
            assert (
                0 <= cell["low"] <= cell["rate"] <= cell["high"] <= 1 and cell["n"] > 0
            )
    assert [row["order"] for row in results["instruction"]] == [1, 2]
    assert [set(row) for row in results["instruction"]] == [
        {"order", "policies", "dsr", "over_refusal", "near_miss"}
    ] * 2
    assert set(results["config"]) == {one.name for one in fields(train_demo.Flags)}
    assert set(results["backbone"]) == {"parameters", "refusal_rate", "n"}
    assert results["drift"]["kl"] >= 0 and 0 <= results["drift"]["top1_agreement"] <= 1
    assert set(results["seconds"]) == {"reference", "train", "evaluate"}


def test_a_run_says_what_is_trained_and_shows_answers_under_policies(run):
    done, _ = run
    first, second = done.stdout.splitlines()[:2]
    assert first.startswith("trained: 1,920 numbers") and second.startswith("frozen:")
    for row in ("untouched backbone", "written instruction", "MOSAIC"):
        assert f"\n{row}" in done.stdout
    for title in ("none |", "alcohol |", "betting |", "all |"):
        assert done.stdout.count(title) >= 2
    assert done.stdout.count("epoch ") == 4


def test_a_saved_table_is_evaluated_without_training(run, small):
    _, results = run
    done = demo(
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
    assert [p.name for p in (small / "again").iterdir()] == ["results.json"]


ROW = '{"request": "a", "category": "b", "split": "train"}\n'
TEST = '{"request": "c", "category": "b", "split": "test"}\n'
DATA = ["--data", "d.jsonl"]
WRONG = {  # name: (flags, content of d.jsonl, what the line must say)
    "unknown flag": (
        ["--epoch_count", "3"],
        None,
        "unknown flag ['--epoch_count', '3']",
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
    "no test split": (DATA, ROW, "no request has split 'test'"),
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
    "missing model": (["--model", "./none"], None, "no model folder ./none; give one"),
    "unreadable model": (["--model", "."], None, "model . cannot be used"),
    "missing table": (["--tokens", "none"], None, "none is no readable token table"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_gets_one_line_exit_code_2_and_no_file(
    name, tmp_path, monkeypatch, capsys
):
    flags, data, expected = WRONG[name]
    if data is not None:
        (tmp_path / "d.jsonl").write_text(data, encoding="utf-8")
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
    run, small, tmp_path
):
    (tmp_path / "d.jsonl").write_text(
        '{"request": "a", "category": "tobacco", "split": "test"}\n', encoding="utf-8"
    )
    table = small / "runs" / "demo" / "tokens.safetensors"
    done = demo("--data", "d.jsonl", "--tokens", table, "--device", "cpu", cwd=tmp_path)
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
        else:
            weights["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "how, expected",
    [
        ("broken template", "cannot be used: Unexpected end of template"),
        ("truncated weights", "cannot be used"),
        ("a weight missing", "1 missing keys, first model.layers.0.mlp.up_proj.weight"),
        (
            "a weight too many",
            "1 unexpected keys, first model.layers.9.mlp.up_proj.weight",
        ),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused_before_anything_runs(
    tmp_path, how, expected
):
    broken_copy(tmp_path / "broken", how)
    with pytest.raises(ValueError, match=re.escape(expected)):
        train_demo.load_backbone(str(tmp_path / "broken"), "cpu")


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
