"""README.md is run, not trusted."""

import os
import re
import shlex
import sys

import pytest
import torch
from conftest import README, ROOT

import mosaic
import train_demo


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", README, re.S)


def test_the_python_block_runs_as_printed_and_prints_what_the_readme_shows(
    capsys, tmp_path, monkeypatch
):
    code, before = blocks("python")[0], os.getcwd()
    known, make = {}, mosaic.reference_answers

    def once(*given):  # both of its runs want the same answers
        return known or known.update(make(*given)) or known

    monkeypatch.setattr(mosaic, "reference_answers", once)
    code = code.replace("tokens.safetensors", str(tmp_path / "tokens.safetensors"))
    os.chdir(ROOT)
    try:
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    finally:
        os.chdir(before)
    shown = [line[2:] for line in re.findall(r"^# .*$", code, re.M) if " | " in line]
    printed = [line for line in capsys.readouterr().out.splitlines() if " | " in line]
    assert [line.split(" | ")[0] for line in printed] == [
        s.split(" | ")[0] for s in shown
    ]
    # The same words, up to what another processor's rounding may change in an answer.
    for line, expected in zip(printed, shown):
        assert mosaic.is_refusal(line.split(" | ")[1]) == mosaic.is_refusal(
            expected.split(" | ")[1]
        )
    assert len(shown) >= 2


@pytest.mark.parametrize(
    "line",
    [
        line
        for block in blocks("bash")
        for line in block.replace("\\\n", " ").splitlines()
        if "train_demo.py" in line
    ],
)
def test_every_demo_command_of_the_readme_has_flags_that_exist(
    line, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line.split("#")[0])
    monkeypatch.setattr(sys, "argv", words[words.index("train_demo.py") :])
    assert train_demo.read_flags().epochs > 0


def test_every_file_that_the_readme_names_exists():
    for path in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / path).exists(), path


def test_every_deviation_in_the_code_has_a_row_in_the_readmes_table():
    source = (ROOT / "mosaic.py").read_text(encoding="utf-8")
    count = (
        len(re.findall(r"Differs\s+(#\s+)?from\s+(#\s+)?the\s+(#\s+)?paper", source))
        - 1
    )
    table = README.split("## Where it differs from the paper")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= count > 5


def test_the_versions_of_the_readme_are_those_of_the_requirements():
    pins = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert [pin.split("==")[0] for pin in pins] == [
        "torch",
        "transformers",
        "datasets",
        "tqdm",
        "pytest",
    ]
    assert f"{torch.__version__.split('+')[0]}" in pins[0] and "torch 2.13" in README
