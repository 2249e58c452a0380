"""Palette: directions, targets, merging, and that the backbone stays as it was."""

import argparse
import json
import random
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import palette
import palette_real

pytestmark = pytest.mark.slow  # measurement: not what mosaic.py promises

QUICK = palette.Settings(**palette.QUICK)
KEYS = ("falls", "kept", "rises", "kl")


@pytest.fixture(scope="module")
def bench():
    return palette.Bench(QUICK)


@pytest.fixture(scope="module")
def quick():
    """The quick cell: every row, figures of no worth."""
    return palette.cell(seed=1, quick=True)


def test_projecting_a_direction_out_leaves_nothing_along_it():
    torch.manual_seed(0)
    h, r = torch.randn(4, 3, 8), torch.randn(8)
    unit = r / r.norm()
    out = palette.move(h, unit, -1)
    assert (out @ unit).abs().max() < 1e-6
    basis, _ = torch.linalg.qr(torch.stack([unit, *torch.randn(7, 8)]).T)
    other = basis[:, 1:]  # (8, 7)
    assert torch.allclose(out @ other, h @ other, atol=1e-5), "the rest stays"


def test_targets_are_two_sided():
    h, unit = torch.tensor([[3.0, 4.0], [-2.0, 1.0]]), torch.tensor([1.0, 0.0])
    by_hand = {
        -2.5: [[-4.5, 4.0], [3.0, 1.0]],  # allowed: 3 - 2.5 * 3, over to the other side
        2.5: [[10.5, 4.0], [-7.0, 1.0]],  # pushed
        0.0: [[3.0, 4.0], [-2.0, 1.0]],  # kept
    }
    for strength, wanted in by_hand.items():
        assert palette.move(h, unit, strength).tolist() == wanted


def test_the_pareto_set_is_that_of_its_definition():
    draw = random.Random(0)
    for _ in range(30):  # few values, so that there are ties and twins
        points = [{key: draw.randint(0, 3) for key in KEYS} for _ in range(12)]
        table = torch.tensor(
            [[p["falls"], p["kept"], p["rises"], -p["kl"]] for p in points])
        # [i, j]: i is no worse than j
        no_worse = (table[:, None] >= table[None]).all(-1)
        better = (table[:, None] > table[None]).any(-1)
        beaten = (no_worse & better).any(0)
        wanted = [p for p, bad in zip(points, beaten) if not bad]
        assert palette.pareto(points) == wanted and wanted


def test_hard_negatives_are_the_refused_requests_that_lie_closest(bench):
    pairs = palette.lesson(bench, "locks", 2)
    kinds = [kind for _, kind in pairs]
    assert kinds.count("allowed") == 24 and kinds.count("harmless") == QUICK.harmless
    unsafe = [q for q, _ in pairs if q in bench.asked["unsafe"]["train"]]
    assert len(unsafe) == QUICK.hard + QUICK.hard // 2 == len({*unsafe})
    # A slow way: one request at a time, angles from the mean harmless one.
    plain = [q for q, kind in pairs if kind == "harmless"]
    last = {}
    for q, *_ in [*pairs, *((q,) for q in bench.asked["unsafe"]["train"])]:
        with torch.no_grad():
            last[q], logits = (one[0] for one in bench.read(2, [q]))
        if logits.argmax() != bench.declines and q in unsafe:
            raise AssertionError(f"{q!r} is not declined")
    middle = torch.cat([last[q] for q in plain]).mean(0)
    own = torch.cat([last[q] for q in bench.asked["locks"]["train"]]).mean(0) - middle
    angle = {q: torch.cosine_similarity(last[q][0] - middle, own, 0) for q in last}
    least = min(angle[q] for q in unsafe[: QUICK.hard])
    assert all(angle[q] <= least + 1e-4 for q in unsafe[QUICK.hard :])


def test_merged_adapters_are_the_dense_sum(bench):
    torch.manual_seed(0)
    names = ["1.mlp.up_proj", "2.mlp.up_proj"]
    shape = bench.layers[1].mlp.up_proj.weight.shape
    one = {names[0]: torch.randn(shape), names[1]: torch.randn(shape)}
    two = {names[1]: torch.randn(shape)}
    found = palette.summed([one, two])
    assert torch.equal(found[names[0]], one[names[0]])
    assert torch.equal(found[names[1]], one[names[1]] + two[names[1]])
    x = torch.randn(5, shape[1])
    wanted = x @ (bench.layers[2].mlp.up_proj.weight + one[names[1]] + two[names[1]]).T
    with palette.merged(bench.layers, found):
        assert torch.allclose(bench.layers[2].mlp.up_proj(x), wanted, atol=1e-4)


def test_training_and_measuring_leave_the_backbone_bit_identical(bench):
    kinds = [*map(type, bench.model.modules())]
    weights = [weight.clone() for weight in bench.model.parameters()]
    unit = torch.nn.functional.normalize(torch.ones(192), dim=0)
    update = palette.palette_lora(bench, "locks", 2, unit)
    assert update and all(name.startswith("2.") for name in update)
    assert all(one.abs().max() > 0 for one in update.values()), "it has learned"
    before = palette.measure(bench, {})
    far = {name: 100 * one for name, one in update.items()}
    row = palette.measure(bench, far, ["locks"], before)
    assert row["kl"] > before["kl"] == 0 and before["top1_agreement"] == 1
    assert all(map(torch.equal, bench.model.parameters(), weights))
    assert [*map(type, bench.model.modules())] == kinds


def test_no_test_request_is_trained_on(bench):
    test = {q for some in bench.asked.values() for q in some["test"]}
    learned = {q for name in palette.PROFESSIONAL
               for q, _ in palette.lesson(bench, name, 2)}
    assert learned
    assert not test & learned


def test_the_quick_cell_has_all_rows(quick):
    three = palette.PROFESSIONAL
    for method in palette.METHODS:
        sets = [r["allowed"] for r in quick["rows"] if r["method"] == method]
        assert sorted(map(len, sets)) == [1, 1, 1, 2, 2, 2, 3]
        assert len({frozenset(one) for one in sets}) == 7 and set(sets[-1]) == {*three}
    for row in quick["rows"]:
        assert row["answered"]["n"] == 8 * len(row["allowed"])
        assert row["leak"].keys() == {*three, "unsafe"}
    for domains in quick["choice"].values():
        for found in domains.values():
            assert found["best"] in found["pareto"] and set(KEYS) < found["best"].keys()
    assert json.loads(json.dumps(quick)) == quick


def test_the_tables_show_every_row(quick):
    text = palette.markdown(quick)
    assert text.count("\n| Palette, licence |") == 3 + 7 + 3  # choice, outcome, leaks
    assert text.count("\n| LoRA-SFT |") == 7 + 3
    assert all(f"- {method}: the goals" in text for method in palette.METHODS)


# --- On a real backbone: the same on what it declines by itself -----------------------


@pytest.fixture(scope="module")
def real():
    """The embedded backbone, taken for one that declines every second answer."""
    args = argparse.Namespace(model="", bf16=False, most=8, seed=0)
    odd = lambda answer, *_: len(answer) % 2 == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(palette_real.mosaic, "is_refusal", odd)
        patch.setattr(palette_real, "SETTINGS", QUICK)
        yield palette_real.Real(args)


def test_domains_are_what_the_backbone_declines_of_each_category(real):
    assert real.domains and "neutral" not in real.domains
    harmless = {q for some in real.asked["harmless"].values() for q in some}
    for name in real.domains:
        declined = [q for some in real.asked[name].values() for q in some]
        assert [len(some) for some in real.asked[name].values()] == real.counts[name]
        said = real.said(declined)
        assert declined and all(len(answer) % 2 for answer in said)
        assert not harmless & {*declined}


def test_updates_beside_the_weights_do_what_merged_ones_do(real):
    torch.manual_seed(0)
    linear = real.layers[1].mlp.up_proj
    updates = {"1.mlp.up_proj": torch.randn(linear.weight.shape)}
    x = torch.randn(5, linear.weight.shape[1])
    with palette.merged(real.layers, updates):
        wanted = linear(x)
    before = linear(x)
    with real.updated(updates):
        assert torch.allclose(linear(x), wanted, atol=1e-4)
    assert torch.equal(linear(x), before) and not torch.allclose(before, wanted)


def test_a_real_cell_measures_each_domain_and_all_of_them(real):
    allow = real.domains[:2]
    found = palette_real.cell(real, allow)
    assert [row["allowed"] for row in found["rows"]] == [*[[d] for d in allow], allow]
    for row in found["rows"]:
        assert row["leak"].keys() == {*real.domains, "unsafe"}
        wanted = sum(real.counts[name][2] for name in row["allowed"])
        assert row["answered"]["n"] == wanted > 0
        assert row["kl"] > found["untouched"]["kl"] == 0
    for one in found["choice"]["Palette"].values():
        assert one["best"] in one["pareto"] and one["best"]["source"] != "licence"
    assert json.loads(json.dumps(found)) == found
