"""train_demo.py from outside: what a run leaves, and what users get wrong."""

import contextlib
import dataclasses
import io
import json
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import EMBEDDED, ROOT, read, tiny_model
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel
)

import mosaic
import train_demo
from data_sample import reading
from mosaic import REFUSAL, ControlTokens

GGUF = ROOT / "runs" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
TABLE = "runs/demo/tokens.safetensors"
SHIPPED = EMBEDDED.parent / "tokens.safetensors"


def write_few(path, categories, train, test, seen=0):
    """Some of the sample's rows: so many of each category and kind of near miss."""
    counts, kept = Counter(), []
    for row in read("requests"):
        kind = row["category"], row["near"], row["split"]
        counts[kind] += 1
        most = {"train": train, "test": test, "validation": seen}[row["split"]]
        if {row["category"], row["near"]} <= {*categories, "neutral", None}:
            kept += [json.dumps(row) + "\n"] * (counts[kind] <= most)
    path.write_text("".join(kept), encoding="utf-8")


def call(*flags):
    """`python train_demo.py FLAGS` here: without six seconds of imports."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(sys, "argv", ["train_demo.py", *map(str, flags)])
        out, err = io.TextIOWrapper(io.BytesIO()), io.StringIO()
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        code = 0
        try:
            train_demo.run()
        except SystemExit as stopped:
            code = stopped.code
        out.seek(0)
        return SimpleNamespace(code=code, out=out.read(), err=err.getvalue())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer):
    """A folder with a checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama", tokenizer, max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A whole short run in a folder: (what it said, its results, the folder)."""
    folder = tmp_path_factory.mktemp("demo")
    write_few(folder / "few.jsonl", ("alcohol", "betting"), train=4, test=3)
    with contextlib.chdir(folder):
        done = call("--model", tiny, "--data", "few.jsonl", "--device", "cpu",
                    "--epochs", 2, "--positives_per_subset", 4, "--answer_tokens", 4,
                    "--tokens_per_category", 5, "--place", "before")
    assert done.code == 0, done.err
    return done, json.loads((folder / "runs/demo/results.json").read_text()), folder


# --- A run ----------------------------------------------------------------------------


def test_a_run_leaves_a_table_its_results_and_a_report(run, tiny):
    _, results, folder = run
    assert {path.name for path in (folder / "runs/demo").iterdir()} == {
        "tokens.safetensors", "results.json", "report.html"
    }
    assert set(results) == {
        "model", "settings", "backbone_declines", "orders", "instruction"
    }
    assert results["model"] == str(tiny) and results["settings"]["epochs"] == 2
    assert results["backbone_declines"] == {"requests": 0, "of": 15}
    # Of 3 tests per kind: two categories, neutral ones, and near misses of both.
    for name in ("orders", "instruction"):
        one, two = results[name]
        asked = [cell[key]["n"] for cell in (one, two)
                 for key in ("dsr", "over_refusal", "near_miss")]
        assert asked == [6, 6 + 6, 12, 6, 3, 6]


def test_a_run_says_what_is_trained_and_shows_answers_under_policies(run):
    done, results, _ = run
    read, trained, frozen = done.out.splitlines()[:3]
    assert read.endswith("alcohol 4/0/3, betting 4/0/3, neutral 12/0/9")
    assert trained == (
        "trained: 320 numbers, 5 control tokens for each of alcohol, betting"
    )
    assert frozen.startswith("frozen:  ") and "weights of" in frozen
    assert "declines 0 of 15 test requests by itself" in done.out
    for title in ("written instruction, order 1  ", "MOSAIC, order 2  "):
        assert done.out.count(title) == 1
    assert re.findall(r"^epoch (\d/2)   refusal", done.out, re.M) == ["1/2", "2/2"]
    for title in ("none |", "alcohol |", "betting |", "all |"):
        assert done.out.count(title) == 2


def test_a_saved_table_is_evaluated_as_it_was_without_training(run, tiny):
    _, results, folder = run
    with contextlib.chdir(folder):
        (folder / "again").mkdir()
        (folder / "again/training.pt").write_bytes(b"of a run that was stopped")
        done = call("--model", tiny, "--data", "few.jsonl", "--device", "cpu",
                    "--tokens", TABLE, "--output", "again")
    assert done.code == 0 and "trained: nothing\n" in done.out, done.err
    again = json.loads((folder / "again/results.json").read_text())
    assert again["orders"] == results["orders"]
    for knob in "epochs", "positives_per_subset", "place":  # its own, not the defaults
        assert again["settings"][knob] == results["settings"][knob]
    assert {path.name for path in (folder / "again").iterdir()} == {
        "results.json", "report.html", "training.pt"
    }


def test_a_folder_keeps_a_table_of_other_categories(run, tiny):
    with contextlib.chdir(run[2]):
        before = Path("runs/demo/tokens.safetensors").read_bytes()
        rows = Path("few.jsonl").read_text(encoding="utf-8")
        Path("golf.jsonl").write_text(rows.replace('"betting"', '"golf"'))
        done = call("--model", tiny, "--data", "golf.jsonl", "--device", "cpu")
        assert done.code == 2
        assert "--output runs/demo has a table of categories alcohol, " in done.err
        assert Path("runs/demo/tokens.safetensors").read_bytes() == before
        # Nor does a table that grows take the place of one that grew otherwise.
        shutil.copytree("runs/demo", "mine")
        done = call("--model", tiny, "--data", "golf.jsonl", "--device", "cpu",
                    "--tokens", "mine/tokens.safetensors", "--add", "golf")
        assert done.code == 2
        assert "--output runs/demo has a table of categories alcohol, " in done.err
        assert Path("runs/demo/tokens.safetensors").read_bytes() == before


def test_a_folder_keeps_the_results_of_its_own_table(run, tiny):
    folder = run[2]
    before = (folder / "runs/demo/results.json").read_bytes()
    with contextlib.chdir(folder):
        shutil.copy(TABLE, "other.safetensors")
        done = call("--model", tiny, "--data", "few.jsonl", "--device", "cpu",
                    "--tokens", "other.safetensors")
    assert done.code == 2
    assert f"--output runs/demo has a table, for {tiny.name}: give" in done.err
    assert (folder / "runs/demo/results.json").read_bytes() == before


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder like it")
def test_a_folder_that_takes_no_file_is_told_before_anything_is_read(run, tiny):
    with contextlib.chdir(run[2]):
        done = call("--model", tiny, "--data", "few.jsonl", "--device", "cpu",
                    "--output", "/proc/self")
    assert done.code == 2 and "'/proc/self/" in done.err and "read:" not in done.out


def test_a_saved_table_grows_by_a_category_and_keeps_its_vectors(run, tiny):
    folder = run[2]
    write_few(folder / "more.jsonl", ("alcohol", "betting", "horror"), 2, 1)
    with contextlib.chdir(folder):
        done = call("--model", tiny, "--data", "more.jsonl", "--device", "cpu",
                    "--tokens", TABLE, "--add", "horror", "--output", "grown",
                    "--epochs", 1, "--positives_per_subset", 2, "--orders", 1,
                    "--answer_tokens", 4, "--export", "served",
                    "--tokens_per_category", 9)
    assert done.code == 0, done.err
    noted = json.loads((folder / "grown/results.json").read_text())["settings"]
    assert (noted["tokens_per_category"], noted["place"]) == (5, "before")  # its own
    grown = ControlTokens.load(folder / "grown/tokens.safetensors")
    assert grown.made_for["place"] == "before"
    assert "trained: 160 numbers, 5 control tokens for each of horror\n" in done.out
    assert "frozen:  alcohol's tokens, betting's tokens, " in done.out
    old, new = load_file(folder / TABLE), load_file(folder / "grown/tokens.safetensors")
    assert set(new) == {*old, "horror"}
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert "exported to served" in done.out
    assert "<|horror:4|>" in (folder / "served/chat_template.jinja").read_text()


def test_the_report_shows_the_results_loads_nothing_and_holds_no_foreign_html(
    run, tmp_path
):
    _, results, folder = run
    page = (folder / "runs/demo/report.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|<link|src=|https?:|@import", page)
    for cell in (*results["orders"], *results["instruction"]):
        for key in ("dsr", "over_refusal", "near_miss"):
            rate, low, high = (100 * cell[key][k] for k in ("rate", "low", "high"))
            assert f"{rate:.1f} [{low:.1f}, {high:.1f}]" in page
    assert page.count("alcohol: ") == page.count("betting: ") == 1
    shown = [("a: <b>&", "none", "<script>")]
    train_demo.write_results(tmp_path, results | {"model": "<i>"}, shown)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "a: &lt;b&gt;&amp;" in page and "&lt;script&gt;" in page
    assert "<script" not in page and "<i>" not in page and "<b>" not in page


def test_requests_that_the_backbone_declines_are_left_out_and_counted(
    run, tiny, monkeypatch
):
    folder, answers = run[2], mosaic.reference_answers
    with contextlib.chdir(folder):
        asked = [q for q in reading.read_requests("few.jsonl") if q.split == "test"]
        kinds = {(q.category, q.near): q.prompt for q in asked}  # one of each
        declined = {*kinds.values()} - {kinds["betting", None]}

        def some_declined(*given):
            return [
                dataclasses.replace(r, text=REFUSAL) if r.prompt in declined else r
                for r in answers(*given)
            ]

        monkeypatch.setattr(mosaic, "reference_answers", some_declined)
        done = call("--model", tiny, "--data", "few.jsonl", "--device", "cpu",
                    "--tokens", TABLE, "--output", "fewer")
    assert "the backbone declines 4 of 15 test requests by itself" in done.out
    results = json.loads((folder / "fewer/results.json").read_text())
    assert results["backbone_declines"] == {"requests": 4, "of": 15}
    one, two = results["orders"]
    assert [one[key]["n"] for key in ("dsr", "over_refusal", "near_miss")] == [5, 9, 8]
    assert [two[key]["n"] for key in ("dsr", "over_refusal", "near_miss")] == [5, 2, 4]


def test_answers_are_shown_for_categories_of_any_name(backbone, tokenizer, monkeypatch):
    names = ["none", "all"]
    tokens = ControlTokens.for_model(backbone, tokenizer, names)
    asked = [mosaic.Request("Hi", name) for name in names]
    policies = []

    def answer(model, tokenizer, tokens, prompts, given, length):
        policies.extend(given)
        return ["Well."] * len(prompts)

    monkeypatch.setattr(train_demo, "generate", answer)
    shown = train_demo.show_answers(backbone, tokenizer, tokens, asked)
    assert policies == [[], ["none"], ["all"], names, [], ["all"], ["none"], names]
    assert [name for _, name, _ in shown] == [
        "none", "none", "all", "all", "none", "all", "none", "all"
    ]


@pytest.mark.parametrize("part", ["evaluate", "mosaic.export_checkpoint"])
def test_a_training_outlives_what_fails_behind_it(part, run, tiny, tmp_path):
    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(tmp_path):
        shutil.copytree(run[2] / "runs", "runs")
        patch.setattr(f"train_demo.{part}", fail)
        done = call("--model", tiny, "--data", run[2] / "few.jsonl", "--device", "cpu",
                    "--epochs", 1, "--positives_per_subset", 2, "--answer_tokens", 2,
                    "--export", "served")
    assert done.code == 2
    kept = {path.name for path in (tmp_path / "runs/demo").iterdir()}
    assert kept >= {"tokens.safetensors", "training.pt"}
    old = kept & {"results.json", "report.html"}  # of the table before
    assert not old if part == "evaluate" else len(old) == 2


@pytest.mark.slow
def test_a_short_run_of_the_embedded_backbone_declines_what_it_should(tmp_path):
    write_few(tmp_path / "small.jsonl", ("alcohol", "betting"), 90, 8)
    flags = ["--data", "small.jsonl", "--epochs", "4", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_demo.py"), *flags],
        cwd=tmp_path, capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "runs/demo/results.json").read_text())
    assert results["model"].endswith("tiny_chat")
    assert results["backbone_declines"]["requests"] <= 2
    for cell in results["orders"]:
        dsr, over = cell["dsr"]["rate"], cell["over_refusal"]["rate"]
        # Four epochs are few: at order 2 a third of all else is declined as well.
        assert dsr > 0.6 and dsr - over > 0.3 and over < 0.2 * cell["order"] ** 2, cell


def test_figures_stand_under_their_titles():
    def cell(*declined):
        shares = [mosaic.share([True] * n + [False] * (10 - n)) for n in declined]
        return {"order": 1, **dict(zip(("dsr", "over_refusal", "near_miss"), shares))}

    figures = {"orders": [cell(9, 2, 4)], "instruction": [cell(5, 1, 3)]}
    rows = [[title, *(share.split()[0] for share in shares)]
            for title, *shares in train_demo.percents(figures)]
    assert rows == [["written instruction, order 1", "50.0", "10.0", "30.0"],
                    ["MOSAIC, order 1", "90.0", "20.0", "40.0"]]


def test_the_rule_and_the_tokens_are_each_measured_under_their_policies(
    backbone, tokenizer, monkeypatch
):
    names, no = ["golf", "tea"], "Njet, njet, njet."
    table = ControlTokens.for_model(backbone, tokenizer, names, refusal=no)

    def answer(model, tokenizer, tokens, prompts, policies, length, title):
        if tokens is None:  # the rule is read before the request
            off = [p[-1]["content"] in p[0]["content"] for p in prompts]
        else:
            off = [p in policy for p, policy in zip(prompts, policies)]
        return [no if one else "Well." for one in off]

    monkeypatch.setattr(train_demo, "generate", answer)
    asked = [mosaic.Request(name, name) for name in names]
    figures = train_demo.measure(backbone, tokenizer, table, asked, {})
    assert [*figures] == ["instruction", "orders"]
    for cells in figures.values():
        assert [cell["dsr"]["rate"] for cell in cells] == [1, 1]
        assert cells[0]["over_refusal"]["rate"] == 0


def test_a_prompt_fits_with_all_categories_in_each_turn(tokenizer):
    model = tiny_model("llama", tokenizer)
    tokens = ControlTokens.for_model(model, tokenizer, ["a", "b"], 3)
    roles = "user", "assistant", "user"
    chat = [{"role": role, "content": "Odds?"} for role in roles]
    need = len(mosaic.prompt_ids(tokenizer, chat, "after")) + 2 * 6 + 8
    for room in need, need - 1:
        model.config.max_position_embeddings = room
        assert train_demo.fits(model, tokenizer, tokens, chat, 8) == (room == need)


# --- The written instruction ----------------------------------------------------------

TURNS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}"
)
TEMPLATES = {
    "a system role": (TURNS, 2),
    "refuses system messages, as Gemma": (NO_SYSTEM + TURNS, 1),
    "drops system messages, as Phi 3": (
        TURNS.replace("in messages", "in messages if m.role != 'system'"), 1
    ),
    "no template": (None, 2),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_written_rule_reaches_the_model_with_or_without_a_system_role(kind):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizer.chat_template, messages = TEMPLATES[kind]
    summaries = {"betting": "Betting: wagering for money.", "sex": "Sex: desire."}
    prompt, policy = "Odds of 7/2?", ["betting", "golf"]
    turns = train_demo.instruct(prompt, policy, summaries, tokenizer)
    text = tokenizer.decode(mosaic.prompt_ids(tokenizer, turns))
    for said in ("- Betting: wagering for money. - golf", REFUSAL, prompt):
        assert text.count(said) == 1
    assert "desire" not in text and len(turns) == messages
    # In a chat the rule comes first, and no turn is lost.
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    chat += [{"role": "user", "content": prompt}]
    turns = train_demo.instruct(chat, policy, summaries, tokenizer)
    text = tokenizer.decode(mosaic.prompt_ids(tokenizer, turns))
    places = [text.index(said) for said in (REFUSAL, "Hi", "Yes?", prompt)]
    assert places == sorted(places) and turns[1:][-2:] == chat[1:]


# --- Chat -----------------------------------------------------------------------------


@pytest.fixture
def talk(backbone, tokenizer, tmp_path, monkeypatch, capsys):
    """What a chat of these lines says, and the (turns, policy) of each answer."""

    def call(*lines, answer=None):
        names = ["alcohol", "betting"]
        ControlTokens.for_model(backbone, tokenizer, names).save(tmp_path / "t")
        left, seen = iter(lines), []

        def say(prompt):
            print(prompt)
            if (line := next(left, None)) is None:
                raise EOFError
            return line

        def recorded(model, tokenizer, tokens, prompts, policies, length, streamer):
            seen.append(([turn["content"] for turn in prompts[0]], policies[0]))
            fits = model.config.max_position_embeddings - length - 40
            assert len(mosaic.prompt_ids(tokenizer, prompts[0])) <= fits
            return [answer(seen[-1][0][-1])]

        monkeypatch.setattr("builtins.input", say)
        if answer:
            monkeypatch.setattr(train_demo, "generate", recorded)
        train_demo.chat(tmp_path / "t", backbone, tokenizer)
        return capsys.readouterr().out, seen

    return call


def test_a_chat_switches_its_policy_at_any_turn(talk):
    said, seen = talk(
        "Hi", "/on betting", "Hm", "/on alcohol", "/on golf",
        "/why", "Ha", "/off betting", "Ho", "/quit", "never read",
        answer=lambda words: "Well.",
    )
    both = ["alcohol", "betting"]  # as the table has them
    assert [policy for _, policy in seen] == [[], ["betting"], both, ["alcohol"]]
    for line in ("/on golf", "/why"):
        assert f"{line}? /on X, /off X (X of alcohol, betting), /reset" in said


def test_a_chat_keeps_its_history_until_reset_and_ends_when_interrupted(talk):
    def answer(words):
        if words == "Stop me":
            raise KeyboardInterrupt
        return "Well."

    said, seen = talk("Hi", "And?", "/reset", "Hi", "Stop me", "Ha", answer=answer)
    turns = [turns for turns, _ in seen]
    assert turns[:3] == [["Hi"], ["Hi", "Well.", "And?"], ["Hi"]]
    assert turns[3:] == [["Hi", "Well.", "Stop me"]]


def test_a_chat_forgets_its_oldest_exchanges_where_there_is_no_more_room(talk):
    lines = "Hi " * 60, "And " * 60, "Then " * 60, "much " * 999
    said, seen = talk(*lines, answer=lambda words: "Well.")
    assert len(seen) == 3 and "too long for the model" in said
    turns = [turn.split()[0] for turn in seen[-1][0]]
    assert turns[-1] == "Then" and "Hi" not in turns and turns[0] != "Well."
    said, seen = talk("Hi", "much " * 999, "And?", answer=lambda words: "Well.")
    assert seen[-1][0] == ["Hi", "Well.", "And?"]  # the long one changes nothing


def test_a_chat_takes_bytes_that_are_no_utf_8(talk):
    said, seen = talk("\udcff?", answer=lambda words: "Well.")
    assert seen[0][0] == ["??"]


def test_a_chat_shows_the_answer_while_it_is_made(
    talk, backbone, tokenizer, monkeypatch
):
    monkeypatch.setattr(train_demo, "TALK_TOKENS", 8)
    said, _ = talk("What goes in a stew?")
    (answer,) = mosaic.generate(
        backbone, tokenizer, None, ["What goes in a stew?"], None, 8
    )
    assert answer in said


# --- Mistakes -------------------------------------------------------------------------

ROW = '{"request": "a", "category": "b", "split": "train"}\n'
TEST = '{"request": "c", "category": "b", "split": "test"}\n'
NEUTRAL_ROW = '{"request": "n", "category": "neutral", "split": "train"}\n'
GOOD = ROW + TEST + NEUTRAL_ROW
DATA = "--data d.jsonl "
WRONG = [  # (flags, content of d.jsonl, what the line must say)
    # The command line
    ("--epoch_count 3", None, "unrecognized arguments: --epoch_count 3"),
    ("--epoch 3", None, "unrecognized arguments: --epoch 3"),
    ("demo", None, "unrecognized arguments: demo"),
    ("--epochs many", None, "argument --epochs: invalid int value: 'many'"),
    ("--data", None, "argument --data: expected one argument"),
    ("--orders", None, "argument --orders: expected at least one"),
    ("--optimizer sgd", None, "optimizer is 'sgd'; take muon or adam"),
    ("--device tpu", None, "argument --device: invalid choice: 'tpu'"),
    ("--add golf", None, "--add grows a saved table: give --tokens"),
    (f"--add golf --tokens {SHIPPED} --output {SHIPPED.parent}", None, "has a table"),
    (f"--model other --output {SHIPPED.parent}", None, "has a table, for tiny_chat:"),
    ("--export .", None, "--export . exists already; name a folder that does not"),
    ("--export x/y --output x/y/", None, "--export x/y exists already"),
    ("--export x --output x/y", None, "--export x exists already"),
    (DATA + "--output d.jsonl", GOOD, "File exists: 'd.jsonl'"),
    (DATA + "--output d.jsonl/deeper", GOOD, "Not a directory: 'd.jsonl/deeper'"),
    ("--tokens_per_category 0", None, "cannot make 0 tokens for each"),
    # The ranges of TrainConfig
    ("--epochs 0", None, "epochs is 0; it must be a whole number in 1..1e+09"),
    ("--batch_size -1", None, "batch_size is -1; it must be"),
    ("--answer_tokens 0", None, "answer_tokens is 0; it must be"),
    ("--positives_per_subset 0", None, "positives_per_subset is 0; it must be"),
    ("--negatives_per_positive -1", None, "negatives_per_positive is -1.0; it must be"),
    ("--learning_rate 0", None, "learning_rate is 0.0; it must be"),
    ("--learning_rate nan", None, "learning_rate is nan; it must be"),
    ("--learning_rate inf", None, "learning_rate is inf; it must be"),
    ("--kd_weight -1", None, "kd_weight is -1.0; it must be"),
    ("--first_weight -1", None, "first_weight is -1.0; it must be"),
    ("--later_weight -1", None, "later_weight is -1.0; it must be"),
    ("--later_turns 1.5", None, "later_turns is 1.5; it must be"),
    ("--seed -1", None, "seed is -1; it must be"),
    (f"--seed {10**20}", None, f"seed is {10**20}; it must be"),
    # The data (test_reading.py has what is within it)
    (DATA, None, "d.jsonl: no such file"),
    (DATA, ROW + "{oops\n", "d.jsonl:2: not JSON"),
    (DATA + "--category_column topic", ROW, "no column 'topic', only request,"),
    (DATA, NEUTRAL_ROW, "d.jsonl: no request to learn from"),
    (DATA, TEST, "d.jsonl: no request to learn from"),
    (DATA, ROW + NEUTRAL_ROW, "d.jsonl: no request has split 'test'"),
    (DATA, ROW + TEST, "d.jsonl: no training request of category 'neutral'; training"),
    (DATA, ROW + TEST.replace('"b"', '"e"'),
     "d.jsonl, 'c': unknown category 'e': no training request"),
    (f"{DATA}--tokens {SHIPPED}", GOOD,
     "unknown category 'b': not in the table; --add trains it"),
    (
        DATA, GOOD + NEUTRAL_ROW.replace("}", ', "near": "no"}').replace("n", "m", 1),
        "unknown category 'no'",
    ),
    (
        DATA, GOOD + ROW.replace('"a"', '"' + "word " * 9999 + '"'),
        "too long for the model, with tokens and an answer",
    ),
    (  # an answer, after another one of a turn before
        DATA + "--answer_tokens 300", GOOD,
        "too long for the model after another; take --later_turns 0",
    ),
    # The summaries
    ("--summaries none.json", None, "No such file or directory: 'none.json'"),
    ("--summaries d.jsonl", "{oops", 'd.jsonl: it must be JSON like {"alcohol": "'),
    ("--summaries d.jsonl", '["a"]', 'd.jsonl: it must be JSON like {"alcohol": "'),
    ("--summaries d.jsonl", '{"a": 1}', "d.jsonl: it must be JSON like {"),
    ("--summaries d.jsonl", "\udcff", "d.jsonl:1: not in UTF-8; save the file as"),
    (
        "--summaries d.jsonl", json.dumps({"alcohol": "word " * 9999}),
        "too long for the model with the written instruction; shorten the sentences of",
    ),
    (
        "--summaries d.jsonl", '{"Alcohol": "Drinks."}',
        "d.jsonl: unknown category Alcohol; known here are addiction, alcohol, ",
    ),
    # The table
    ("--tokens none", None, "none is no table to use here"),
    ("--chat none", None, "none is no table to use here"),
    (DATA + "--tokens d.jsonl", ROW, "d.jsonl is no table to use here"),
    ("--tokens .", None, ". is no table to use here"),
    # The model
    ("--model a b", None, "unrecognized arguments: b"),
    ("--model ./none", None, "no model ./none; give the folder of"),
    (DATA + "--model d.jsonl", GOOD, "no model d.jsonl; give the folder of"),
    ("--model .", None, "model . cannot be used: "),
    ("--model none.gguf", None, "no model none.gguf; give"),
]


@pytest.mark.parametrize("flags, data, expected", WRONG)
def test_a_mistake_gets_one_line_exit_code_2_and_no_file(
    flags, data, expected, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    if data is not None:
        text = data.encode("utf-8", "surrogateescape")
        (tmp_path / "d.jsonl").write_bytes(text)
    before = sorted(tmp_path.iterdir())
    done = call("--device", "cpu", *flags.split())
    assert done.code == 2 and done.out == "" and sorted(tmp_path.iterdir()) == before
    assert expected in done.err and done.err.startswith("train_demo.py: ")
    assert len(done.err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_gpu_that_is_not_there_is_a_mistake():
    done = call("--device", "cuda")
    assert done.code == 2 and "invalid choice: 'cuda' (choose from " in done.err


def test_a_category_unknown_to_a_saved_table_is_named_with_its_request(
    run, tiny, tmp_path
):
    data = tmp_path / "d.jsonl"
    data.write_text(TEST.replace('"b"', '"tobacco"'), encoding="utf-8")
    done = call("--data", data, "--model", tiny, "--device", "cpu",
                "--tokens", run[2] / TABLE, "--output", tmp_path / "out")
    assert done.code == 2 and "d.jsonl, 'c': unknown category 'tobacco'" in done.err
    assert "known here are alcohol, betting, neutral" in done.err


def test_a_request_that_the_chat_template_refuses_is_named_with_its_words(
    run, tiny, tmp_path
):
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    template = TEMPLATES["refuses system messages, as Gemma"][0]
    (tmp_path / "chat_template.jinja").write_text(template)
    roles = "system", "user"
    turns = [{"role": role, "content": "a"} for role in roles]
    row = json.dumps({"request": turns, "category": "b", "split": "train"}) + "\n"
    (tmp_path / "d.jsonl").write_text(TEST + NEUTRAL_ROW + row, encoding="utf-8")
    done = call("--data", tmp_path / "d.jsonl", "--model", tmp_path, "--device", "cpu")
    assert done.code == 2 and "'content': 'a'}" in done.err
    assert done.err.endswith(": no system role\n")


def test_only_training_requests_need_room_for_another_turn(backbone, tokenizer):
    tokens = ControlTokens.for_model(backbone, tokenizer, ["b"], 2)
    kinds = ("b", "train"), ("neutral", "train"), ("b", "test")
    short = [mosaic.Request("Odds?", *kind) for kind in kinds]
    flags = SimpleNamespace(data="d", summaries="s", tokens="")

    def check(split, later_turns=0.5):
        long = mosaic.Request("word " * 220, "b", split)
        config = mosaic.TrainConfig(later_turns=later_turns)
        train_demo.check_fit(
            flags, config, backbone, tokenizer, tokens, [*short, long], {})

    check("test")
    check("train", later_turns=0)
    with pytest.raises(ValueError, match="too long for the model after another"):
        check("train")
    tokens.freeze(["b"])
    check("train")  # nothing is trained


def test_a_template_of_a_single_turn_is_told_before_it_is_trained(tiny, tmp_path):
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    own = (tiny / "chat_template.jinja").read_text()
    no = "{{ raise_exception('one turn') }}"
    single = "{% if messages | length > 1 %}" + no + "{% endif %}"
    (tmp_path / "chat_template.jinja").write_text(single + own)
    (tmp_path / "d.jsonl").write_text(GOOD, encoding="utf-8")
    done = call("--data", tmp_path / "d.jsonl", "--model", tmp_path, "--device", "cpu")
    assert done.code == 2 and done.err.endswith("'a': one turn\n")


@pytest.mark.parametrize(
    "flags, rows, expected",
    [
        ("--orders 0", GOOD, "with orders (0,): take a category not frozen"),
        ("--orders 1 2", GOOD, "with orders (1, 2): take a category not frozen"),
    ],
)
def test_what_the_training_refuses_is_told_in_one_line_before_its_first_step(
    flags, rows, expected, tiny, tmp_path
):
    (tmp_path / "d.jsonl").write_text(rows, encoding="utf-8")
    done = call("--data", tmp_path / "d.jsonl", "--model", tiny, "--device", "cpu",
                "--output", tmp_path / "out", *flags.split())
    assert done.code == 2 and expected in done.err.splitlines()[-1]
    assert "epoch" not in done.out and not [*(tmp_path / "out").iterdir()]


def test_a_model_whose_answers_cannot_end_is_refused_before_the_training(
    run, tiny, tmp_path, monkeypatch
):
    def without_end(name, device):
        model, own, _ = load(name, device)
        own.eos_token = model.generation_config.eos_token_id = None
        own.chat_template = TEMPLATES["a system role"][0]
        return model, own, name

    load = train_demo.load_backbone
    monkeypatch.setattr(train_demo, "load_backbone", without_end)
    monkeypatch.setattr(mosaic, "reference_answers", lambda *given: [])
    monkeypatch.setattr(mosaic, "training_references", None)  # nothing gets that far
    done = call("--data", run[2] / "few.jsonl", "--model", tiny, "--device", "cpu",
                "--output", tmp_path)
    assert done.code == 2 and "nothing ends an answer: set tokenizer.eos_" in done.err


def throw(error):
    raise error


def test_a_full_disk_is_told_in_one_line(monkeypatch):
    told = "I/O error: No space left on device (os error 28)"
    monkeypatch.setattr(train_demo, "main", lambda: throw(SafetensorError(told)))
    assert vars(call()) == {"code": 2, "out": "", "err": f"train_demo.py: {told}\n"}


@pytest.mark.parametrize(
    "error",
    [RuntimeError("index 9 is out of bounds for dimension 0"), AssertionError("logits"),
     KeyError("betting"), TypeError("no")],
)
def test_a_defect_of_ours_keeps_its_traceback(monkeypatch, error):
    monkeypatch.setattr(train_demo, "main", lambda: throw(error))
    with pytest.raises(type(error), match=re.escape(str(error))):
        call()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
              RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")],
)
def test_too_little_memory_gets_one_line_with_the_flag(monkeypatch, error):
    monkeypatch.setattr(train_demo, "main", lambda: throw(error))
    done = call()
    assert done.code == 2 and "in an epoch a smaller --batch_size, or" in done.err


def test_a_run_that_is_stopped_says_how_to_go_on(monkeypatch):
    monkeypatch.setattr(train_demo, "main", lambda: throw(KeyboardInterrupt()))
    done = call()
    assert done.code == 2 and "by the same command a training goes on" in done.err


def test_a_character_that_the_console_lacks_does_not_end_a_run(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    monkeypatch.setattr(train_demo, "main", lambda: print("a \u2265 b", flush=True))
    train_demo.run()
    assert raw.getvalue().split() == [b"a", b"?", b"b"]


# --- Models ---------------------------------------------------------------------------


def broken_copy(folder, how):
    folder.mkdir()
    for file in EMBEDDED.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if how == "broken template":
        (folder / "chat_template.jinja").write_text("{% if messages %}never closed")
    elif how == "truncated weights":
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    elif how == "code of its own":
        config = json.loads((folder / "config.json").read_text())
        own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
        config |= {"model_type": "own", "auto_map": own}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "own.py").write_text("raise SystemExit('it was run')")
    else:
        weights, name = load_file(folder / "model.safetensors"), "mlp.up_proj.weight"
        if how == "a weight missing":
            del weights[f"model.layers.0.{name}"]
        else:
            layer = 0 if how == "a wrong shape" else 9
            weights[f"model.layers.{layer}.{name}"] = torch.zeros(2, 2)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    "how, expected",
    [
        ("broken template", "cannot be used: Unexpected end of template"),
        ("truncated weights", "cannot be used: "),
        ("code of its own", "custom code"),
        ("a wrong shape", "1 mismatched weights, first ('model.layers.0.mlp.up_proj"),
        ("a weight missing", "1 missing weights, first model.layers.0.mlp.up_proj."),
    ],
)
def test_a_checkpoint_that_is_not_whole_or_not_ours_is_refused_in_one_line(
    tmp_path, monkeypatch, capsys, how, expected
):
    monkeypatch.setattr("builtins.input", lambda prompt: "y")  # to whatever is asked
    with pytest.raises(ValueError, match=re.escape(expected)) as refused:
        train_demo.load_backbone(broken_copy(tmp_path / "broken", how), "cpu")
    assert "\n" not in str(refused.value) and capsys.readouterr().out == ""


def test_a_weight_too_many_is_only_told(tmp_path, capsys):
    train_demo.load_backbone(broken_copy(tmp_path / "more", "a weight too many"), "cpu")
    told = "1 unexpected weights, first model.layers.9.mlp.up_proj.weight: left out"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("own_tokenizer", [True, False])
def test_a_lora_folder_is_merged_to_the_logits_of_the_peft_model(
    tiny, tmp_path, tokenizer, own_tokenizer
):
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(tiny)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"],
        init_lora_weights=False,  # else the adapter would do nothing
    )
    adapted = peft.get_peft_model(base, settings).eval()
    adapted.save_pretrained(tmp_path)
    if own_tokenizer:
        tokenizer.save_pretrained(tmp_path)
    merged, own, _ = train_demo.load_backbone(str(tmp_path), "cpu")
    assert type(merged) is type(AutoModelForCausalLM.from_pretrained(tiny))
    assert merged.config._name_or_path == str(tmp_path)  # what a table is made for
    ids = own("What goes in a stew?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted = adapted(ids).logits
        torch.testing.assert_close(merged(ids).logits, wanted, rtol=1e-4, atol=1e-4)
        with adapted.disable_adapter():
            assert (adapted(ids).logits - wanted).abs().max() > 0.1


def test_an_adapter_whose_weights_have_other_names_is_refused(tiny, tmp_path):
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(tiny)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    peft.get_peft_model(base, settings).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    other = {name.replace("q_proj", "query"): w for name, w in weights.items()}
    save_file(other, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="cannot be used: Found missing adapter keys"):
        train_demo.load_backbone(str(tmp_path), "cpu")


def test_a_model_that_reads_both_ways_is_refused(tmp_path, tokenizer):
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, initializer_range=0.2)
    for causal in True, False:
        config.is_decoder = causal
        torch.manual_seed(0)
        BertLMHeadModel(config).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        told = contextlib.nullcontext()
        if not causal:
            told = pytest.raises(ValueError, match="reads what comes after a word")
        with told:
            train_demo.load_backbone(str(tmp_path), "cpu")


def test_a_model_whose_first_embedding_is_zero_is_taken(tmp_path, tokenizer):
    model = tiny_model("llama", tokenizer)
    model.get_input_embeddings().weight.data[0] = 0  # as a padding row starts
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    read, _, name = train_demo.load_backbone(str(tmp_path), "cpu")
    assert not read.get_input_embeddings().weight[0].any() and name == str(tmp_path)


def test_an_adapter_without_peft_says_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="cannot be used: .*peft"):
        train_demo.load_backbone(str(tmp_path), "cpu")


def test_a_gguf_file_is_found_by_its_name_or_in_its_folder(tmp_path):
    first, second = tmp_path / "a.gguf", tmp_path / "B.GGUF"
    with pytest.raises(ValueError, match="^no model .*a.gguf; give"):
        reading.find_model(str(first))
    first.write_bytes(b"")
    found = str(tmp_path), {"gguf_file": "a.gguf"}
    assert reading.find_model(str(first)) == found
    assert reading.find_model(str(tmp_path)) == found
    second.write_bytes(b"")
    assert reading.find_model(str(second)) == (
        str(tmp_path), {"gguf_file": "B.GGUF"}
    )


def test_a_folder_of_several_gguf_files_is_refused_with_one_to_name(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="name one of .*a.gguf, .*b.gguf$"):
        reading.find_model(str(tmp_path))


@pytest.mark.slow
def test_a_gguf_file_trains_and_exports_with_equal_logits(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    if not GGUF.exists():
        pytest.skip(f"no {GGUF}")
    write_few(tmp_path / "d.jsonl", ("alcohol", "betting"), train=1, test=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_demo, "JUDGED_TOKENS", 4)
    monkeypatch.setattr(train_demo, "SHOWN_TOKENS", 4)
    done = call("--model", GGUF, "--data", "d.jsonl", "--device", "cpu",
                "--epochs", 1, "--positives_per_subset", 2, "--answer_tokens", 4,
                "--later_turns", 0, "--export", "served")
    assert done.code == 0 and "exported to served" in done.out, done.err
    model, tokenizer, _ = train_demo.load_backbone(str(GGUF), "cpu")
    served, own = (
        kind.from_pretrained("served") for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    tokens, prompt = ControlTokens.load(TABLE, model), "What goes in a Negroni?"
    for policy in ([], ["betting"], ["alcohol", "betting"]):
        row = mosaic.control_row(tokenizer, tokens, policy, prompt, [0])
        ids = own.apply_chat_template(
            mosaic.as_messages(prompt), policy=policy, add_generation_prompt=True,
            return_dict=True, return_tensors="pt",
        )["input_ids"]
        with torch.no_grad():
            wanted, _ = mosaic.answer_logits(model, [row])
            logits = served(ids).logits[0, -1:, : wanted.shape[1]]
        torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)


# --- The network ----------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    """Without a network and not told so; returns the hosts that were asked for."""
    asked = []

    def resolve(host, *more):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return asked


def test_the_demo_asks_the_network_for_nothing(no_network, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_demo.py", "--device", "cpu"])
    flags, _ = train_demo.read_flags()
    train_demo.load_backbone(flags.model, flags.device)
    assert len(reading.read_requests(flags.data)) == 3300
    assert reading.read_summaries(flags.summaries) and no_network == []


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing"])
def test_without_a_network_a_hub_name_is_looked_for_once(no_network, name):
    with pytest.raises(ValueError, match=f"model {name} cannot be used: .*not known"):
        train_demo.load_backbone(name, "cpu")
    assert 1 <= len(no_network) <= 2


def test_a_name_of_the_hub_without_a_config_is_told_what_to_do(monkeypatch):
    def fail(url):
        answer = SimpleNamespace(headers={}, request=None)
        raise RemoteEntryNotFoundError("404", response=answer)

    monkeypatch.setattr(reading, "get_hf_file_metadata", fail)
    with pytest.raises(ValueError, match="no config.json; fetch a GGUF file or a LoRA"):
        train_demo.load_backbone("some/Model-GGUF", "cpu")


@pytest.fixture
def flags_on_cuda(monkeypatch):
    """What read_flags makes of a command line where torch has CUDA."""

    def read(*words):
        monkeypatch.setattr(sys, "argv", ["train_demo.py", *map(str, words)])
        return train_demo.read_flags()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return read


def test_on_cuda_training_is_longer_unless_flags_say_otherwise(
    flags_on_cuda, monkeypatch
):
    monkeypatch.setattr(train_demo, "find_on_hub", lambda name: None)
    flags, ours = flags_on_cuda("--epochs", 3)
    mine = flags_on_cuda("--model", "mine")[1]
    assert flags.model == train_demo.ON_CUDA and flags.tokens_per_category == 10
    assert (ours.batch_size, ours.epochs, ours.learning_rate) == (64, 3, 1.0)
    assert (mine.batch_size, mine.epochs, mine.learning_rate) == (64, 24, 1.0)
    assert flags_on_cuda("--device", "cpu")[1] == mosaic.TrainConfig()


def test_a_real_backbone_has_its_own_defaults_on_a_cpu_too(monkeypatch):
    found = {}
    for model in "mine", str(EMBEDDED):
        monkeypatch.setattr(
            sys, "argv", ["train_demo.py", "--device", "cpu", "--model", model])
        flags, config = train_demo.read_flags()
        found[model] = flags.place, flags.tokens_per_category, config
    assert found[str(EMBEDDED)] == ("before", 5, mosaic.TrainConfig())
    assert found["mine"] == (
        "after", 10, mosaic.TrainConfig(batch_size=32, learning_rate=1.0))


def test_help_on_cuda_shows_the_defaults_that_count_there(
    flags_on_cuda, monkeypatch, capsys
):
    monkeypatch.setattr(train_demo, "find_on_hub", lambda name: None)
    with pytest.raises(SystemExit):
        flags_on_cuda("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert "--epochs EPOCHS see TrainConfig in mosaic.py (default: 24)" in said


@pytest.mark.parametrize("words", [[], ["--model", EMBEDDED]])
def test_on_cuda_the_embedded_backbone_is_trained_as_on_a_cpu(
    words, flags_on_cuda, no_network, capsys
):
    flags, config = flags_on_cuda(*words)
    assert config == mosaic.TrainConfig() and flags.tokens_per_category == 5
    assert Path(flags.model).name == "tiny_chat" and flags.device == "cuda"
    lines = capsys.readouterr().out.splitlines()
    if not words:  # it is taken in place of the default, and that is said
        (line,) = lines
        assert f"no {train_demo.ON_CUDA}: " in line and "not known; taking" in line
    assert len(lines) == bool(no_network) == (not words)


@pytest.mark.parametrize("flag", ["--chat", "--tokens"])
def test_a_saved_table_brings_its_own_backbone(
    flag, tokens, flags_on_cuda, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    flags, config = flags_on_cuda(flag, EMBEDDED.parent / "tokens.safetensors")
    assert Path(flags.model).resolve() == EMBEDDED and config == mosaic.TrainConfig()
    tokens.made_for["backbone"] = "some/model"
    tokens.save(str(tmp_path / "tokens.safetensors"))
    assert flags_on_cuda(flag, tmp_path / "tokens.safetensors")[0].model == "some/model"


def test_with_one_category_no_answer_is_shown_twice(backbone, tokenizer):
    tokens = ControlTokens.for_model(backbone, tokenizer, ["tea"])
    asked = [mosaic.Request("How long do I steep green tea?", "tea")]
    shown = train_demo.show_answers(backbone, tokenizer, tokens, asked)
    assert [under for _, under, _ in shown] == ["none", "tea", "all"]
