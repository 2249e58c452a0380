"""One test per promise of mosaic.py, in its order."""

import copy
import dataclasses
import functools
import itertools
import json
import math
import random
import resource
import subprocess
import sys
import time
import tracemalloc
from collections import Counter

import pytest
import torch
from conftest import CATEGORIES, FAMILIES, ROOT, tiny_model
from safetensors.torch import load_file, save_file

import mosaic
from mosaic import (
    IGNORE,
    NEUTRAL,
    ControlTokens,
    OrderSampler,
    Request,
    Row,
    TrainConfig,
)

ASKED = [
    "What goes in a Negroni?",
    "Hi",
    "Which chess opening suits a patient beginner?",
]
POLICIES = [("alcohol", "sex"), (), ("horror",)]
QUICK = TrainConfig(orders=(1, 2), epochs=1, positives_per_subset=4, batch_size=8)


def rows_of(tokenizer, tokens, answers=([9, 8], [7], [6, 5, 4])):
    return [
        Row(mosaic.prompt_ids(tokenizer, asked), tokens.compose(policy), answer)
        for asked, policy, answer in zip(ASKED, POLICIES, answers)
    ]


def own_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# --- 1. Requests and policies, 2. Control tokens --------------------------------------


def test_importing_mosaic_prints_nothing_and_fetches_nothing():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import mosaic"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_policy_is_used_in_the_order_of_the_table(tokens):
    assert mosaic.canonical({"sex", "alcohol"}, CATEGORIES) == ("alcohol", "sex")
    both = tokens.compose(["sex", "alcohol"])
    assert torch.equal(both, torch.cat([tokens.vectors[1], tokens.vectors[4]]))


@pytest.mark.parametrize("policy", [["tobacco"], "alcohol", ["alcohol", "Sex"]])
def test_a_policy_with_an_unknown_category_names_the_known_ones(tokens, policy):
    with pytest.raises(ValueError, match="addiction, alcohol, betting, horror, sex"):
        tokens.compose(policy)


def test_a_policy_that_can_be_read_only_once_is_read_whole(tokens):
    once = (name for name in ["sex", "alcohol"])
    assert torch.equal(tokens.compose(once), tokens.compose(["alcohol", "sex"]))
    tokens.freeze(name for name in tokens.categories if name != "sex")
    assert tokens.trainable == ["sex"]


def test_composing_a_policy_gives_m_vectors_per_category(tokens):
    assert tokens.compose(["alcohol", "horror"]).shape == (6, 32)
    assert tokens.compose([]).shape == (0, 32)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_start_values_stand_at_the_scale_of_the_embedding_module(family, tokenizer):
    model = tiny_model(family, tokenizer)
    table = ControlTokens.for_model(model, tokenizer, ["alcohol"], 64)
    embed = model.get_input_embeddings()
    ids = torch.tensor(own_ids(tokenizer, "alcohol"))
    mean, spread = embed(ids).mean(0), embed(torch.arange(99)).std()
    assert (table.vectors[0].mean(0) - mean).abs().mean() < 0.3 * spread
    assert table.vectors[0].std() > 0.8 * spread


def test_a_tokenizer_may_hold_more_tokens_than_the_model_has_rows(tokenizer):
    model = tiny_model("llama", tokenizer, vocab_size=len(tokenizer) - 200)
    table = ControlTokens.for_model(model, tokenizer, ["alcohol"])
    assert table.vectors[0].isfinite().all()


@pytest.mark.parametrize(
    "names, m", [(["a", "a"], 5), ([""], 5), ([NEUTRAL], 5), (["a"], 0), (["a"], -1)]
)
def test_a_table_refuses_bad_names_and_sizes(model, tokenizer, names, m):
    with pytest.raises(ValueError, match="distinct names"):
        ControlTokens.for_model(model, tokenizer, names, m)


def test_a_table_grows_by_new_categories_and_keeps_the_old_vectors(model, tokenizer):
    table = ControlTokens.for_model(model, tokenizer, ["alcohol"])
    old = table.vectors[0].detach().clone()
    table.add(model, tokenizer, ["horror", "sex"])
    assert table.categories == ["alcohol", "horror", "sex"]
    assert torch.equal(table.vectors[0], old)
    fresh = ControlTokens.for_model(model, tokenizer, ["sex"])
    assert torch.equal(table.vectors[2], fresh.vectors[0])  # the name alone decides
    with pytest.raises(ValueError, match="distinct names"):
        table.add(model, tokenizer, ["alcohol"])


def test_save_and_load_return_the_same_table(model, tokens, tmp_path):
    path = tmp_path / "new" / "tokens.safetensors"
    tokens.save(path)
    again = ControlTokens.load(path, model)
    assert (again.categories, again.about) == (tokens.categories, tokens.about)
    assert all(map(torch.equal, again.vectors, tokens.vectors))
    assert [p.name for p in path.parent.iterdir()] == ["tokens.safetensors"]


def test_one_checkpoint_has_one_fingerprint_in_fp32_and_bf16(model, tokens, tmp_path):
    tokens.save(tmp_path / "t")
    half = model.to(torch.bfloat16)
    assert ControlTokens.load(tmp_path / "t", half).categories == CATEGORIES


def test_a_table_for_another_backbone_is_refused(tokenizer, tokens, tmp_path):
    tokens.save(tmp_path / "t")
    with pytest.raises(ValueError, match="another backbone"):
        ControlTokens.load(tmp_path / "t", tiny_model("llama", tokenizer, seed=1))


def damage(path, how, tokens):
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    elif how == "pickle":
        torch.save({"alcohol": torch.zeros(3, 32)}, path)
    elif how == "no metadata":
        save_file(load_file(path), path)
    elif how == "missing":
        path.unlink()
    else:
        about = {"format": 1, "categories": tokens.categories, **tokens.about}
        data = load_file(path)
        if how == "a set missing":
            del data["sex"]
        elif how == "another width":
            data["sex"] = torch.zeros(3, 16)
        elif how == "not finite":
            data["sex"][0, 0] = torch.nan
        elif how == "newer format":
            about["format"] = 2
        elif how == "other placement":
            about["placement"] = "anywhere"
        saved = [data[name] for name in tokens.categories if name in data]
        about["vectors"] = mosaic.checksum(torch.nn.ParameterList(saved))
        if how == "altered":
            data["sex"][0, 0] += 1e-7
        about.pop(how.removeprefix("no "), None)
        save_file(data, path, metadata={"mosaic": json.dumps(about)})


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "pickle",
        "no metadata",
        "missing",
        "a set missing",
        "another width",
        "not finite",
        "altered",
        "newer format",
        "other placement",
        "no format",
        "no placement",
        "no fingerprint",
        "no categories",
        "no vectors",
    ],
)
def test_a_damaged_table_is_refused_by_name(tokens, tmp_path, how):
    path = tmp_path / "tokens.safetensors"
    tokens.save(path)
    damage(path, how, tokens)
    with pytest.raises(ValueError, match="tokens.safetensors"):
        ControlTokens.load(path)


@pytest.mark.parametrize("kind", ["table", "checkpoint", "export"])
def test_a_full_disk_leaves_what_was_there_and_no_half_of_a_file(
    model, tokenizer, tokens, tmp_path, kind
):
    path = tmp_path / "it"
    write = {
        "table": lambda: tokens.save(path),
        "checkpoint": lambda: mosaic.keep(
            path, {}, [], tokens, torch.optim.Adam(tokens.parameters())
        ),
        "export": lambda: mosaic.export_checkpoint(model, tokenizer, tokens, path),
    }[kind]
    if kind != "export":  # which never replaces a folder
        write()
    before = path.read_bytes() if path.exists() else None
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*it \(is there room\?\): "):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [*tmp_path.iterdir()] == ([path] if before else [])
    assert not before or path.read_bytes() == before


# --- 3. Prompts and batches -----------------------------------------------------------


def test_a_prompt_has_one_bos_and_ends_where_the_answer_begins(tokenizer):
    ids = mosaic.prompt_ids(tokenizer, "Hi")
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
    ]
    whole = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    assert whole[: len(ids)] == ids and "Hello" in tokenizer.decode(whole[len(ids) :])


def test_turns_are_a_users_and_the_assistants_alternately(tokenizer):
    turns = ("Hi", "Hello.", "And you?")
    roles = ("user", "assistant", "user")
    chat = [{"role": role, "content": turn} for role, turn in zip(roles, turns)]
    assert mosaic.prompt_ids(tokenizer, turns) == mosaic.prompt_ids(tokenizer, chat)
    assert mosaic.prompt_ids(tokenizer, ("Hi",)) == mosaic.prompt_ids(tokenizer, "Hi")


def test_control_tokens_stand_right_after_bos_and_padding_only_at_the_left(
    model, tokenizer, tokens
):
    rows = rows_of(tokenizer, tokens)
    batch = mosaic.make_batch(model, tokenizer, rows)
    embed = model.get_input_embeddings()
    for i, (prompt, control, answer, _) in enumerate(rows):
        text = embed(torch.tensor(prompt + answer))
        whole = torch.cat([text[:1], control, text[1:]])
        start = batch.inputs_embeds.shape[1] - len(whole)
        assert torch.equal(batch.inputs_embeds[i, start:], whole)
        assert batch.attention_mask[i].tolist() == [False] * start + [True] * len(whole)
        assert batch.position_ids[i, start:].tolist() == list(range(len(whole)))
        assert batch.labels[i, -len(answer) :].tolist() == answer
        assert (batch.labels[i, : -len(answer)] == IGNORE).all()


def test_a_table_made_for_it_stands_before_bos(model, tokenizer, tmp_path):
    table = ControlTokens.for_model(model, tokenizer, ["sex"], placement="before_bos")
    table.save(tmp_path / "t")
    again = ControlTokens.load(tmp_path / "t", model)
    ids = mosaic.prompt_ids(tokenizer, "Hi")
    batch = mosaic.make_batch(
        model, tokenizer, [mosaic.control_row(again, ["sex"], ids, [9])]
    )
    text = model.get_input_embeddings()(torch.tensor(ids + [9]))
    assert torch.equal(batch.inputs_embeds[0], torch.cat([table.vectors[0], text]))
    with pytest.raises(ValueError, match="bad placement 'first': it is one of"):
        ControlTokens.for_model(model, tokenizer, ["sex"], placement="first")


def test_without_a_bos_the_tokens_stand_first(model, tokenizer, tokens):
    control = tokens.compose(["sex"])
    batch = mosaic.make_batch(model, tokenizer, [Row([40, 41], control)])
    assert torch.equal(batch.inputs_embeds[0, :3], control)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_policy_gives_the_backbones_own_logits(family, tokenizer):
    model = tiny_model(family, tokenizer)
    table = ControlTokens.for_model(model, tokenizer, CATEGORIES)
    prompt, answer = mosaic.prompt_ids(tokenizer, ASKED[0]), [9, 8, 7]
    batch = mosaic.make_batch(
        model, tokenizer, [Row(prompt, table.compose([]), answer)]
    )
    with torch.no_grad():
        found = model(
            inputs_embeds=batch.inputs_embeds,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
        ).logits
        chosen = mosaic.answer_logits(model, batch)[0]
        plain = model(input_ids=torch.tensor([prompt + answer])).logits
    assert torch.equal(found, plain)
    torch.testing.assert_close(chosen, plain[0, -4:-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_policy_padded_batch_equals_row_by_row(family, tokenizer):
    model = tiny_model(family, tokenizer)
    rows = rows_of(tokenizer, ControlTokens.for_model(model, tokenizer, CATEGORIES))
    with torch.no_grad():
        logits, labels, states = mosaic.answer_logits(
            model, mosaic.make_batch(model, tokenizer, rows)
        )
        alone = [
            mosaic.answer_logits(model, mosaic.make_batch(model, tokenizer, [row]))[0]
            for row in rows
        ]
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert labels.tolist() == [9, 8, 7, 6, 5, 4] and len(states) == 6


def test_gradients_of_a_mixed_batch_equal_those_of_single_rows(
    model, tokenizer, tokens
):
    model.requires_grad_(False)

    def gradients(batches):
        tokens.zero_grad()
        for batch in batches:
            logits, labels, _ = mosaic.answer_logits(
                model, mosaic.make_batch(model, tokenizer, batch)
            )
            (mosaic.answer_loss(logits, labels) * len(labels)).backward()
        return [torch.zeros(1) if v.grad is None else v.grad for v in tokens.vectors]

    together = gradients([rows_of(tokenizer, tokens)])
    apart = gradients([[row] for row in rows_of(tokenizer, tokens)])
    for one, other in zip(together, apart):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert together[1].abs().sum() > 0


# --- 4. Order-based sampling ----------------------------------------------------------


def labelled(categories, each=6):
    found = [
        Request(f"{c} {i}", c) for c in (*categories, NEUTRAL) for i in range(each)
    ]
    return found + [
        Request(f"near {i}", NEUTRAL, near=categories[0]) for i in range(each)
    ]


def sampler(categories, per_subset=100, ratio=1.0, trainable=None):
    draw = random.Random(0)
    requests = labelled(categories)
    return OrderSampler(
        requests, categories, trainable or categories, per_subset, ratio, draw
    )


@pytest.mark.parametrize(
    "order, subsets, shares",
    [(1, 5, {100}), (2, 10, {50}), (3, 10, {50}), (4, 5, {100}), (5, 1, {100})],
)
def test_budgets_for_five_categories_are_the_papers(order, subsets, shares):
    positives, negatives = sampler(CATEGORIES).of_order(order)
    counts = Counter(task.policy for task in positives)
    assert len(counts) == subsets and set(counts.values()) == shares
    assert Counter(task.policy for task in negatives) == counts  # 1:1, subset by subset


def test_the_remainder_of_a_budget_is_spread_over_the_subsets():
    positives, _ = sampler(CATEGORIES, per_subset=7).of_order(2)  # 35 over 10 subsets
    counts = Counter(task.policy for task in positives)
    assert sorted(counts.values()) == [3] * 5 + [4] * 5
    more = {policy for policy, n in counts.items() if n == 4}
    assert more != set(list(itertools.combinations(CATEGORIES, 2))[:5])  # drawn


def test_positives_are_spread_evenly_over_the_active_categories():
    positives, _ = sampler(CATEGORIES).of_order(4)
    for policy in {task.policy for task in positives}:
        counts = Counter(t.request.category for t in positives if t.policy == policy)
        assert set(counts) == set(policy) and set(counts.values()) == {25}


def test_negatives_come_from_inactive_categories_neutral_and_near_misses():
    _, negatives = sampler(CATEGORIES).of_order(3)
    for policy in {task.policy for task in negatives}:
        kinds = Counter(
            "near" if t.request.near else t.request.category
            for t in negatives
            if t.policy == policy
        )
        assert set(kinds) == {*CATEGORIES, NEUTRAL, "near"} - set(policy)
        assert max(kinds.values()) - min(kinds.values()) <= 1
    assert all(t.refuse == (t.request.category in t.policy) for t in negatives)


@pytest.mark.parametrize("ratio, count", [(0.5, 250), (2.0, 1000), (0.0, 0)])
def test_the_number_of_negatives_follows_the_ratio(ratio, count):
    positives, negatives = sampler(CATEGORIES, ratio=ratio).of_order(2)
    assert (len(positives), len(negatives)) == (500, count)


def test_every_request_of_a_kind_is_used_equally_often():
    positives, _ = sampler(CATEGORIES).of_order(1)
    uses = Counter(t.request for t in positives if t.request.category == "sex")
    assert max(uses.values()) - min(uses.values()) <= 1 and len(uses) == 6


def test_an_epoch_cycles_over_the_orders_and_loses_no_task():
    epoch = sampler(CATEGORIES, per_subset=8).epoch((1, 2, 3), batch_size=16)
    assert sum(map(len, epoch)) == 3 * 2 * 40
    orders = [{len(task.policy) for task in batch} for batch in epoch]
    assert orders == [{1}, {2}, {3}] * 5
    assert all(sum(task.refuse for task in batch) == 8 for batch in epoch)


def test_tasks_of_about_one_length_share_a_batch():
    draw = lambda: sampler(CATEGORIES, per_subset=8)
    length = lambda task: len(task.request.prompt)
    sides = lambda batch: [[t for t in batch if t.refuse == side] for side in (0, 1)]
    spread = lambda batches: sum(
        max(map(length, side)) - min(map(length, side))
        for batch in batches
        for side in sides(batch)
        if side
    )
    anyhow = draw().epoch((1, 2, 3), 16)
    alike = draw().epoch((1, 2, 3), 16, length)
    assert spread(alike) < spread(anyhow) / 2
    assert [*map(len, alike)] == [*map(len, anyhow)]
    tasks = lambda batches: Counter(task for batch in batches for task in batch)
    assert tasks(alike) == tasks(anyhow)  # nothing lost, nothing twice
    shortest = [min(map(length, batch)) for batch in alike]
    assert shortest != sorted(shortest)  # batches come in any order


def test_a_hundred_categories_are_sampled_without_enumerating_subsets():
    many = [f"c{i}" for i in range(100)]
    began = time.process_time()
    tracemalloc.start()
    for order in (3, 50):  # C(100, 50) is 1e29
        positives, negatives = sampler(many, per_subset=10).of_order(order)
        assert len(positives) == len(negatives) == 1000
        assert len({task.policy for task in positives}) == 1000
        assert {len(set(task.policy)) for task in positives} == {order}
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert time.process_time() - began < 20  # enumerating would never end


def test_growth_samples_only_subsets_with_a_category_that_still_learns():
    positives, _ = sampler(CATEGORIES, trainable=["sex"]).of_order(2)
    assert {task.policy for task in positives} == {(c, "sex") for c in CATEGORIES[:4]}
    assert len(positives) == 100  # the total of order 1, where one subset still learns
    many = [f"c{i}" for i in range(100)]  # here subsets are drawn, not enumerated
    positives, _ = sampler(many, trainable=["c7"]).of_order(3)
    assert len(positives) == 100 and all("c7" in task.policy for task in positives)


def test_a_category_without_requests_is_named():
    with pytest.raises(ValueError, match="'golf'"):
        OrderSampler(labelled(["a"]), ["a", "golf"], ["a"], 1, 1.0, random.Random(0))


# --- 5. Losses ------------------------------------------------------------------------


def test_the_label_shift_is_that_of_transformers_own_loss(model, tokenizer):
    rows = [
        Row(mosaic.prompt_ids(tokenizer, asked), None, [9, 8, 7]) for asked in ASKED
    ]
    batch = mosaic.make_batch(model, tokenizer, rows)
    logits, labels, _ = mosaic.answer_logits(model, batch)
    theirs = model(
        inputs_embeds=batch.inputs_embeds,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        labels=batch.labels,
    ).loss
    torch.testing.assert_close(mosaic.answer_loss(logits, labels), theirs)


def test_kd_equals_a_slow_loop_and_torchs_own_divergence():
    torch.manual_seed(0)
    base, control = torch.randn(7, 11) * 3, torch.randn(7, 11) * 3
    slow = 0.0
    for p_row, q_row in zip(base.softmax(-1).tolist(), control.softmax(-1).tolist()):
        slow += sum(p * math.log(p / q) for p, q in zip(p_row, q_row)) / 7
    theirs = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=base),
        torch.distributions.Categorical(logits=control),
    ).mean()
    found = mosaic.counterfactual_kd(base, control)
    assert found.item() == pytest.approx(slow, rel=1e-5)
    torch.testing.assert_close(found, theirs)


def test_kd_sends_no_gradient_into_the_teacher():
    base = torch.randn(3, 5, requires_grad=True)
    control = torch.randn(3, 5, requires_grad=True)
    mosaic.counterfactual_kd(base, control).backward()
    assert base.grad is None and control.grad.abs().sum() > 0


def test_losses_over_no_position_are_zero():
    nothing, none = torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)
    assert mosaic.answer_loss(nothing, none) == 0
    assert mosaic.counterfactual_kd(nothing, nothing) == 0


# --- 6. Training ----------------------------------------------------------------------


def test_reference_answers_are_the_models_own_greedy_answers(backbone, tokenizer):
    asked = [Request(one, NEUTRAL) for one in ASKED]
    known = mosaic.reference_answers(backbone, tokenizer, asked, 20)
    for request in asked:
        ids = torch.tensor([mosaic.prompt_ids(tokenizer, request.prompt)])
        plain = backbone.generate(ids, do_sample=False, max_new_tokens=20)
        assert known[request].row.answer == plain[0, ids.shape[1] :].tolist()


def test_the_teacher_has_no_dropout_even_where_the_model_was_training(tokenizer):
    model = tiny_model("opt", tokenizer, dropout=0.5)
    asked = [Request(one, NEUTRAL) for one in ASKED]
    known = mosaic.reference_answers(model.eval(), tokenizer, asked, 6)
    again = mosaic.reference_answers(model.train(), tokenizer, asked, 6)
    for one in asked:
        assert known[one].row == again[one].row
        assert torch.equal(known[one].states, again[one].states)


def test_a_small_batch_size_holds_wherever_the_teacher_runs(
    model, tokenizer, tokens, monkeypatch
):
    asked = [Request(f"{one} {i}", NEUTRAL) for one in ASKED for i in range(4)]
    seen, real = [], mosaic.make_batch
    monkeypatch.setattr(
        mosaic, "make_batch", lambda *a: seen.append(len(a[2])) or real(*a)
    )
    mosaic.reference_answers(model, tokenizer, asked, 2, batch_size=1)
    assert max(seen) == 4
    seen.clear()
    mosaic.drift(model, tokenizer, tokens, asked, [["sex"]], batch_size=1)
    assert max(seen) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_logits_are_the_models_own_or_a_second_forward_is_taken(
    family, tokenizer, requests, capsys
):
    model = tiny_model(family, tokenizer)
    known = list(mosaic.reference_answers(model, tokenizer, requests[:5], 6).values())
    found = mosaic.teacher_logits(model, tokenizer, known)
    rows = [
        model(input_ids=torch.tensor([one.row.prompt + one.row.answer])).logits[
            0, len(one.row.prompt) - 1 : -1
        ]
        for one in known
    ]
    torch.testing.assert_close(found, torch.cat(rows), rtol=1e-4, atol=1e-4)
    plain = family not in ("gemma2", "cohere", "granite")
    assert all((one.states is not None) == plain for one in known)
    assert ("teacher runs at every step" in capsys.readouterr().out) == (not plain)


def losses(model, tokenizer, tokens, tasks, known, draw):
    target = mosaic.refusal_ids(model, tokenizer, mosaic.REFUSAL)
    tasks = sorted(tasks, key=lambda task: not task.refuse)
    rows = mosaic.task_rows(tokens, tasks, known, target, draw)
    return mosaic.task_losses(model, tokenizer, tasks, rows, known)


def test_gradients_reach_the_active_categories_and_nothing_else(
    model, tokenizer, tokens, requests
):
    model.requires_grad_(False)
    known = mosaic.reference_answers(model, tokenizer, requests, 8)
    policy = ("alcohol", "sex")
    tasks = [
        mosaic.Task(q, policy)
        for q in requests
        if q.category in ("alcohol", "sex", NEUTRAL)
    ]
    sum(losses(model, tokenizer, tokens, tasks, known, random.Random(0))).backward()
    assert all(weight.grad is None for weight in model.parameters())
    for name, vectors in zip(tokens.categories, tokens.vectors):
        if name in policy:
            assert (vectors.grad.abs().sum(1) > 0).all()  # each of the M vectors
        else:
            assert vectors.grad is None or not vectors.grad.any()


def test_task_losses_equal_a_row_by_row_reference(model, tokenizer, tokens, requests):
    known = mosaic.reference_answers(model, tokenizer, requests, 8)
    policy = ("alcohol",)
    tasks = [
        mosaic.Task(q, policy) for q in requests if q.category in ("alcohol", "horror")
    ]
    refusal = own_ids(tokenizer, mosaic.REFUSAL) + [tokenizer.eos_token_id]
    sums, counts = [0.0, 0.0, 0.0], [0, 0]
    with torch.no_grad():
        for task in tasks:
            prompt, _, answer, _ = known[task.request].row
            target = refusal if task.refuse else answer
            embed = model.get_input_embeddings()
            text = embed(torch.tensor(prompt + target))
            x = torch.cat([text[:1], tokens.compose(policy), text[1:]])[None]
            steered = model(inputs_embeds=x).logits[0, -len(target) - 1 : -1]
            bare = model(inputs_embeds=text[None]).logits[0, -len(target) - 1 : -1]
            log_q, log_p = steered.log_softmax(-1), bare.log_softmax(-1)
            kind = 0 if task.refuse else 1
            sums[kind] -= sum(log_q[i, one].item() for i, one in enumerate(target))
            counts[kind] += len(target)
            if not task.refuse:
                sums[2] += (log_p.exp() * (log_p - log_q)).sum().item()
    expected = [sums[0] / counts[0], sums[1] / counts[1], sums[2] / counts[1]]
    found = losses(model, tokenizer, tokens, tasks, known, random.Random(0))
    assert [one.item() for one in found] == pytest.approx(expected, rel=1e-4)


def test_training_leaves_every_backbone_tensor_bit_identical(
    model, tokenizer, tokens, requests
):
    model.train()  # as a careless caller would hand it over
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = [vectors.detach().clone() for vectors in tokens.vectors]
    history = mosaic.train(model, tokenizer, tokens, requests, QUICK)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(map(torch.equal, start, tokens.vectors)) and len(history) == 1
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_training_notices_a_backbone_that_changed(
    model, tokenizer, tokens, requests, monkeypatch
):
    real = mosaic.task_losses

    def meddle(*arguments):
        with torch.no_grad():
            model.lm_head.weight[3, 3] += 1e-3
        return real(*arguments)

    monkeypatch.setattr(mosaic, "task_losses", meddle)
    with pytest.raises(AssertionError, match="has changed the backbone"):
        mosaic.train(model, tokenizer, tokens, requests, QUICK)


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(
    model, tokenizer, requests
):
    def trained(seed):
        table = ControlTokens.for_model(model, tokenizer, CATEGORIES, 2, seed=7)
        config = TrainConfig(orders=(2,), epochs=2, positives_per_subset=3, seed=seed)
        mosaic.train(model, tokenizer, table, requests, config)
        return torch.cat(list(table.vectors))

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))


def test_frozen_categories_stay_bit_identical_while_new_ones_learn(
    model, tokenizer, requests
):
    table = ControlTokens.for_model(model, tokenizer, ["alcohol", "betting"])
    table.freeze(["alcohol", "betting"])
    table.add(model, tokenizer, ["horror"])
    start = [vectors.detach().clone() for vectors in table.vectors]
    mosaic.train(model, tokenizer, table, requests, QUICK)
    same = list(map(torch.equal, start, table.vectors))
    assert same == [True, True, False] and table.trainable == ["horror"]


def test_training_is_adam_on_the_weighted_sum_with_a_cosine_to_zero(
    model, tokenizer, tokens, requests
):
    config = TrainConfig(
        orders=(1, 2), epochs=2, learning_rate=0.02, kd_weight=3.0,
        positives_per_subset=2, batch_size=8, answer_tokens=8, seed=4,
    )  # fmt: skip
    twin = copy.deepcopy(tokens)
    history = mosaic.train(model, tokenizer, tokens, requests, config)
    assert len(history) == 2

    draw = random.Random(4)
    batches = OrderSampler(requests, CATEGORIES, CATEGORIES, 2, 1.0, draw)
    known = mosaic.reference_answers(model, tokenizer, requests, 8)
    adam = torch.optim.Adam(twin.parameters())
    for epoch in range(2):
        length = functools.partial(mosaic.task_length, known)
        todo = batches.epoch((1, 2), 8, length)
        for step, tasks in enumerate(todo):
            done = (epoch + step / len(todo)) / 2
            adam.param_groups[0]["lr"] = 0.02 * 0.5 * (1 + math.cos(math.pi * done))
            refusal, reference, kd = losses(model, tokenizer, twin, tasks, known, draw)
            adam.zero_grad()
            (refusal + reference + 3 * kd).backward()
            adam.step()
    for mine, theirs in zip(tokens.vectors, twin.vectors):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-6)


def test_training_shuffles_the_tokens_of_a_composition(
    model, tokenizer, tokens, requests
):
    known = mosaic.reference_answers(model, tokenizer, requests, 8)
    task = mosaic.Task(requests[0], tuple(CATEGORIES))
    found = {
        losses(model, tokenizer, tokens, [task], known, random.Random(i))[0].item()
        for i in range(6)
    }
    assert len(found) > 2


def test_some_positives_may_decline_a_few_words_into_an_answer(
    model, tokenizer, tokens, requests
):
    known = mosaic.reference_answers(model, tokenizer, requests, 12)
    tasks = [mosaic.Task(q, ("alcohol", "sex")) for q in requests] * 20
    for share in (0.0, 0.5):
        rows = mosaic.task_rows(tokens, tasks, known, [5], random.Random(0), share)
        lengths = Counter()
        for task, row in zip(tasks, rows):
            prompt, _, answer, _ = known[task.request].row
            begun = len(row.prompt) - len(prompt)
            assert row.prompt == [*prompt, *answer[:begun]]
            if task.refuse:
                assert row.answer == [5]
                lengths[begun] += 1
            else:
                assert begun == 0 and row.answer == answer
        assert (1 - lengths[0] / lengths.total()) == pytest.approx(share, abs=0.1)
    assert set(lengths) == set(range(9))


# Resuming: the same tokens as if nothing had happened.

RESUMED = TrainConfig(
    orders=(1, 2), epochs=3, positives_per_subset=4, batch_size=8, prefill=0.3
)


def run(model, tokenizer, requests, config=RESUMED, **options):
    table = ControlTokens.for_model(model, tokenizer, CATEGORIES, 2)
    history = mosaic.train(model, tokenizer, table, requests, config, **options)
    return list(table.vectors), history


def count_steps(model, tokenizer, requests):
    """Of a whole run."""
    draw = random.Random(0)
    sampler = OrderSampler(requests, CATEGORIES, CATEGORIES, 4, 1.0, draw)
    return 3 * len(sampler.epoch((1, 2), 8))


@pytest.mark.parametrize("stopped_in", [2, 3])
def test_a_stopped_run_is_taken_up_and_ends_with_the_same_tokens(
    model, tokenizer, requests, tmp_path, monkeypatch, stopped_in
):
    whole, history = run(model, tokenizer, requests)
    path, real, begun = tmp_path / "training.pt", torch.save, []

    def save(state, file):
        begun.append(file)
        real(state, file)
        if len(begun) == stopped_in:  # while it is written
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", save)
        run(model, tokenizer, requests, checkpoint=path)
    steps = []
    patch_losses = mosaic.task_losses
    monkeypatch.setattr(
        mosaic, "task_losses", lambda *a: steps.append(1) or patch_losses(*a)
    )
    again, resumed = run(model, tokenizer, requests, checkpoint=path)
    assert all(map(torch.equal, whole, again)) and resumed == history
    assert len(steps) * 3 == (4 - stopped_in) * count_steps(model, tokenizer, requests)
    steps.clear()  # a finished run is only read
    again, resumed = run(model, tokenizer, requests, checkpoint=path)
    assert all(map(torch.equal, whole, again)) and resumed == history and not steps


def test_a_checkpoint_of_another_run_is_refused_and_says_what_differs(
    model, tokenizer, requests, tmp_path
):
    path = tmp_path / "training.pt"
    run(model, tokenizer, requests, checkpoint=path)
    before = path.read_bytes()
    other = dataclasses.replace(RESUMED, epochs=4, seed=5)
    with pytest.raises(ValueError, match=r"anew \(epochs 3, now 4, seed 0, now 5"):
        run(model, tokenizer, requests, other, checkpoint=path)
    with pytest.raises(ValueError, match=r"anew \(requests"):
        run(model, tokenizer, requests[::-1], checkpoint=path)
    learn = [request for request in requests if request.split == "train"]
    known = mosaic.reference_answers(model, tokenizer, learn)
    for change in (  # other answers; other prompts, where a template writes the date
        lambda row: row._replace(answer=row.answer[:3]),
        lambda row: row._replace(prompt=[*row.prompt, 5]),
    ):
        other = {q: mosaic.Reference(change(one.row)) for q, one in known.items()}
        with pytest.raises(ValueError, match=r"anew \(requests"):
            run(model, tokenizer, requests, checkpoint=path, known=other)
    with pytest.raises(ValueError, match=r"anew \(.*start .* backbone"):
        stranger = tiny_model("llama", tokenizer, seed=1)
        run(stranger, tokenizer, requests, checkpoint=path)
    assert path.read_bytes() == before
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises(ValueError, match="training.pt is no readable checkpoint"):
        run(model, tokenizer, requests, checkpoint=path)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(
    model, tokenizer, requests, tmp_path, monkeypatch
):
    real, steps = mosaic.task_losses, []

    def broken(*arguments):
        steps.append(1)
        refusal, reference, kd = real(*arguments)
        return refusal, reference, kd / (len(steps) != total + 3)

    total = count_steps(model, tokenizer, requests) // 3
    monkeypatch.setattr(mosaic, "task_losses", broken)
    path = tmp_path / "training.pt"
    with pytest.raises(ValueError, match="not finite in epoch 2, step 3: lower the"):
        run(model, tokenizer, requests, checkpoint=path)
    saved = torch.load(path, weights_only=True)
    assert len(saved["history"]) == 1
    assert all(vectors.isfinite().all() for vectors in saved["tokens"].values())


def test_answers_end_where_the_tokenizer_or_the_checkpoint_says(model, tokenizer):
    own = model.generation_config.eos_token_id
    try:
        for said, more in ((None, set()), (7, {7}), ([7, 9], {7, 9})):
            model.generation_config.eos_token_id = said
            assert mosaic.end_ids(model, tokenizer) == {tokenizer.eos_token_id} | more
    finally:
        model.generation_config.eos_token_id = own


@pytest.mark.parametrize("orders", [(0,), (6,), (1, 9)])
def test_orders_outside_one_to_k_are_refused(
    model, tokenizer, tokens, requests, orders
):
    with pytest.raises(ValueError, match=r"orders in 1\.\.5"):
        mosaic.train(model, tokenizer, tokens, requests, TrainConfig(orders=orders))


def test_training_with_every_category_frozen_is_refused(
    model, tokenizer, tokens, requests
):
    tokens.freeze(CATEGORIES)
    with pytest.raises(ValueError, match="not frozen"):
        mosaic.train(model, tokenizer, tokens, requests, QUICK)


def test_a_trained_table_beats_the_untouched_backbone(backbone, tokenizer, requests):
    table = ControlTokens.for_model(backbone, tokenizer, ["alcohol", "betting"])
    config = TrainConfig(epochs=5, positives_per_subset=60)
    history = mosaic.train(backbone, tokenizer, table, requests, config)
    assert history[-1]["refusal"] < history[0]["refusal"]

    def respond(prompts, policies):
        return mosaic.generate(backbone, tokenizer, table, prompts, policies, 8)

    mine = [q for q in requests if q.category in ("alcohol", "betting")]
    asked = [q.prompt for q in mine]
    bare = mosaic.generate(backbone, tokenizer, None, asked, None, 8)
    plain = sum(map(mosaic.is_refusal, bare)) / len(bare)
    for row in mosaic.evaluate(respond, requests, table.categories, (1, 2)):
        assert row["dsr"]["rate"] > 0.7 > plain + 0.5, row
        assert row["over_refusal"]["rate"] < 0.2, row


# --- 7. Using it: generate ------------------------------------------------------------


def test_generate_answers_each_prompt_under_its_own_policy_as_if_alone(
    backbone, tokenizer
):
    table = ControlTokens.for_model(backbone, tokenizer, CATEGORIES)
    together = mosaic.generate(backbone, tokenizer, table, ASKED, POLICIES, 24)
    for asked, policy, answer in zip(ASKED, POLICIES, together):
        assert mosaic.generate(backbone, tokenizer, table, [asked], [policy], 24) == [
            answer
        ]
    bare = mosaic.generate(backbone, tokenizer, None, ASKED, max_new_tokens=24)
    assert bare[1] == together[1] and bare[0] != together[0]


def test_generate_reads_several_turns(backbone, tokenizer):
    chat = [
        {"role": "system", "content": "Do not talk about gardening."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "How do I prune my roses?"},
    ]
    (answer,) = mosaic.generate(backbone, tokenizer, None, [chat], max_new_tokens=32)
    assert mosaic.is_refusal(answer)
    (answer,) = mosaic.generate(
        backbone, tokenizer, None, [chat[1:]], max_new_tokens=32
    )
    assert not mosaic.is_refusal(answer)


def test_generate_ignores_sampling_settings_of_the_checkpoint(model, tokenizer):
    plain = mosaic.generate(model, tokenizer, None, ASKED, max_new_tokens=12)
    model.generation_config.update(
        do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0
    )
    assert mosaic.generate(model, tokenizer, None, ASKED, max_new_tokens=12) == plain


def test_generate_needs_a_policy_for_every_prompt(model, tokenizer, tokens):
    with pytest.raises(ValueError):
        mosaic.generate(model, tokenizer, tokens, ASKED, [()])
    with pytest.raises(ValueError, match="needs control tokens"):
        mosaic.generate(model, tokenizer, None, ASKED[:1], [["sex"]])


# --- 8. Evaluation --------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, refused",
    [
        (mosaic.REFUSAL, True),
        ("I\u2019m sorry, but I can\u2019t help with that", True),
        ("Sorry, I can't discuss that here.", True),
        ("I cannot provide that.", True),
        ("Unfortunately, I am not able to go into that.", True),
        ("**Sorry**, but that is off the table.", True),
        ("<think>I can't say this.</think>Gin and vermouth.", False),
        ("I can't wait to hear how it went! Start with the yeast.", False),
        ("Stir it well. I can't stress that enough.", False),
        ("I'm sorry to hear that. Rest and drink water.", False),
        ("At the bar, a Negroni means gin, Campari and vermouth.", False),
        ("You could say: I'm sorry, but I can't help with that.", False),
        ("", False),
    ],
)
def test_the_judge_looks_at_the_start_of_an_answer(answer, refused):
    assert mosaic.is_refusal(answer) is refused


def test_the_judge_knows_another_refusal_sentence_even_cut_short(monkeypatch):
    monkeypatch.setattr(mosaic, "REFUSAL", "I\u2019m off that topic here. Ask me more.")
    assert mosaic.is_refusal("I am off that topic") and mosaic.is_refusal(
        "I'm off that"
    )
    assert mosaic.is_refusal("I'm off that topic here. Ask me more. Bye.")
    assert not mosaic.is_refusal("I'm off") and not mosaic.is_refusal("I'm off to bed.")


# As words recur in any long text: half of these are there twice or more.
HOW_TO = """
Put the car on level ground and pull the brake. Take the jack, the wrench and the
spare wheel out of the boot. Loosen the nuts of the wheel with the wrench while the
wheel is on the ground, a turn of each nut is enough. Put the jack under the car where
the book of the car says, and turn it until the wheel is off the ground. Take the nuts
off, put the nuts where you can find them, and take the wheel off. Put the spare wheel
on, and put the nuts on by hand. Turn the jack until the wheel is on the ground, take
the jack out, and turn the nuts with the wrench, one and then the one across from it.
Put the wheel, the jack and the wrench in the boot, and have the wheel looked at as
soon as you can.
"""


@pytest.mark.parametrize(
    "answer, none",
    [
        ("</s> ...", True),
        ("gin is made " * 5, True),
        ("No.", False),
        ("To be or not to be, that is the question.", False),
        (HOW_TO, False),
        (HOW_TO * 3, True),
    ],
)
def test_an_answer_without_words_or_in_a_loop_is_none(answer, none):
    assert mosaic.is_degenerate(answer) is none


def test_wilson_intervals_match_textbook_values():
    found = mosaic.share([True] * 8 + [False] * 2)
    assert found["rate"] == 0.8 and found["n"] == 10
    assert found["low"] == pytest.approx(0.4902, abs=1e-4)
    assert found["high"] == pytest.approx(0.9433, abs=1e-4)
    assert mosaic.share([True] * 100)["low"] == pytest.approx(0.9630, abs=1e-4)
    assert mosaic.share([]) == {"rate": 0.0, "n": 0, "low": 0.0, "high": 1.0}


def test_evaluation_counts_each_kind_of_request_by_hand():
    categories = ["a", "b", "c"]
    requests = [Request(c, c) for c in categories] + [
        Request("plain", NEUTRAL),
        Request("near a", NEUTRAL, near="a"),
    ]

    def respond(
        prompts, policies
    ):  # declines what is active, "near a" with it, and "b"
        return [
            mosaic.REFUSAL if p[-1] in s or p == "b" else "Sure."
            for p, s in zip(prompts, policies)
        ]

    one, two = mosaic.evaluate(respond, requests, categories, (1, 2))
    assert (one["policies"], two["policies"]) == (3, 3)
    assert (one["dsr"]["rate"], one["dsr"]["n"]) == (1.0, 3)
    # Order 1: each policy has 2 inactive requests and a neutral one; "b" is in two.
    assert (one["over_refusal"]["rate"], one["over_refusal"]["n"]) == (2 / 9, 9)
    assert (one["near_miss"]["rate"], one["near_miss"]["n"]) == (1 / 3, 3)
    assert (two["over_refusal"]["rate"], two["over_refusal"]["n"]) == (1 / 6, 6)
    assert (two["near_miss"]["rate"], two["near_miss"]["n"]) == (2 / 3, 3)


def test_evaluation_draws_policies_where_an_order_has_too_many():
    categories = [f"c{i}" for i in range(40)]
    seen = []

    def respond(prompts, policies):
        seen.append(policies)
        return ["Sure."] * len(prompts)

    asked = [Request("x", "c1")]
    for _ in range(2):
        (row,) = mosaic.evaluate(respond, asked, categories, (20,), most_policies=6)
        assert row["policies"] == 6
    assert seen[0] == seen[1] and len(set(seen[0])) == 6


def test_a_second_judge_is_compared_with_the_first():
    (row,) = mosaic.evaluate(
        lambda prompts, policies: [mosaic.REFUSAL, "No."],
        [Request("x", "a")] * 2,
        ["a"],
        (1,),
        second_judge=lambda requests, answers: [True, True],
    )
    assert row["disagreement"]["rate"] == 0.5 and row["dsr"]["rate"] == 0.5


def test_degenerate_answers_are_counted_apart():
    (row,) = mosaic.evaluate(
        lambda prompts, policies: [mosaic.REFUSAL, "...", "Sure.", ""],
        [Request(c, c) for c in "aabb"],
        ["a", "b"],
        (2,),
    )
    assert (row["dsr"]["rate"], row["dsr"]["n"]) == (0.5, 2)
    assert (row["degenerate"]["rate"], row["degenerate"]["n"]) == (0.5, 4)


def test_choosing_takes_the_option_with_the_highest_log_likelihood(
    model, tokenizer, tokens
):
    options = ["Yes", "No", "Perhaps not today"]
    embed = model.get_input_embeddings()
    for asked in ASKED:
        for policy in ((), ("horror", "sex")):
            inserted = tokens.compose(policy)
            text = embed(torch.tensor(mosaic.prompt_ids(tokenizer, asked)))
            sums = []
            for option in options:
                end = own_ids(tokenizer, option)
                x = [text[:1], inserted, text[1:], embed(torch.tensor(end))]
                with torch.no_grad():
                    logits = model(inputs_embeds=torch.cat(x)[None]).logits[0]
                found = logits[-len(end) - 1 : -1].log_softmax(-1)
                sums.append(sum(found[i, one].item() for i, one in enumerate(end)))
            chosen = mosaic.choose(model, tokenizer, asked, options, tokens, policy)
            assert chosen == sums.index(max(sums))


def test_the_model_judge_calls_no_a_refusal(model, tokenizer, monkeypatch):
    def choose(model, tokenizer, prompt, options):
        assert options == ["Yes", "No"] and "What goes in" in prompt or "Hi" in prompt
        return 1 if "can't help" in prompt else 0

    monkeypatch.setattr(mosaic, "choose", choose)
    judge = mosaic.model_judge(model, tokenizer)
    assert judge(ASKED[:2], [mosaic.REFUSAL, "Hello."]) == [True, False]


def test_multiple_choice_accuracy_reads_mmlus_form_under_a_policy(
    model, tokenizer, tokens, monkeypatch
):
    items = [
        {
            "question": f"How many legs has a {who}?",
            "choices": ["two", "four"],
            "answer": 0,
        }
        for who in ("hen", "swan", "goose")
    ]
    seen = []

    def choose(model, tokenizer, prompt, options, tokens, policy):
        seen.append((policy, prompt, options))
        return 0

    def accuracy(items, policy=()):
        return mosaic.multiple_choice_accuracy(model, tokenizer, tokens, items, policy)

    assert 0 <= accuracy(items)["rate"] <= 1
    monkeypatch.setattr(mosaic, "choose", choose)
    assert accuracy(items, ["sex"])["rate"] == 1
    assert accuracy([item | {"answer": 1} for item in items])["rate"] == 0
    policy, asked, options = seen[0]
    assert policy == ["sex"] and seen[-1][0] == ()
    assert (
        "How many legs has a hen?" in asked and "A. two" in asked and "B. four" in asked
    )
    assert options == ["A", "B"]
    mosaic.multiple_choice_accuracy(
        model, tokenizer, None, items[:1], (), lambda text: ["rule", text]
    )
    assert seen[-1][1] == ["rule", asked]


def test_drift_is_zero_for_the_empty_policy_and_positive_for_random_tokens(
    model, tokenizer, tokens, requests
):
    none = mosaic.drift(model, tokenizer, tokens, requests, [()])
    assert none == {"kl": pytest.approx(0, abs=1e-6), "top1_agreement": 1.0}
    some = mosaic.drift(model, tokenizer, tokens, requests, [CATEGORIES])
    assert some["kl"] > 1e-3 and some["top1_agreement"] < 1
