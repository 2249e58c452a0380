"""The remade tables: peers, cells, report, and README's table."""

import copy
import json
import math
import random
import subprocess
import sys

import pytest
import torch
from conftest import CATEGORIES, README, ROOT
from torch import nn

import mosaic
from mosaic import Row, TrainConfig

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import paper
import peers
import report

pytestmark = pytest.mark.slow  # measurement: not what mosaic.py promises


def weights(model):
    return [weight.clone() for weight in model.parameters()]


def same(model, before):
    return all(map(torch.equal, model.parameters(), before))


@pytest.fixture
def ids(tokenizer):
    return mosaic.prompt_ids(tokenizer, "What goes in a Negroni?")


# --- Peers ----------------------------------------------------------------------------


def test_an_adapter_merged_and_unmerged_equals_the_dense_product(model, ids):
    row = [Row(ids, None, ids)]
    bare, before = mosaic.answer_logits(model, row)[0], weights(model)
    added = peers.add_lora(model, rank=3, alpha=6)
    assert torch.equal(mosaic.answer_logits(model, row)[0], bare)  # B is zero
    for one in added.values():
        nn.init.normal_(one.b)
    unmerged = mosaic.answer_logits(model, row)[0]
    updates = {name: one.delta().detach() for name, one in added.items()}
    name, one = next(iter(added.items()))
    dense = 2.0 * torch.einsum("or,ri->oi", one.b, one.a)  # alpha / rank = 2
    assert torch.allclose(updates[name], dense, atol=1e-6)
    peers.remove_lora(model)
    assert same(model, before) and len(added) == 14  # 7 maps in each of 2 layers
    with peers.merged(model, updates):
        merged = mosaic.answer_logits(model, row)[0]
    assert torch.allclose(merged, unmerged, atol=1e-4)
    assert not torch.allclose(merged, bare, atol=1e-2)
    assert same(model, before)


def test_the_size_of_an_adapter_is_what_add_lora_adds(model):
    size = peers.count(model, rank=8)
    added = peers.add_lora(model, rank=8)
    assert size == sum(p.numel() for one in added.values() for p in (one.a, one.b))


def test_the_odds_ratio_loss_equals_the_formula_by_hand():
    chosen, rejected = torch.tensor([-0.2, -1.5]), torch.tensor([-0.9, -0.1])
    by_hand = 0.0
    for a, b in zip(chosen.tolist(), rejected.tolist()):
        p, q = math.exp(a), math.exp(b)
        ratio = (p / (1 - p)) / (q / (1 - q))
        by_hand += -math.log(1 / (1 + math.exp(-math.log(ratio)))) / 2
    loss = peers.odds_ratio_loss(chosen, rejected)
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)


def test_an_answers_log_probabilities_are_those_of_the_row_alone(model, ids):
    rows = [Row(ids, None, ids[1:4]), Row(ids[:5], None, ids[2:9])]
    for row, found in zip(rows, peers.answer_log_probs(model, rows), strict=True):
        whole = torch.tensor([[*row.prompt, *row.answer]])
        log_p = model(whole).logits.log_softmax(-1)[0]  # (T, V)
        at = len(row.prompt) - 1
        slow = [log_p[at + i, one].item() for i, one in enumerate(row.answer)]
        assert found.tolist() == pytest.approx(slow, rel=1e-4)


def test_adapters_read_the_policy_by_name_and_learn_both_answers_of_a_task(
    model, tokenizer, requests
):
    tasks = [mosaic.Task(mosaic.reference_answers(model, tokenizer, [q], 4)[0], policy)
             for q in requests[:2] for policy in [("sex", "horror"), (q.category,)]]
    wanted, other = peers.task_pairs(tokenizer, tasks, [7, 8], random.Random(0))
    for task, good, bad in zip(tasks, wanted, other, strict=True):
        own = task.request.answer
        pair = ([7, 8], own) if task.refuse else (own, [7, 8])
        assert (good.answer, bad.answer) == pair and good.prompt == bad.prompt
        read = tokenizer.decode(good.prompt)
        assert task.request.prompt in read and mosaic.REFUSAL in read
        assert all((f"- {c}" in read) == (c in task.policy) for c in CATEGORIES)
    assert {task.refuse for task in tasks} == {True, False}


@pytest.mark.parametrize("loss", [peers.sft_loss, peers.orpo_loss])
def test_an_adapter_learns_its_tasks_and_leaves_the_backbone(
    loss, model, tokenizer, requests
):
    references = mosaic.reference_answers(model, tokenizer, requests, 4)
    config = TrainConfig(
        orders=(1, 2), epochs=4, learning_rate=0.02, positives_per_subset=8)
    before = weights(model)
    updates = peers.train_lora(model, tokenizer, CATEGORIES, references, loss, config)
    assert same(model, before)
    rng, refusal = random.Random(1), mosaic.refusal_ids(
        model, tokenizer, mosaic.REFUSAL)
    sampler = mosaic.OrderSampler(references, CATEGORIES, CATEGORIES, 4, 1.0, rng)
    wanted, _ = peers.task_pairs(tokenizer, sampler.epoch((1,), 40)[0], refusal, rng)

    def fit():
        with torch.no_grad():
            return torch.cat(peers.answer_log_probs(model, wanted)).mean()

    untrained = fit()
    with peers.merged(model, updates):
        assert fit() > untrained + 0.5


# --- Cells ----------------------------------------------------------------------------


def every_cell():
    rows = (some for table in paper.GRID.values() for some in table.values())
    return dict.fromkeys(cell for some in rows for cell in some)


def test_every_cell_has_a_file_of_its_own():
    cells = every_cell()
    assert len({cell.name for cell in cells}) == len(cells)
    assert {*paper.GRID} == {*report.TITLES} and paper.Cell() in cells
    assert paper.Cell().name == "mosaic"


@pytest.mark.parametrize("change", ["nothing", "cell", "quick", "version", "default"])
def test_a_cell_is_kept_until_what_it_depends_on_changes(
    tmp_path, monkeypatch, change
):
    flags = paper.read_flags(["--all", "--quick", "--results", str(tmp_path)])
    cell, calls = paper.Cell("sft"), []
    monkeypatch.setattr(paper, "lab_for", lambda quick: None)
    monkeypatch.setattr(paper, "measure", lambda lab, cell: calls.append(cell) or {})
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    assert paper.finished(cell, flags) is None
    paper.run(cell, flags)
    paper.run(cell, flags)
    assert calls == [cell]  # the second run found it
    monkeypatch.setattr(flags, "quick", change != "quick")
    if change == "version":
        monkeypatch.setattr(paper, "VERSION", -1)
    if change == "default":
        changed = TrainConfig(first_weight=9.0)
        monkeypatch.setattr(paper, "TrainConfig", lambda: changed)
    cell = paper.Cell("sft", tokens=3) if change == "cell" else cell
    assert (paper.finished(cell, flags) is None) == (change != "nothing")


def test_a_cell_of_other_data_or_another_backbone_is_not_kept(tmp_path, monkeypatch):
    found = [paper.settings(paper.Cell(), False)]
    for name in ("REQUESTS", "SUMMARIES"):
        other = tmp_path / name
        other.write_bytes(getattr(paper, name).read_bytes() + b" ")
        monkeypatch.setattr(paper, name, other)
        found.append(paper.settings(paper.Cell(), False))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(paper, "EMBEDDED", tmp_path)
    found.append(paper.settings(paper.Cell(), False))
    assert len({one["data and backbone"] for one in found}) == 4


def test_readme_figures_come_from_whole_runs(capsys):
    for words in ("--table 1", "--all --quick"):
        with pytest.raises(SystemExit):
            paper.read_flags([*words.split(), "--readme"])
    assert "--readme goes with --all" in capsys.readouterr().err


@pytest.fixture(scope="module")
def lab():
    return paper.Lab(quick=True)


def test_figure_5_has_as_many_steps_whatever_the_ratio(lab, monkeypatch):
    monkeypatch.setattr(lab, "quick", False)
    steps = []
    for (cell,) in paper.GRID["figure 5"].values():
        config = lab.config(cell)
        sampler = mosaic.OrderSampler(
            lab.learn, CATEGORIES, CATEGORIES, config.positives_per_subset,
            config.negatives_per_positive, random.Random(0))
        batches = sampler.epoch(config.orders, config.batch_size)
        tasks = [task for batch in batches for task in batch]
        refuse = sum(task.refuse for task in tasks)
        assert (len(tasks) - refuse) / refuse == pytest.approx(cell.negatives, rel=0.01)
        steps.append(len(batches) * config.epochs)
    assert len(steps) == 4 and max(steps) == min(steps)


def test_the_mean_objective_weighs_every_answer_alike_and_only_inside(lab):
    rows, ours = [Row([], None, [1, 2, 3]), Row([], None, [4])], mosaic.answer_weights
    with paper.objective("mean"):
        found = mosaic.answer_weights(rows, TrainConfig(), 0.5)
    assert found.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1])
    assert mosaic.answer_weights is ours
    with paper.objective("sum"):
        config = lab.config(paper.Cell(objective="sum"))
        assert mosaic.answer_weights(rows, config, 0.5).tolist() == [1, 1, 1, 1]


def test_the_second_turn_follows_a_harmless_exchange(lab):
    plain = {q.prompt: q.text for q in lab.plain}
    last = {q.prompt: (q.category, q.near) for q in lab.test}
    assert lab.second
    for q in lab.second:
        first, answer, asked = q.prompt
        assert plain[first["content"]] == answer["content"]
        assert last[asked["content"]] == (q.category, q.near)


def test_what_the_backbone_declines_by_itself_is_left_out(lab, monkeypatch):
    declined = lab.test[0].prompt
    answers = {q.prompt: q.text for q in lab.test} | {declined: mosaic.REFUSAL}

    def say(model, tokenizer, requests, n, place):
        return [mosaic.Reference(q.prompt, q.category, text=answers[q.prompt])
                for q in requests]

    monkeypatch.setattr(mosaic, "reference_answers", say)
    kept = [q.prompt for q in lab.answered(lab.test)]
    assert kept == [q.prompt for q in lab.test[1:]]


def test_every_way_reads_its_policy_and_adds_its_updates(lab):
    name = "model.layers.0.mlp.up_proj"
    far = {name: torch.randn(lab.model.get_submodule(name).weight.shape)}
    text, policy = "What goes in a Negroni?", ("alcohol", "sex")
    tokens = lab.fresh(lab.categories, paper.Cell(tokens=3), lab.requests)
    ways = {
        "bare": paper.Way(lab),
        "rule": paper.Way(lab, summaries=lab.summaries),
        "adapter": paper.Way(lab, updates=far, summaries={}),
        "tokens": paper.Way(lab, tokens),
    }
    rows = {kind: way.row(text, policy) for kind, way in ways.items()}
    bare = mosaic.prompt_ids(lab.tokenizer, text)
    read = {kind: lab.tokenizer.decode([i for i in row.prompt if i >= 0])
            for kind, row in rows.items()}
    assert rows["bare"].prompt == bare
    assert lab.summaries["sex"] in read["rule"] and "- sex" in read["adapter"]
    assert torch.equal(rows["tokens"].control, tokens.compose(policy))
    before = weights(lab.model)
    said = {kind: way.respond([text], [policy]) for kind, way in ways.items()}
    assert said["adapter"] != paper.Way(lab, summaries={}).respond([text], [policy])
    moved = {kind: paper.drift(lab, way, 1) for kind, way in ways.items()}
    assert moved["bare"]["kl"] < 1e-6 and moved["bare"]["same"] == 1
    assert moved["adapter"]["kl"] > moved["rule"]["kl"] > 0
    assert [way.numbers() for way in ways.values()] == [
        0, 0, peers.count(lab.model), 5 * 3 * 192]
    assert same(lab.model, before)


@pytest.mark.parametrize(
    "cell",
    [paper.Cell("instruction"), paper.Cell("orpo"),
     paper.Cell(objective="mean", negatives=4.0, seed=1)])
def test_a_cell_runs_whole_on_a_tiny_budget_and_leaves_the_backbone(cell, lab):
    before = weights(lab.model)
    result = json.loads(json.dumps(paper.measure(lab, cell)))
    assert [row["order"] for row in result["orders"]] == [1, 2, 3, 4, 5]
    assert [row["order"] for row in result["second_turn"]] == [1, 3, 5]
    assert {*result["drift"]} == {*"135"} and result["drift"]["1"]["kl"] > 0
    assert result["asked"]["test"] == len(lab.test) and same(lab.model, before)


def test_the_command_runs_its_cells_in_workers_once_and_prints_them(
    tmp_path, monkeypatch, capsys
):
    words = [str(ROOT / "tests" / "benchmarks" / "paper.py"), "--table", "3"]
    words += ["--quick", "--results", str(tmp_path)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("finished: growth") == 1
    monkeypatch.setattr(sys, "argv", words)
    paper.main()  # the cell is there
    again = capsys.readouterr()
    assert done.stdout.endswith(again.out) and "finished" not in again.err
    assert "| +1+1 | alcohol, betting, horror, sex |" in again.out


def test_growth_freezes_older_tokens_and_knows_no_later_category(lab, monkeypatch):
    trained, train = [], mosaic.train
    started, telling_ids = [], mosaic.telling_ids
    of = {q.prompt: q.category for q in lab.requests}
    single = {q.category: q for q in lab.learn if isinstance(q.prompt, str)}
    chat = mosaic.later_turn(single["sex"], single["alcohol"])
    more = mosaic.reference_answers(
        lab.model, lab.tokenizer, [chat], place=paper.PLACE)
    monkeypatch.setattr(lab, "learn", [*lab.learn, *more])

    def told(tokenizer, requests, *rest):
        started.append({q.category for q in requests})
        return telling_ids(tokenizer, requests, *rest)

    def watched(model, tokenizer, tokens, requests, config, references):
        old = [v.clone() for v in tokens.vectors]
        train(model, tokenizer, tokens, requests, config, references)
        moved = [not torch.equal(v, w) for v, w in zip(tokens.vectors, old)]
        seen = {of[words] for q in references for words in mosaic.user_words(q.prompt)}
        trained.append((dict(zip(tokens.categories, moved)), seen))

    monkeypatch.setattr(mosaic, "train", watched)
    monkeypatch.setattr(mosaic, "telling_ids", told)
    stages = paper.growth(lab, paper.Cell("growth"))["stages"]
    assert [len(stage["orders"]) for stage in stages.values()] == [2, 3, 4, 4]
    two = {"alcohol": False, "betting": False}
    assert [moved for moved, _ in trained] == [
        {"alcohol": True, "betting": True}, two | {"horror": True},
        two | {"horror": False, "sex": True}, two | {"horror": True, "sex": True}]
    assert all(seen == {*moved, "neutral"} for moved, seen in trained)
    first, *_, last = started  # one a category that is added
    assert first == {"alcohol", "betting", "neutral"} and "sex" in last
    assert len(started) == 6 and all("addiction" not in seen for seen in started)


# --- What is said of it ---------------------------------------------------------------


def made_up(cell, dsr=0.5):
    """What a cell's file may hold, without a training."""
    share = {"rate": dsr, "n": 10, "low": 0.2, "high": 0.8}
    kinds = {"dsr": share, "over_refusal": mosaic.share([True, *[False] * 9])}
    orders = [{"order": r} | kinds | {"near_miss": share} for r in range(1, 6)]
    stage = {"categories": ["a", "b"], "orders": orders[:2]}
    return {
        "hardware": "a machine", "numbers": 10, "orders": orders, "seconds": 360,
        "second_turn": orders[::2], "stages": dict.fromkeys(paper.STAGES, stage),
        "drift": {r: {"kl": 0.1, "same": 0.9} for r in "135"},
    }


def made_up_rows():
    return report.rows_of(paper.GRID, {cell: made_up(cell) for cell in every_cell()})


def test_the_whole_report_is_written_from_finished_cells(tmp_path, monkeypatch):
    monkeypatch.setattr(report.palette, "markdown", lambda result: "PALETTE")
    rows = made_up_rows()
    rows["table 1"]["MOSAIC-5"] = [made_up(None, dsr) for dsr in (0.5, 0.8, 0.5)]
    text = report.markdown(rows, ["A way"])
    assert text.endswith("Not run: A way.\n") and "Not run" not in report.markdown(rows)
    assert all(f"## {title}\n" in text for title in report.TITLES.values())
    assert "| MOSAIC-5 | 60.0 [50.0, 80.0] / 10.0 [10.0, 10.0] |" in text
    assert "| the paper's | 99.6 / 8.4 | 99.3 / 3.3 |" in text and "PALETTE" in text
    assert f"| SFT (LoRA) |{' 0.100 / 90.0 |' * 3}\n" in text
    # The three of the default are in other tables, too: each counts once.
    assert f"{(len(every_cell()) + 3) / 10:.1f} hours of cells" in text
    report.pictures(rows, tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert not report.pyplot or drawn == {
        "table_1.svg", "figure_4.svg", "figure_5.svg"}


def test_a_readme_gets_its_table_between_the_marks_and_nothing_else_changes():
    rows = made_up_rows()["table 1"]
    mark = report.MARK
    text = report.write_readme(f"# Title\n{mark}\nold\n{mark}\nend", rows)
    lines = text.splitlines()
    assert (lines[0], lines[1], lines[-2], lines[-1]) == ("# Title", mark, mark, "end")
    assert len(lines) == 4 + 2 + 7 and "old" not in text
    assert "| MOSAIC-5 | 10 | 50.0 / 10.0 | 50.0 / 10.0 | 50.0 / 10.0 |" in lines
    assert report.write_readme(text, rows) == text
    with pytest.raises(ValueError, match="1 times, not 2"):
        report.write_readme(f"# Title {mark}", rows)


def test_the_readmes_table_is_that_of_the_results():
    flags = paper.read_flags(["--all"])
    cells = [cell for some in paper.GRID["table 1"].values() for cell in some]
    found = {cell: paper.finished(cell, flags) for cell in cells}
    folder = paper.Path(flags.results)
    there = [cell for cell in cells if (folder / f"{cell.name}.json").exists()]
    if not there:
        pytest.skip("no cell of table 1 has been run")
    stale = [cell.name for cell in there if not found[cell]]
    assert not stale, "of other settings: run paper.py --all --readme"
    rows = report.rows_of({"table 1": paper.GRID["table 1"]}, found)["table 1"]
    assert report.write_readme(README, rows) == README
    changed = copy.deepcopy(rows)
    next(iter(changed.values()))[0]["orders"][0]["dsr"]["rate"] = 0.123
    assert report.write_readme(README, changed) != README
