"""README.md is run, not trusted."""

import importlib.metadata
import re
import shlex
import sys

import pytest
from conftest import README, ROOT

import mosaic
import train_demo


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", README, re.S)


def commands(script):
    """The words after `script` in each of README's command lines that runs it."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if script in line]
    return [line[line.index(script) + 1 :] for line in words if script in line]


@pytest.mark.slow
def test_the_python_block_runs_as_printed_and_prints_what_the_readme_shows(
    capsys, tmp_path, monkeypatch
):
    code = next(block for block in blocks("python") if "from mosaic import" in block)
    shown = [line[2:] for line in re.findall(r"^# .* \| .*$", code, re.M)]
    code = code.replace('.save("', f'.save("{tmp_path.as_posix()}/')
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    printed = [line for line in capsys.readouterr().out.splitlines() if " | " in line]
    assert len(printed) == len(shown) >= 2
    # The same verdict; the words may change with another processor's rounding.
    for line, expected in zip(printed, shown):
        (policy, answer), (wanted, words) = line.split(" | "), expected.split(" | ")
        assert policy == wanted
        assert mosaic.is_refusal(answer) == mosaic.is_refusal(words), line


def test_every_demo_command_of_the_readme_has_flags_that_exist(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_demo, "default_model", lambda *given: "")  # reads tables
    given = commands("train_demo.py")
    assert [] in given and len(given) >= 2
    for words in given:
        monkeypatch.setattr(sys, "argv", ["train_demo.py", *words])
        found = vars(train_demo.read_flags()[0])
        for name, value in zip(words, words[1:]):
            if name.startswith("--") and isinstance(found[name[2:]], str):
                assert found[name[2:]] == value


def test_every_benchmark_command_of_the_readme_has_flags_that_exist():
    for path in sorted({*re.findall(r"tests/benchmarks/\w+\.py", README)}):
        source = (ROOT / path).read_text(encoding="utf-8")
        for words in commands(path):
            for flag in filter(lambda word: word.startswith("--"), words):
                assert f'"{flag}"' in source, f"{path} has no {flag}"


def test_every_file_that_the_readme_names_exists():
    linked = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    named = re.findall(r"`([\w/.]+/[\w.]+\.\w+|\w+\.(?:py|md|jsonl|txt))`", README)
    assert linked and named
    made = ("runs/",)  # what commands of the README write
    lacking = [path for path in {*linked, *named}
               if not path.startswith(made) and not (ROOT / path).exists()]
    assert not lacking


# --- What differs from the paper ------------------------------------------------------


def deviations(source):
    """The text of each comment or docstring's paragraph that says it differs."""
    lines, found = source.splitlines(), []
    for i, line in enumerate(lines):
        before, marked, text = line.partition("Differs from the paper")
        if marked and not before.endswith("`"):
            comment = "#" in before
            for more in lines[i + 1 :]:
                goes_on = more.strip().startswith("#") if comment else more.strip()
                if not goes_on or '"""' in more or "Differs from" in more:
                    break
                text += " " + more
            found.append(text)
    return found


COMMON = {"about", "after", "also", "been", "befor", "best", "come", "comes", "does",
          "every", "from", "have", "here", "into", "itsel", "left", "more", "name",
          "names", "other", "over", "paper", "same", "says", "since", "speak", "stand",
          "than", "that", "their", "them", "then", "there", "they", "this", "those",
          "under", "what", "where", "which", "whose", "with", "write"}


def words(text):
    """Numbers, and words of four letters or more, cut to five: a rough common form."""
    found = re.findall(r"[a-z]{4,}|\d[\d.]*\d", text.lower())
    return {word[:5] for word in found} - COMMON


def unexplained(texts, rows):
    """The deviations without a row that shares two words with them alone.

    With them alone: words of another deviation do not count.
    """
    lacking = []
    for i, text in enumerate(texts):
        own = words(text).difference(*(words(t) for j, t in enumerate(texts) if j != i))
        if not any(len(own & words(row)) >= 2 for row in rows):
            lacking.append((" ".join(text.split()), sorted(own)))
    return lacking


def test_the_check_of_deviations_finds_one_without_a_row():
    source = '''
    """How tokens stand.

    Differs from the paper: the turn of the user holds
    the vectors.

    No part of it.
    """
    # Differs from the paper, which names no schedule: a cosine
    # that falls to zero.
    lr = 1
    answer_tokens: int = 16  # Differs from the paper (256): where references end
    '''
    texts = deviations(source)
    assert len(texts) == 3 and "vectors" in texts[0] and "No part" not in texts[0]
    assert texts[1].endswith("falls to zero.")
    rows = ["| place | the user's turn holds vectors |", "| rate | cosine schedule |"]
    ((lacking, own),) = unexplained(texts, rows)
    assert lacking.startswith("(256)") and "256" in own
    assert not unexplained(texts, [*rows, "| references | 16 ids, not 256 |"])
    assert len(unexplained(texts, ["| how tokens differ from the paper |"])) == 3


def test_every_deviation_in_the_code_has_a_row_in_the_readmes_table():
    texts = deviations((ROOT / "mosaic.py").read_text(encoding="utf-8"))
    table = re.split(r"\n## .*differs from the paper.*\n", README)[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(texts) >= 8 and not unexplained(texts, rows)


def test_the_versions_of_the_readme_and_those_installed_are_the_pinned_ones():
    pins = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    pinned = dict(pin.split("==") for pin in pins)
    assert {*pinned} >= {"torch", "transformers", "tqdm"}
    for name, version in pinned.items():
        assert importlib.metadata.version(name).split("+")[0] == version
    for name in ("torch", "transformers"):
        said = re.findall(rf"\b{name} (\d+\.[\d.]*\d)", README)
        assert any(f"{pinned[name]}.".startswith(f"{one}.") for one in said), name
