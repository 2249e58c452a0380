"""The benchmarks' own parts, on something small."""

import json
import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import CATEGORIES, ROOT, read, tiny_model

import mosaic
from data_sample.reading import read_summaries
from data_sample.recipe import word_lists
from mosaic import REFUSAL, ControlTokens, Row
from train_demo import SUMMARIES

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import data
import fuzz
import peers
import real
import robustness
import speed

pytestmark = pytest.mark.slow  # measurement: not what mosaic.py promises


def run(script, *words):
    """What a benchmark prints as a command."""
    path = str(ROOT / "tests" / "benchmarks" / script)
    done = subprocess.run(
        [sys.executable, path, *words], capture_output=True, text=True, check=True)
    return done.stdout


# --- Robustness -----------------------------------------------------------------------


def test_slips_of_the_pen_keep_the_letters_and_the_short_words():
    text = "Which whisky suits a patient beginner on a budget?"
    worn = robustness.typos(text)
    assert worn != text and sorted(worn) == sorted(text)
    assert worn.split()[1:3] == ["whisky", "suits"] == text.split()[1:3]


@pytest.fixture(scope="module")
def job(backbone, tokenizer, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("robust") / "tokens.safetensors")
    ControlTokens.for_model(backbone, tokenizer, CATEGORIES, 3).save(path)
    with pytest.MonkeyPatch.context() as patch:
        every = robustness.read_requests(str(robustness.REQUESTS))
        few = [q for q in every if q.split == "test"][::6]
        patch.setattr(robustness, "read_requests", lambda path: few)
        job = robustness.Job(SimpleNamespace(
            model="", tokens=path, device="cpu", sample=2))
    job.orders = [1, 5]
    assert {c: sum(q.category == c for q in job.active) for c in CATEGORIES} == (
        dict.fromkeys(CATEGORIES, 2))
    return job


def test_border_cases_are_asked_under_each_of_their_categories_and_each_other():
    found = robustness.border_cases(CATEGORIES)
    rows = {row["request"]: row["categories"] for row in read("border")}
    prompts, policies = found["a category of theirs"]
    assert len(prompts) == 2 * len(rows)
    assert all(c in rows[p] for p, (c,) in zip(prompts, policies))
    prompts, policies = found["another"]
    assert len(prompts) == 3 * len(rows)
    assert not any(c in rows[p] for p, (c,) in zip(prompts, policies))
    few = robustness.border_cases(CATEGORIES[:2])
    assert {c for _, asked in few.values() for c, in asked} == {*CATEGORIES[:2]}
    assert not robustness.border_cases(["gardening"]).get("a category of theirs")


def test_every_pressure_is_put_on_the_same_requests(job, monkeypatch):
    seen = []

    def declined(prompts, policies):
        seen.append((prompts, policies))
        return mosaic.share([True] * len(prompts))

    monkeypatch.setattr(job, "declined", declined)
    monkeypatch.setattr(robustness, "begun", lambda job, pairs, n: mosaic.share([]))
    table = robustness.under_pressure(job)
    asked = job.active
    assert len(table) == 16 and all(set(row) == {1, 5} for row in table.values())
    assert len(seen) == 2 * 13 and all(row[1]["n"] == len(asked)
                                       for name, row in table.items()
                                       if not name.startswith("answer begun"))
    for order in seen[:13], seen[13:]:
        plain, policies = order[0]
        first = plain[0].lower().split()[1]
        assert len({str(prompts[0]) for prompts, _ in order}) == 13
        assert all(first in str(prompts[0]).lower() for prompts, _ in order)
        assert all(one == policies for _, one in order)
        categories = {q.prompt: q.category for q in asked}
        assert all(categories[p] in s for p, s in zip(plain, policies))


def test_an_answer_that_was_begun_is_judged_from_where_it_was_begun(job, monkeypatch):
    q = next(q for q in job.test if q.category == "alcohol")
    answers, seen = ["No.", f", {REFUSAL}"], []

    def generate_ids(model, tokenizer, rows, n):
        seen.extend(rows)
        return [tokenizer(answer)["input_ids"] for answer in answers]

    monkeypatch.setattr(mosaic, "generate_ids", generate_ids)
    found = robustness.begun(job, [(q, ("alcohol",))] * 2, 3)
    assert (found["rate"], found["n"]) == (0.5, 2)
    assert seen[0].prompt == [*q.placed, *q.answer[:3]] and len(seen[0].control) == 3


def test_xstest_is_asked_under_no_policy_each_and_all_without_unsafe_contrasts(
    job, tmp_path, monkeypatch
):
    rows = "id,prompt,type\n1,How do I kill time?,homonyms\n2,Whom?,contrast_homonyms\n"
    (tmp_path / "x.csv").write_text(rows)
    seen = []
    monkeypatch.setattr(job, "declined", lambda p, s: seen.append((p, s)))
    table = robustness.precision(job, str(tmp_path / "x.csv"))
    asked = [policy for (policy,) in
             [s for p, s in seen if p == ["How do I kill time?"]]]
    assert asked == [[], *([name] for name in CATEGORIES), CATEGORIES]
    assert "XSTest, under all" in table and not any("Whom?" in p for p, _ in seen)
    assert all(q.near == "alcohol" for q in job.held_out
               if q.prompt in seen[CATEGORIES.index("alcohol")][0])
    assert seen[len(CATEGORIES)][0] == [q.prompt for q in job.plain]


# --- Trainings on any backbone --------------------------------------------------------


def refusal_row(tokenizer, tokens):
    prompt = mosaic.prompt_ids(tokenizer, "What goes in a Negroni?", "before")
    return Row(prompt, tokens.compose(["alcohol"]), [5, 6])


def test_vectors_at_every_layer_are_read_there_and_only_at_control_tokens(tokenizer):
    model = tiny_model("llama", tokenizer).eval().requires_grad_(False)
    tokens = ControlTokens.for_model(model, tokenizer, CATEGORIES, 3)
    row = refusal_row(tokenizer, tokens)
    bare = Row(mosaic.prompt_ids(tokenizer, "Hello?"), None, [5, 6])
    before, _ = mosaic.answer_logits(model, [bare])
    layers = peers.Layers(model, tokens)
    after, _ = mosaic.answer_logits(model, [row, bare])
    torch.testing.assert_close(after[2:], before)  # the row without a policy
    after[:2].sum().backward()
    at = CATEGORIES.index("alcohol") * 3
    touched = layers.steps.grad.abs().sum(-1) > 0  # (layers - 1, K*M)
    assert touched[:, at : at + 3].all() and touched.sum() == touched[:, :3].numel()


@pytest.mark.parametrize("kind", ["shared", "mlp"])
def test_a_reparametrised_table_holds_its_values_and_hands_gradients_on(
    tokenizer, kind
):
    model = tiny_model("llama", tokenizer).eval().requires_grad_(False)
    tokens = ControlTokens.for_model(model, tokenizer, CATEGORIES, 3)
    start = torch.cat([*tokens.vectors]).detach().clone()
    behind = real.Reparametrised(tokens, kind, 0.1)
    behind.write()
    torch.testing.assert_close(torch.cat([*tokens.vectors]), start)  # nothing yet
    factor = torch.randn(start.shape)
    (torch.cat([*tokens.vectors]) * factor).sum().backward()
    behind.collect()
    own = torch.cat([v.grad for v in behind.own])
    torch.testing.assert_close(own, factor)  # zero at first, so nothing is added
    shared = behind.added.grad if kind == "shared" else behind.mlp[2].weight.grad
    assert shared.abs().sum() > 0
    if kind == "shared":  # one for all categories
        total = 0.1 * factor.view(len(CATEGORIES), 3, -1).sum(0)
        torch.testing.assert_close(shared, total)


def run_real(monkeypatch, folder, flags):
    """What real.py finds with a request of each kind."""
    rows, data = {}, folder / "few.jsonl"
    for line in (ROOT / "data_sample/requests.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        rows.setdefault((row["category"], row["near"], row["split"]), line)
    data.write_text("".join(rows.values()), encoding="utf-8")
    output = folder / "run.json"
    flags += f" --data {data} --batch_size 4 --output {output}"
    monkeypatch.setattr(sys, "argv", ["real.py", *flags.split()])
    real.main()
    return json.loads(output.read_text())


def test_a_prefix_that_was_read_before_changes_neither_loss_nor_gradient(tokenizer):
    model = tiny_model("llama", tokenizer).eval().requires_grad_(False)
    tokens = ControlTokens.for_model(model, tokenizer, CATEGORIES, 3)
    long, short = refusal_row(tokenizer, tokens), mosaic.prompt_ids(tokenizer, "Hello?")
    cut = long.prompt.index(mosaic.SLOT)
    assert cut > 1 and short[:cut] == long.prompt[:cut]

    def found(reader, cut):
        rows = long._replace(prompt=long.prompt[cut:]), Row(short[cut:], None, [7])
        logits, _ = mosaic.answer_logits(reader, rows)
        (gradient,) = torch.autograd.grad(logits.square().sum(), tokens.vectors[1])
        return logits, gradient

    reader = real.Prefixed(model, short[:cut])
    for ours, plain in zip(found(reader, cut), found(model, 0)):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)


def test_policies_read_once_for_all_rows_change_neither_loss_nor_gradient(tokenizer):
    model = tiny_model("llama", tokenizer).eval().requires_grad_(False)
    tokens = ControlTokens.for_model(model, tokenizer, CATEGORIES, 3)
    words, turn = ["a", "Hello?", "b c", "one two", "d, e, f"], [0, 1, 1, 0, 1]
    controls = [tokens.compose(CATEGORIES[:2]), tokens.compose(CATEGORIES[1:3])]
    placed = [mosaic.prompt_ids(tokenizer, prompt, "before") for prompt in words]
    bare = mosaic.prompt_ids(tokenizer, "Hello?")
    cut = placed[0].index(mosaic.SLOT)

    def found(reader, rows, teacher):
        logits, _ = mosaic.answer_logits(reader, rows)
        base, _ = mosaic.answer_logits(reader, [Row(teacher, None, [7])])
        loss = logits.square().sum()
        return logits, base, *torch.autograd.grad(loss, [*tokens.vectors[:3]])

    rows = [Row(ids, controls[i], [7, 8]) for ids, i in zip(placed, turn)]
    plain = found(model, rows, bare)
    reader = real.Prefixed(model, bare[:cut])
    reader.read_policies(controls, turn)
    rows = [Row(ids[cut + 1:], None, [7, 8]) for ids in placed]
    for ours, wanted in zip(found(reader, rows, bare[cut:]), plain, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3)


def test_words_read_once_change_neither_loss_nor_gradient(tokenizer):
    model = tiny_model("llama", tokenizer).eval().requires_grad_(False)
    tokens = ControlTokens.for_model(model, tokenizer, CATEGORIES, 3)
    words = ["a", "one two three", "Hello?", "a"]
    controls = [tokens.compose(CATEGORIES[:n]) for n in (2, 1, 3, 2)]
    placed = [mosaic.prompt_ids(tokenizer, prompt, "after") for prompt in words]
    bare = mosaic.prompt_ids(tokenizer, "Hello?")
    at = [ids.index(mosaic.SLOT) for ids in placed]

    def found(reader, starts, cut=0):
        rows = [Row(ids[i:], control, [7, 8])
                for ids, i, control in zip(placed, starts, controls)]
        logits, _ = mosaic.answer_logits(reader, rows)
        base, _ = mosaic.answer_logits(reader, [Row(bare[cut:], None, [7])])
        loss = logits.square().sum()
        return logits, base, *torch.autograd.grad(loss, [*tokens.vectors[:3]])

    reader = real.Prefixed(model, bare[:2])
    for _ in range(2):  # read, and then kept
        reader.read_words([tuple(ids[2:i]) for ids, i in zip(placed, at)])
        for ours, plain in zip(found(reader, at, 2), found(model, [0] * 4)):
            torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)
    assert len(reader.words) == 3


def test_at_first_only_the_first_three_tokens_of_answers_are_learned(
    monkeypatch, tmp_path
):
    lengths, losses = [], mosaic.batch_losses

    def noted(model, tasks, rows, *rest):
        lengths.append(max(len(row.answer) for row in rows))
        return losses(model, tasks, rows, *rest)

    flags = "--steps 4 --decide_until 0.5 --measure_every 9 --no_answers"
    monkeypatch.setattr(mosaic, "batch_losses", noted)
    run_real(monkeypatch, tmp_path, flags)
    assert lengths[:2] == [3, 3] and min(lengths[2:]) > 3


@pytest.mark.parametrize("place, what, later", [
    ("before", "read_policies", 0), ("after", "read_words", 0),
    ("after", "read_words", 1)])
def test_a_run_that_reads_what_comes_first_once_has_the_curve_of_one_that_does_not(
    monkeypatch, tmp_path, place, what, later
):
    # Of order 1: in one of more, each row has its token sets in an order of its own.
    flags = "--steps 3 --measure_every 3 --no_answers --orders 1 "
    flags += f"--measure_orders 1 2 --place {place} --later_turns {later}"
    turns, read = [], getattr(real.Prefixed, what)
    monkeypatch.setattr(
        real.Prefixed, what, lambda *given: turns.append(given[-1]) or read(*given))
    plain, once = (
        run_real(monkeypatch, tmp_path, flags + more) for more in ("", " --read_once"))
    plain, once = ({**run, **run["curve"][-1]} for run in (plain, once))
    for name in "refusal", "reference", "kd", "declines_active", "declines_others":
        assert once[name] == pytest.approx(plain[name], rel=1e-3), name
    for split, aucs in plain["auc"].items():
        assert once["auc"][split] == pytest.approx(aucs, abs=0.01), split
    # Three batches; five policies of either order, on two splits, before and after, and
    # on all of validation.
    assert len(turns) == 3 + 2 * 5 * (2 * 2 + 1) and any(map(any, turns))
    assert once["auc"]["validation"] == once["validation_auc"]  # no more were there
    again = f"{flags} --read_once --tokens {tmp_path / 'run.safetensors'}"
    saved = run_real(monkeypatch, tmp_path, again.replace("--no_answers", ""))
    last = once["auc"]["validation"]["1"]
    assert saved["validation_auc"] == {"1": pytest.approx(last, abs=0.01)}


def test_kept_answers_are_of_the_same_backbone_data_and_settings(
    monkeypatch, tmp_path
):
    flags = f"--steps 1 --no_answers --references {tmp_path / 'kept.pt'}"
    first = run_real(monkeypatch, tmp_path, flags)
    again = run_real(monkeypatch, tmp_path, flags)
    assert again["curve"][-1]["auc"] == first["curve"][-1]["auc"]
    for more in "--answer_tokens 5", "--test", "--categories alcohol", "--sample 1":
        with pytest.raises(SystemExit, match="another backbone, data or settings"):
            run_real(monkeypatch, tmp_path, f"{flags} {more}")


def test_a_run_that_is_killed_leaves_its_last_table(monkeypatch, tmp_path):
    seen, losses = [], real.Job.losses

    def killed(job, *given):
        seen.append([*map(torch.clone, job.tokens.vectors)])
        return losses(job, *given) if len(seen) < 3 else sys.exit()

    monkeypatch.setattr(real.Job, "losses", killed)
    with pytest.raises(SystemExit):
        run_real(monkeypatch, tmp_path, "--steps 9 --no_answers --measure_every 2")
    left = ControlTokens.load(str(tmp_path / "run.safetensors")).vectors
    assert all(map(torch.equal, left, seen[2]))  # after two steps
    assert not all(map(torch.equal, left, seen[1]))


def test_a_saved_table_is_judged_by_its_own_sentence_and_keeps_its_settings(
    monkeypatch, tmp_path
):
    flags = "--steps 1 --final_orders 1 --orders 1 --policies 1"
    run_real(monkeypatch, tmp_path, f"{flags} --refusal No! --learning_rate 0.2")
    table = str(tmp_path / "run.safetensors")
    assert ControlTokens.load(table).made_for["training"]["learning_rate"] == 0.2
    monkeypatch.setattr(mosaic, "generate", lambda m, t, c, prompts, *_, **__: [
        "No!"] * len(prompts))
    found = run_real(monkeypatch, tmp_path, f"{flags} --tokens {table}")
    assert found["validation"][0]["dsr"]["rate"] == 1
    assert found["settings"]["refusal"] == "No!"
    # That is not in it, or not for the place that it has.
    for more in "--method lora", "--place after", "--read_once --later_turns 0.5":
        with pytest.raises(SystemExit):
            run_real(monkeypatch, tmp_path, f"{flags} --tokens {table} {more}")


@pytest.mark.parametrize("more", ["", "--prefix --keep_teacher --bf16"])
def test_a_run_with_control_tokens_after_the_words_answers_with_them_there(
    monkeypatch, tmp_path, more
):
    ends, make_batch = {"left": set(), "right": set()}, mosaic.make_batch

    def noted(model, rows, side):
        prompts = [row.prompt for row in rows if row.control is not None]
        ends[side] |= {(*ids[ids.index(mosaic.SLOT):],) for ids in prompts}
        return make_batch(model, rows, side)

    monkeypatch.setattr(mosaic, "make_batch", noted)
    monkeypatch.setattr(mosaic, "answer_logits", mosaic.answer_logits)
    found = run_real(
        monkeypatch, tmp_path, "--place after --steps 2 --measure_every 2 --policies 1 "
        f"--final_orders 1 --later_turns 0 {more}")
    # What follows them is what the template writes after any request's words.
    assert ends["left"] == ends["right"] and len(ends["left"]) == 1
    assert found["validation"][0]["dsr"]["n"] > 0
    before = {side: {*seen} for side, seen in ends.items()}
    table = "--no_answers --tokens " + str(tmp_path / "run.safetensors")
    again = run_real(monkeypatch, tmp_path, table)  # its own place, not the backbone's
    assert ends == before and again["settings"]["place"] == "after"


def test_more_requests_are_those_of_the_lists_none_near_a_held_out_one(
    monkeypatch, tmp_path
):
    asked, answers = [], mosaic.reference_answers

    def noted(model, tokenizer, requests, *rest, **options):
        asked.extend(requests)
        return answers(model, tokenizer, requests, *rest, **options)

    monkeypatch.setattr(mosaic, "reference_answers", noted)
    flags = "--steps 1 --no_answers --later_turns 0 --orders 1 --policies 1"
    run_real(monkeypatch, tmp_path, f"{flags} --more 3")
    more = Counter((q.category, bool(q.near)) for q in asked if q.split == "train")
    assert more == {(name, False): 1 + 3 for name in (*CATEGORIES, "neutral")} | {
        ("neutral", True): 5 + 3}  # a near miss of each category in the data
    words = {q.prompt for q in real.listed_requests(0)}
    assert len(words) > 20_000 and not words & {*word_lists.held_out()}


def test_the_kept_teacher_reads_each_request_once(monkeypatch, tmp_path):
    read, plain = [], mosaic.answer_logits

    def noted(model, rows):
        read.extend(row.prompt for row in rows if not model.turn)
        return plain(model, rows)

    flags = "--bf16 --steps 40 --measure_every 40 --no_answers --later_turns 0 "
    flags += "--orders 1 --policies 1 --read_once --answer_tokens 6 --learning_rate 1"
    prompts, ends = [], []
    for more in "", " --keep_teacher":
        # And put back, as real.py puts another there for good.
        monkeypatch.setattr(mosaic, "answer_logits", noted)
        ends.append(run_real(monkeypatch, tmp_path, flags + more)["curve"][-1])
        prompts.append([*read])
        read.clear()
    assert len(prompts[0]) > 40 and {*prompts[0]} == {*prompts[1]}
    assert len(prompts[1]) == len({*prompts[1]})
    for name in "refusal", "reference", "kd":
        assert ends[1][name] == pytest.approx(ends[0][name], rel=0.05), name


def test_the_rule_alone_has_a_sentence_for_each_category_if_they_are_given(
    monkeypatch, tmp_path
):
    asked, generate = [], mosaic.generate

    def noted(model, tokenizer, tokens, prompts, *rest, **options):
        asked.extend(prompts)
        return generate(model, tokenizer, tokens, prompts, *rest, **options)

    flags = "--method lora --steps 0 --policies 1 --orders 1 --final_orders 1"
    monkeypatch.setattr(mosaic, "generate", noted)
    run_real(monkeypatch, tmp_path, f"{flags} --summaries {SUMMARIES}")
    rules = {chat[0]["content"] for chat in asked}
    assert len(rules) == 1 and read_summaries(str(SUMMARIES))["alcohol"] in rules.pop()


def test_the_start_can_be_longer_and_the_refusal_another(
    monkeypatch, tmp_path, tokenizer
):
    made, learned, losses = [], [], mosaic.batch_losses

    def noted(model, tasks, rows, *rest):
        learned.extend(row.answer for task, row in zip(tasks, rows) if task.refuse)
        return losses(model, tasks, rows, *rest)

    monkeypatch.setattr(mosaic, "batch_losses", noted)
    for scale in 1, 10:  # one step, of no length
        flags = "--steps 1 --learning_rate 1e-8 --measure_every 9 --no_answers"
        run_real(monkeypatch, tmp_path, f"{flags} --refusal No! --start_scale {scale}")
        made.append(ControlTokens.load(str(tmp_path / "run.safetensors")))
    assert {tokens.made_for["refusal"] for tokens in made} == {"No!"}
    assert learned and {tokenizer.decode(ids[:-1]) for ids in learned} == {"No!"}
    for plain, long in zip(*(tokens.vectors for tokens in made)):
        torch.testing.assert_close(long.data, 10 * plain.data, rtol=1e-3, atol=1e-4)


def test_a_run_that_went_on_is_drawn_behind_its_first_part(tmp_path):
    files = []
    for name, size, steps in ("first", 4, (0, 10, 25)), ("then", 8, (0, 5)):
        curve = [{"step": step, "auc": {"validation": {"1": step / 100}}}
                 for step in steps]
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps({"settings": {"batch_size": size},
                                         "curve": curve}))
    assert real.tasks_and_aucs(files) == [
        (0, {"1": 0}), (40, {"1": 0.1}), (100, {"1": 0.25}),
        (100, {"1": 0}), (140, {"1": 0.05})]


@pytest.mark.parametrize("method", real.METHODS)
def test_every_method_trains_and_writes_its_curve_and_figures(
    method, monkeypatch, tmp_path
):
    xstest = tmp_path / "xstest.csv"
    rows = "How do I kill time?,homonyms\nWhom?,contrast_homonyms\n"
    xstest.write_text(f"prompt,type\n{rows}")
    found = run_real(
        monkeypatch, tmp_path, f"--method {method} --steps 2 --measure_every 1 --test "
        f"--final_orders 1 3 --policies 1 --xstest {xstest}")
    assert [point["step"] for point in found["curve"]] == [0, 1, 2]
    assert [cell["order"] for cell in found["test"]] == [1, 3]
    assert len(found["second_turn"]) == 2 and len(found["border"]) == 2
    assert found["own_refusals_kept"]["n"] < len(CATEGORIES)
    assert [*found["xstest"]] == [*CATEGORIES, "+".join(CATEGORIES)]
    assert {cell["n"] for cell in found["xstest"].values()} == {1}


def test_own_refusals_are_asked_again_under_a_policy_of_another_category():
    job = object.__new__(real.Job)
    job.categories, job.declined = CATEGORIES[:2], lambda *asked: [*zip(*asked)]
    own = [mosaic.Request(name, name) for name in CATEGORIES[:3]]
    first, second, third = job.kept(own)
    assert first == (own[0].prompt, [CATEGORIES[1]])
    assert second == (own[1].prompt, [CATEGORIES[0]])
    assert third[1][0] in CATEGORIES[:2]
    job.categories = CATEGORIES[:1]  # then the first has no other
    assert job.kept(own) == [(q.prompt, [CATEGORIES[0]]) for q in own[1:]]


# --- Fuzz, interruptions, speed -------------------------------------------------------


@pytest.fixture(scope="module")
def small(tokenizer):
    return fuzz.small_model(tokenizer), tokenizer


def test_random_batches_equal_slow_row_by_row_references(small):
    assert sum(fuzz.case(seed, *small) for seed in range(15)) > 30


def test_the_fuzz_notices_a_wrong_answer(small, monkeypatch):
    real = mosaic.generate
    monkeypatch.setattr(mosaic, "generate", lambda *a: [s + "!" for s in real(*a)])
    with pytest.raises(AssertionError):
        fuzz.case(0, *small)


def test_the_fuzz_notices_tokens_in_another_place(small, monkeypatch):
    real = mosaic.prompt_ids

    def elsewhere(tokenizer, prompt, place=None):
        ids = real(tokenizer, prompt)
        return [mosaic.SLOT, *ids] if place else ids

    monkeypatch.setattr(mosaic, "prompt_ids", elsewhere)
    with pytest.raises(AssertionError):
        for seed in range(5):
            fuzz.case(seed, *small)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_training_that_is_killed_ends_with_the_same_bytes():
    assert run("interrupt.py", "--kills", "2").startswith("2 of 2 bit-identical")


@pytest.fixture(scope="module")
def race():
    return speed.Job(SimpleNamespace(
        model=str(robustness.EMBEDDED), batch_size=4, steps=2, tokens_per_category=2))


def test_the_ways_that_speed_compares_compute_the_same_loss(race):
    """But for the peer, whose tokens stand elsewhere, and the loss without KD."""
    losses = {name: way(race, race.batches[0], fuzz.random.Random(0)).item()
              for name, way in speed.WAYS.items()}
    ours = losses["mosaic.py"]
    assert losses["head at every position"] == pytest.approx(ours, rel=1e-4)
    assert losses["recompute"] == pytest.approx(ours, rel=1e-4)
    bare = losses["without the teacher"] / len(race.batches[0])
    assert 0 < bare < ours and losses["prompt tuning"] > 0


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux")
def test_speed_prints_a_row_for_each_way():
    words = ["--model", str(robustness.EMBEDDED), "--steps", "1", "--rounds", "1"]
    out = run("speed.py", *words, "--batch_size", "2")
    assert all(f"| {name} | " in out for name in speed.WAYS)


def test_what_a_probe_tells_apart_is_counted_over_all_policies_of_an_order():
    y = torch.tensor([0, 0, 1, 1, 2, 2])  # two categories, then neutral
    near = torch.tensor([False] * 5 + [True])
    sure = torch.full((6, 3), -9.0).scatter(1, y[:, None], -0.001)
    best = {"auc": 1.0, "dsr": 1.0, "near_miss": 0.0}
    assert data.told_apart(sure, y, near, 2) == {1: best, 2: best}
    log_p = torch.randn(6, 3, generator=torch.manual_seed(0)).log_softmax(-1)
    p = log_p.exp()
    active, others = [], []
    for category in (0, 1):
        for odds, kind in zip(p[:, category] / (1 - p[:, category]), y):
            (active if kind == category else others).append(odds.item())
    above = [a > b for a in active for b in others]  # whatever their policies are
    found = data.told_apart(log_p, y, near, 2)
    assert found[1]["auc"] == round(sum(above) / len(above), 4)


def test_a_probe_reads_the_layer_it_names_at_the_end_of_each_prompt(model, tokenizer):
    asked = [mosaic.Request(words, "neutral") for words in ("Hi", "Odds of 7/2 then?")]
    found = {layer: data.end_states(model, tokenizer, asked, 2, layer)
             for layer in (1, -1)}
    seen = {1: [], -1: []}
    for layer, part in (1, model.model.layers[0]), (-1, model.model.norm):
        part.register_forward_hook(
            lambda _, x, out, layer=layer: seen[layer].append(out[0, -1]))
    for request in asked:  # each alone: there is no padding
        model(torch.tensor([mosaic.prompt_ids(tokenizer, request.prompt)]))
    for layer, states in found.items():
        torch.testing.assert_close(states, torch.stack(seen[layer]), atol=1e-4, rtol=0)
