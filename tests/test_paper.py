"""The remade tables: peers, cells, claims, and README's results."""

import copy
import json
import math
import random
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import CATEGORIES, EMBEDDED, README, ROOT
from torch import nn

import mosaic
from mosaic import ControlTokens, OrderSampler, Row, TrainConfig

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import paper
import peers
import report


def bits(model):
    return mosaic.checksum(model)


@pytest.fixture
def ids(tokenizer):
    return mosaic.prompt_ids(tokenizer, "What goes in a Negroni?")


# --- Peers ----------------------------------------------------------------------------


def test_an_adapter_merged_and_unmerged_equals_the_dense_product(model, tokenizer, ids):
    row = mosaic.make_batch(model, tokenizer, [Row(ids, None, ids)])
    bare, before = mosaic.answer_logits(model, row)[0], bits(model)
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
    assert bits(model) == before and len(added) == 14  # 7 maps in each of 2 layers
    with peers.merged(model, updates):
        merged = mosaic.answer_logits(model, row)[0]
    assert torch.allclose(merged, unmerged, atol=1e-4)
    assert not torch.allclose(merged, bare, atol=1e-2)
    assert bits(model) == before


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


def test_an_answers_log_probability_is_that_of_the_row_alone(model, tokenizer, ids):
    rows = [Row(ids, None, ids[1:4]), Row(ids[:5], None, ids[2:9])]
    both = peers.row_log_probs(model, tokenizer, rows)
    for row, value in zip(rows, both):
        whole = torch.tensor([[*row.prompt, *row.answer]])
        log_p = model(whole).logits.log_softmax(-1)[0]  # (T, V)
        at = len(row.prompt) - 1
        slow = [log_p[at + i, one].item() for i, one in enumerate(row.answer)]
        assert value.item() == pytest.approx(sum(slow) / len(slow), rel=1e-4)


@pytest.mark.parametrize("loss", [peers.sft_loss, peers.orpo_loss])
def test_an_adapter_learns_its_tasks_and_leaves_the_backbone(
    loss, model, tokenizer, requests
):
    known = mosaic.reference_answers(model, tokenizer, requests, 4)
    config = TrainConfig(orders=(1, 2), epochs=4, learning_rate=0.02)
    draw, before, ids = random.Random(0), bits(model), peers.by_rule(tokenizer)
    sampler = OrderSampler(requests, CATEGORIES, CATEGORIES, 8, 1.0, draw)
    updates = peers.train_lora(model, tokenizer, ids, sampler, known, loss, config)
    assert bits(model) == before
    tasks = sampler.epoch((1,), 16)[0]
    assert any(task.refuse for task in tasks) and not all(t.refuse for t in tasks)
    goal = mosaic.refusal_ids(model, tokenizer, mosaic.REFUSAL)
    rows = [
        Row(ids(t.request.prompt, t.policy), None, answer)
        for t in tasks
        for answer in [goal if t.refuse else known[t.request].row.answer]
    ]
    with torch.no_grad():
        untrained = peers.row_log_probs(model, tokenizer, rows).mean()
        with peers.merged(model, updates):
            trained = peers.row_log_probs(model, tokenizer, rows).mean()
    assert trained > untrained + 0.5


# --- Cells ----------------------------------------------------------------------------


def every_cell():
    rows = (some for table in paper.GRID.values() for some in table.values())
    return dict.fromkeys(cell for some in rows for cell in some)


def test_every_cell_has_a_file_of_its_own():
    cells = every_cell()
    assert len({cell.name for cell in cells}) == len(cells) >= 35
    assert paper.Cell().name == "mosaic" and paper.Cell() in cells


@pytest.mark.parametrize("change", ["cell", "quick", "version", "rate", "a weight"])
def test_a_cell_is_kept_until_its_settings_change(tmp_path, monkeypatch, change):
    copied = tmp_path / "chat"
    shutil.copytree(EMBEDDED, copied)
    words = ["--all", "--quick", "--model", str(copied), "--results", str(tmp_path)]
    flags, cell, calls = paper.read_flags(words), paper.Cell("sft"), []
    model = torch.nn.Linear(1, 1)
    monkeypatch.setattr(paper, "lab_for", lambda *more: SimpleNamespace(model=model))
    monkeypatch.setattr(paper, "measure", lambda lab, cell: calls.append(cell) or {})
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    assert paper.finished(cell, flags) is None
    paper.run(cell, flags)
    paper.run(cell, flags)
    assert paper.finished(cell, flags)["seconds"] >= 0 and calls == [cell]
    assert not [*tmp_path.glob("*.part")]
    if change == "a weight":
        data = bytearray((copied / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (copied / "model.safetensors").write_bytes(data)
    monkeypatch.setattr(flags, "quick", change != "quick")
    monkeypatch.setattr(paper, "VERSION", 99 if change == "version" else paper.VERSION)
    monkeypatch.setattr(paper, "LORA_RATE", 1.0 if change == "rate" else 0.003)
    cell = paper.Cell("sft", tokens=3) if change == "cell" else cell
    assert paper.finished(cell, flags) is None


def test_readme_figures_come_from_whole_runs_on_the_embedded_backbone(capsys):
    for words in ("--table 1", "--all --quick", "--all --model x"):
        with pytest.raises(SystemExit):
            paper.read_flags([*words.split(), "--readme"])
    assert "--readme goes with --all" in capsys.readouterr().err


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    path = tmp_path_factory.mktemp("mmlu") / "mmlu.jsonl"
    item = {"question": "Two and two?", "choices": ["3", "4", "5"], "answer": 1}
    path.write_text(json.dumps(item) + "\n")
    return paper.Lab("", True, str(path))


@pytest.mark.parametrize(
    "cell",
    [
        paper.Cell("instruction"),
        paper.Cell("orpo", epochs=2),
        paper.Cell("added", epochs=4),
        paper.Cell(seed=1),
    ],
)
def test_a_cell_of_table_1_and_2_runs_whole_on_a_tiny_budget(cell, lab, monkeypatch):
    before = bits(lab.model)
    monkeypatch.setattr(mosaic, "subsets", few_subsets(mosaic.subsets))
    result = json.loads(json.dumps(paper.measure(lab, cell)))
    assert [row["order"] for row in result["orders"]] == [1, 2, 3, 4, 5]
    assert {*result["utility"]["5"]} == {"kl", "top1", "perplexity", "mmlu"}
    assert result["utility"]["1"]["perplexity"] >= 1 and bits(lab.model) == before


def few_subsets(every):
    """Two of an order are enough here, and all of order 1, which training needs."""
    return lambda names, r, *more: every(names, r, *more)[: 2 if r > 1 else None]


def test_every_way_reads_its_policy_and_adds_its_updates(lab):
    name = "model.layers.0.mlp.up_proj"
    far = {name: torch.randn(lab.model.get_submodule(name).weight.shape)}
    text, policy = "What goes in a Negroni?", ("alcohol", "sex")
    tokens = ControlTokens.for_model(lab.model, lab.tokenizer, lab.categories)
    ways = {
        "bare": paper.Way(lab),
        "rule": paper.Way(lab, written=True),
        "adapter": paper.Way(lab, adapters={None: far}, written=True),
        "tokens": paper.Way(lab, tokens),
    }
    rows = {kind: way.row(text, policy) for kind, way in ways.items()}
    read = {kind: lab.tokenizer.decode(row.prompt) for kind, row in rows.items()}
    assert "alcohol or sex" in read["rule"] and read["rule"] == read["adapter"]
    assert "alcohol" not in read["bare"] and read["bare"] == read["tokens"]
    assert torch.equal(rows["tokens"].control, tokens.compose(policy))
    said = {kind: way.respond([text], [policy]) for kind, way in ways.items()}
    assert said["adapter"] != said["rule"]
    moved = {kind: paper.utility(lab, way, 1)["kl"] for kind, way in ways.items()}
    assert moved["bare"] < 1e-6 and moved["adapter"] > 10 * moved["rule"] > 0


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
    stages = json.loads((tmp_path / "growth.json").read_text())["stages"]
    assert [len(stage["categories"]) for stage in stages.values()] == [2, 3, 4, 4]
    assert [len(stage["orders"]) for stage in stages.values()] == [2, 3, 4, 4]


def test_half_of_the_subsets_are_never_trained_on(lab):
    every, half = mosaic.subsets, paper.halves(CATEGORIES)
    with paper.only(half):
        draw = random.Random(0)
        sampler = OrderSampler(lab.learn, CATEGORIES, CATEGORIES, 20, 1.0, draw)
        tasks = [t for batch in sampler.epoch((1, 2, 3, 4), 16) for t in batch]
    assert mosaic.subsets is every
    for r, trained in half.items():
        assert {t.policy for t in tasks if len(t.policy) == r} == {*trained}
        assert len(trained) == math.ceil(math.comb(5, r) / 2)


def test_either_half_is_measured_under_its_own_name(lab, monkeypatch):
    """For somebody who declines everything, but under seen subsets only."""
    seen = {policy for some in paper.halves(CATEGORIES).values() for policy in some}
    refuse = lambda prompts, policies: [
        mosaic.REFUSAL if p in seen else "Gin." for p in policies
    ]
    way = paper.Way(lab)
    monkeypatch.setattr(way, "respond", refuse)
    found = paper.unseen(lab, way)
    assert set(found) == {"1", "2", "3", "4"}
    for sides in found.values():
        assert (
            sides["seen"]["dsr"]["rate"] == sides["seen"]["over_refusal"]["rate"] == 1
        )
        assert sides["unseen"]["dsr"]["rate"] == 0 < sides["unseen"]["dsr"]["n"]
        assert report.gap(sides, "subsets") == -100


def test_every_other_permutation_of_order_three_is_asked(lab, monkeypatch):
    tokens = ControlTokens.for_model(lab.model, lab.tokenizer, CATEGORIES)
    asked = []

    def say(model, tokenizer, rows, n):
        asked.append(rows[0].control)
        return [[] for _ in rows]

    monkeypatch.setattr(mosaic, "generate_ids", say)
    found = paper.permuted(lab, paper.Way(lab, tokens))
    assert sum(len(z) == 15 for z in asked) == 60
    assert any(torch.equal(z, tokens.compose(CATEGORIES[:3])) for z in asked)
    first = {tuple(z[::5, 0].tolist()) for z in asked}
    assert len(first) == len(asked)  # no order twice
    n = found["3"]["permuted"]["dsr"]["n"], found["3"]["canonical"]["dsr"]["n"]
    assert n[0] == 5 * n[1] > 0


def test_updates_of_several_categories_are_added(lab):
    name = "model.layers.0.mlp.up_proj"
    weight = lab.model.get_submodule(name).weight
    one = {c: {name: torch.full_like(weight, i)} for i, c in enumerate("ab", 1)}
    before = weight.clone()
    with paper.Way(lab, adapters=one).under(("a", "b")):
        assert torch.equal(lab.model.get_submodule(name).weight, before + 3)
    with paper.Way(lab, adapters=one).under(()):
        assert torch.equal(weight, before)


# --- What is said of it ---------------------------------------------------------------


def result(dsr, over):
    share = lambda rate: {"rate": rate / 100, "n": 100, "low": 0, "high": 1}
    cells = enumerate(zip(dsr, over), 1)
    return [
        {
            "numbers": 1,
            "orders": [
                {"order": r, "dsr": share(a), "over_refusal": share(b)}
                for r, (a, b) in cells
            ],
        }
    ]


def test_a_claim_that_fails_is_called_so_with_the_order():
    good, bad = result([99, 99], [1, 2]), result([98, 100], [4, 3])
    rows = {
        "table 1": {"MOSAIC-5": good, "SFT (LoRA)": bad, "in context": bad},
        "figure 4": {
            "MOSAIC-5": good,
            "without compositions": result([90, 50], [1, 1]),
            "without KD": bad,
        },
    }
    said = {text: fails for text, fails, _ in report.claims(rows)}
    assert said == {
        "MOSAIC-5: DSR at least SFT's": [2],
        "MOSAIC-5: OR at most half SFT's": [2],
        "a written instruction's DSR falls with the order": [2],
        "without compositions DSR falls with the order": [],
        "KD lowers OR": [],
    }
    assert "| KD lowers OR | yes | 1.0 / 2.0 against 4.0 / 3.0 |" in (
        report.claims_table(rows)
    )
    assert "| no: order 2 |" in report.claims_table(rows)


def test_claims_on_knobs_growth_and_sides_can_hold_and_fail():
    knobs = {str(n): result([90, 91], [n, n]) for n in (0.8, 1.0, 1.6, 2.4)}
    assert [fails for _, fails, _ in report.claims_on_lambda(knobs)] == [[], []]
    knobs["1.6"] = result([80, 90], [0.1, 0.1])
    fails = [fails for _, fails, _ in report.claims_on_lambda(knobs)]
    assert fails == [["lambda 1.6"], ["lambda 1.6"]]
    few = {"1": result([99, 98], [9, 11]), "4": result([99, 98], [2, 7])}
    assert report.claims_on_tokens(few)[0][1] == [2]
    assert report.claims_on_negatives(few)[0][1] == [1]
    stages = {"initial": result([90, 90], [1, 1])[0]}
    stages["+1"] = result([89, 87, 99], [1, 1, 1])[0]  # orders 1 and 2 are compared
    ((_, fails, shown),) = report.claims_on_growth({"growth": [{"stages": stages}]})
    assert fails == ["+1"] and shown == "initial: 90.0, +1: 88.0"


def side(dsr):
    share = {"rate": dsr, "n": 9, "low": 0.0, "high": 1.0}
    return {"dsr": share, "over_refusal": share}


def test_unseen_subsets_are_judged_beside_a_table_that_has_seen_all():
    table = lambda x: [{"subsets": {"2": {"unseen": side(x), "seen": side(0.9)}}}]
    rows = {"half": table(0.86), "all": table(0.88)}  # harder, seen or not
    ((_, fails, shown),) = report.claims_on_unseen(rows)
    assert fails == ["2"] and shown == "order 2: -2.0"
    rows["all"] = table(0.865)
    assert report.claims_on_unseen(rows)[0][1] == []


def test_permutations_are_judged_by_name_whatever_came_first():
    sides = {"permuted": side(0.88), "canonical": side(0.9)}
    rows = {"MOSAIC-5": [{"permutations": {"3": sides}}]}
    ((_, fails, shown),) = report.claims_on_permutations(rows)
    assert fails == ["3"] and shown == "order 3: -2.0"


def made_up(cell):
    """What a cell's file may hold, without a training."""
    share = {"rate": 0.5, "n": 10, "low": 0.2, "high": 0.8}
    two = {"dsr": share, "over_refusal": share}
    kinds = two | {"near_miss": share}
    orders = [{"order": r} | kinds for r in range(1, 6)]
    moved = {"kl": 0.1, "top1": 0.9, "perplexity": 2.0}
    return {
        "hardware": "a machine", "numbers": 10, "orders": orders,
        "utility": {str(r): moved for r in range(1, 6)},
        "subsets": {"1": {"seen": two, "unseen": two}},
        "permutations": {"3": {"permuted": two, "canonical": two}},
        "stages": {
            stage: {"categories": ["a", "b"], "orders": orders[:2]}
            for stage in paper.STAGES
        },
    }  # fmt: skip


def test_the_whole_report_is_written_from_finished_cells(tmp_path, monkeypatch):
    found = {cell.name: made_up(cell) for cell in every_cell()}
    rows = report.rows_of(paper.GRID, found)
    monkeypatch.setattr(report.palette, "markdown", lambda result: "PALETTE")
    text = report.markdown(rows)
    assert all(f"## {title}\n" in text for title in report.TITLES.values())
    assert text.count("50.0 / 50.0") > 50 and "PALETTE" in text
    assert "| half of the subsets | 1, DSR | 50.0 [20.0, 80.0] (10) |" in text
    report.plots(rows, tmp_path)
    drawn = {path.name for path in tmp_path.glob("*.svg")}
    assert drawn == ({"table_1.svg", *(f"figure_{i}.svg" for i in range(3, 7))}
        if report.pyplot else set())  # fmt: skip


def test_a_readme_without_its_marks_is_left_alone():
    rows = report.rows_of(paper.GRID, {c.name: made_up(c) for c in every_cell()})
    with pytest.raises(ValueError, match="README has no <!-- headline"):
        report.write_readme("# Title", rows)
    with pytest.raises(ValueError, match="before <!-- end of results"):
        report.write_readme(README.replace("<!-- end of results -->", ""), rows)


def test_the_readmes_results_are_those_of_the_files():
    flags = paper.read_flags(["--all"])
    found = {cell.name: paper.finished(cell, flags) for cell in every_cell()}
    assert all(found.values()), [name for name, one in found.items() if not one]
    rows = report.rows_of(paper.GRID, found)
    assert report.write_readme(README, rows) == README
    changed = copy.deepcopy(rows)
    changed["table 1"]["MOSAIC-5"][0]["orders"][0]["dsr"]["rate"] = 0.123
    assert report.write_readme(README, changed) != README
