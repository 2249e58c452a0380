"""One test per promise of mosaic.py, in its order; export has a file of its own."""

import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import random
import runpy
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import CATEGORIES, ROOT, tiny_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import mosaic
from mosaic import (
    IGNORE, NEUTRAL, SLOT, REFUSAL, ControlTokens, OrderSampler, Reference, Request,
    Row, Task, TrainConfig,
)

ASKED = [
    "What goes in a Negroni?", "Hi", "Which chess opening suits a patient beginner?"
]
POLICIES = [("alcohol", "sex"), (), ("horror",)]
QUICK = TrainConfig(
    orders=(1, 2), epochs=1, positives_per_subset=4, batch_size=8, answer_tokens=8
)


def own_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def rows_of(tokenizer, tokens, answers=([9, 8], [7], [6, 5, 4])):
    return [
        mosaic.control_row(tokenizer, tokens, policy, asked, answer)
        for asked, policy, answer in zip(ASKED, POLICIES, answers)
    ]


def embedded(model, row):
    """(L, D): what the model should read, put together by hand."""
    embed, parts = model.get_input_embeddings(), []
    for i in (*row.prompt, *row.answer):
        parts.append(row.control if i == SLOT else embed(torch.tensor([i])))
    return torch.cat(parts)


# --- 1. Requests and policies ---------------------------------------------------------


def test_importing_mosaic_prints_nothing_and_changes_no_setting_of_torch(capsys):
    cuda = torch.backends.cuda
    kinds = "cudnn", "flash", "mem_efficient", "math"

    def settings():
        sdp = [getattr(cuda, f"{kind}_sdp_enabled")() for kind in kinds]
        return sdp, torch.get_rng_state().tolist(), random.getstate()

    before = [getattr(cuda, f"{kind}_sdp_enabled")() for kind in kinds]
    for value in (True, False):
        try:
            for kind in kinds:
                getattr(cuda, f"enable_{kind}_sdp")(value)
            found = settings()
            runpy.run_path(str(ROOT / "mosaic.py"))
            assert settings() == found and found[0] == [value] * 4
        finally:
            for kind, was in zip(kinds, before):
                getattr(cuda, f"enable_{kind}_sdp")(was)
    assert capsys.readouterr() == ("", "")


def test_a_policy_is_used_in_the_order_of_the_table(tokens):
    assert mosaic.canonical({"sex", "alcohol"}, CATEGORIES) == ("alcohol", "sex")
    both = tokens.compose(["sex", "alcohol"])
    assert torch.equal(both, torch.cat([tokens.vectors[1], tokens.vectors[4]]))
    assert (both.shape, tokens.compose([]).shape) == ((6, 32), (0, 32))


@pytest.mark.parametrize(
    "policy", [["tobacco"], "alcohol", {"alcohol": 1}, ["alcohol", "Sex"]]
)
def test_a_policy_with_an_unknown_category_names_the_known_ones(tokens, policy):
    with pytest.raises(ValueError, match="addiction, alcohol, betting, horror, sex"):
        tokens.compose(policy)


def test_a_policy_that_can_be_read_only_once_is_read_whole(tokens):
    once = (name for name in ["sex", "alcohol"])
    assert torch.equal(tokens.compose(once), tokens.compose(["alcohol", "sex"]))
    tokens.freeze(name for name in tokens.categories if name != "sex")
    assert tokens.trainable == ["sex"]


def test_a_prompt_without_a_user_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no message with role 'user'"):
        mosaic.prompt_ids(tokenizer, [{"role": "system", "content": "Be kind."}])


# --- 2. Control tokens ----------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma"])  # gemma scales its embeddings
def test_start_values_stand_at_the_embeddings_as_the_model_reads_them(
    family, tokenizer
):
    model = tiny_model(family, tokenizer)
    table = ControlTokens.for_model(model, tokenizer, ["alcohol"])
    assert table.vectors[0].shape == (5, 32)
    ids = own_ids(tokenizer, "alcohol") * 5
    words = model.get_input_embeddings()(torch.tensor(ids[:5]))
    std = mosaic.embedding_std(model, tokenizer)
    scale = mosaic.stream_size(model, tokenizer) / std
    off = (table.vectors[0] / scale - words).std() / std
    assert 0.08 < off < 0.12


@pytest.mark.parametrize("family, scaled", [("llama", 1), ("granite", 3)])
def test_the_start_is_as_long_as_the_residual_stream_half_way_up(
    tokenizer, family, scaled
):
    model = tiny_model(family, tokenizer, num_hidden_layers=4)
    seen = []
    model.model.layers[1].register_forward_hook(lambda _, x, out: seen.append(out))
    size = scaled * mosaic.stream_size(model, tokenizer)  # as the first layer reads it
    model(torch.tensor([tokenizer(mosaic.REFUSAL)["input_ids"]]))
    rms = seen[-1][0].square().mean(-1).sqrt().sort().values  # (L,)
    assert size == pytest.approx(rms[(len(rms) - 1) // 2].item())
    assert rms[0] < size < rms[-1]
    words = ControlTokens.for_model(model, tokenizer, ["alcohol"]).vectors[0]
    assert 0.7 < scaled * words.square().mean().sqrt() / size < 1.4


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_the_unit_is_that_of_embeddings_as_the_model_reads_them(family, tokenizer):
    model = tiny_model(family, tokenizer)
    read = model.get_input_embeddings()(torch.arange(len(tokenizer)))
    std = mosaic.embedding_std(model, tokenizer)
    assert std == pytest.approx(read.std().item(), rel=0.05)


def test_vectors_and_logits_are_fp32_on_a_backbone_in_bf16(model, tokenizer):
    table = ControlTokens.for_model(model.bfloat16(), tokenizer, CATEGORIES, 2)
    assert {vectors.dtype for vectors in table.vectors} == {torch.float32}
    row = mosaic.control_row(tokenizer, table, ["sex"], "Hi", [9])
    assert mosaic.answer_logits(model, [row])[0].dtype == torch.float32


DAILY = [
    Request("the gin today", "alcohol"), Request("the wine gin today", "alcohol"),
    Request("the poker odds today", "betting"), Request("the odds today", "betting"),
    Request("the weather today", NEUTRAL), Request("the ghost today", NEUTRAL),
]


def test_tokens_start_at_the_words_that_tell_a_category_from_the_others(tokenizer):
    def words(requests, category, m):
        ids = mosaic.telling_ids(tokenizer, requests, category, m)
        return [tokenizer.decode(i).strip() for i in ids]

    assert words(DAILY, "alcohol", 2) == ["gin", "wine"]
    assert words(DAILY, "betting", 2) == ["odds", "poker"]
    assert {*words(DAILY, "alcohol", 4)[2:]} == {"the", "today"}  # all have these
    assert words(DAILY, "alcohol", 9)[4:] == words(DAILY, "alcohol", 9)[:5]
    assert words(DAILY[::-1], "alcohol", 2) == ["gin", "wine"]
    unseen = [*DAILY, *(Request("a beer", "alcohol", "test") for _ in range(9))]
    assert words(unseen, "alcohol", 12) == words(DAILY, "alcohol", 12)
    near = [*DAILY, *[Request("the gin today", NEUTRAL, near="alcohol")] * 9]
    assert words(near, "alcohol", 2) == ["gin", "wine"]
    assert words([], "alcohol", 1) == [tokenizer.decode(own_ids(tokenizer, "alcohol"))]
    chat = [{"role": "system", "content": "odd"}, *mosaic.as_messages("the gin")]
    assert {*words([Request(chat, "alcohol")], "alcohol", 9)} == {"the", "gin"}


def test_a_tokenizer_may_hold_more_tokens_than_the_model_has_rows(tokenizer):
    model = tiny_model("llama", tokenizer, vocab_size=len(tokenizer) - 200)
    table = ControlTokens.for_model(model, tokenizer, ["alcohol"])
    assert table.vectors[0].isfinite().all()


@pytest.mark.parametrize(
    "names, m",
    [(["a", "a"], 5), ([""], 5), ([NEUTRAL], 5), ("ab", 5), ([], 5), (["a"], 0)],
)
def test_a_table_refuses_bad_names_and_sizes(model, tokenizer, names, m):
    with pytest.raises(ValueError, match="list of distinct new names"):
        ControlTokens.for_model(model, tokenizer, names, m)


def test_a_table_grows_by_new_categories_and_keeps_the_old_vectors(model, tokenizer):
    table = ControlTokens.for_model(model, tokenizer, ["alcohol"], 7)
    old = table.vectors[0].detach().clone()
    table.add(model, tokenizer, ["horror", "sex"])
    assert table.categories == ["alcohol", "horror", "sex"]
    assert torch.equal(table.vectors[0], old)
    fresh = ControlTokens.for_model(model, tokenizer, ["sex"], 7)
    assert torch.equal(table.vectors[2], fresh.vectors[0])  # the name alone decides
    with pytest.raises(ValueError, match="list of distinct new names"):
        table.add(model, tokenizer, ["alcohol"])


def test_save_and_load_return_the_same_table(model, tokens, tmp_path):
    path = tmp_path / "tokens.safetensors"
    tokens.save(path)
    again = ControlTokens.load(path, model)
    assert (again.categories, again.made_for) == (tokens.categories, tokens.made_for)
    assert all(map(torch.equal, again.vectors, tokens.vectors))
    assert [p.name for p in path.parent.iterdir()] == ["tokens.safetensors"]


def test_a_table_knows_its_backbone_in_fp32_and_bf16_compiled_or_not(
    model, tokenizer, tokens, tmp_path
):
    tokens.save(tmp_path / "t")
    compiled = torch.compile(model, backend="eager")
    for same in (compiled, model.to(torch.bfloat16)):
        assert ControlTokens.load(tmp_path / "t", same).categories == CATEGORIES
    with pytest.raises(ValueError, match="the table was made for"):
        ControlTokens.load(tmp_path / "t", tiny_model("llama", tokenizer, seed=1))


def rewritten(path, how):
    about = json.loads(mosaic.safe_open(path, "pt").metadata()["mosaic"])
    data = load_file(path)
    if how == "a set missing":
        del data["sex"]
    elif how == "another format":
        about["format"] = 1
    about.pop(how.removeprefix("no "), None)
    save_file(data, path, metadata={"mosaic": json.dumps(about)})


@pytest.mark.parametrize(
    "how, said",
    [
        ("truncated", ""), ("pickle", ""), ("no metadata", ""), ("missing", ""),
        ("a set missing", ""), ("no format", ""), ("no categories", ""),
        ("another format", "format 1, now 3: train it anew"),
    ],
)
def test_a_damaged_or_old_table_is_refused_by_name(tokens, tmp_path, how, said):
    path = tmp_path / "tokens.safetensors"
    tokens.save(path)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    elif how == "pickle":
        torch.save({"alcohol": torch.zeros(3, 32)}, path)
    elif how == "no metadata":
        save_file(load_file(path), path)
    elif how == "missing":
        path.unlink()
    else:
        rewritten(path, how)
    with pytest.raises(ValueError, match=f"tokens.safetensors.*{said}"):
        ControlTokens.load(path)


@pytest.mark.parametrize("kind", ["table", "checkpoint", "export"])
def test_a_full_disk_leaves_what_was_there_and_no_half_of_a_file(
    model, tokenizer, tokens, requests, tmp_path, monkeypatch, kind
):
    def half(_, path, **options):
        if kind == "export":
            path = Path(path, "model.safetensors")
            path.parent.mkdir()
        Path(path).write_bytes(b"half")
        raise RuntimeError("No space left on device")

    path = tmp_path / "it"
    if kind == "table":
        path.write_bytes(b"before")
    monkeypatch.setattr(mosaic, "save_file", half)
    monkeypatch.setattr(torch, "save", half)
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", half)
    with pytest.raises(RuntimeError, match="No space left"):
        if kind == "table":
            tokens.save(path)
        elif kind == "checkpoint":
            run(model, tokenizer, requests, checkpoint=path)
        else:
            mosaic.export_checkpoint(model, tokenizer, tokens, path)
    assert path.exists() == (kind == "table")
    assert kind != "table" or path.read_bytes() == b"before"


def test_a_table_starts_and_grows_at_the_words_of_its_requests(model, tokenizer):
    table = ControlTokens.for_model(model, tokenizer, ["alcohol"], 2, DAILY)
    table.add(model, tokenizer, ["betting"], requests=DAILY)
    for name, vectors in zip(table.categories, table.vectors):
        ids = torch.tensor(mosaic.telling_ids(tokenizer, DAILY, name, 2))
        words = model.get_input_embeddings()(ids)
        assert F.cosine_similarity(vectors, words).min() > 0.9


# --- 3. From prompt to batch to logits ------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_control_tokens_stand_at_their_place_and_padding_only_at_one_side(
    model, tokenizer, tokens, side
):
    rows = rows_of(tokenizer, tokens)
    assert [SLOT in row.prompt for row in rows] == [True, False, True]
    inputs, labels = mosaic.make_batch(model, rows, side)
    x, mask, positions = inputs.values()  # (B, L, D), (B, L), (B, L)
    for i, row in enumerate(rows):
        whole = embedded(model, row)
        pad = x.shape[1] - len(whole)
        at = slice(pad, None) if side == "left" else slice(len(whole))
        assert torch.equal(x[i, at], whole)
        assert mask[i].sum() == mask[i, at].sum() and mask[i, at].all()
        assert positions[i, at].tolist() == [*range(len(whole))]
        start = len(whole) - len(row.answer)
        assert labels[i, at].tolist() == [IGNORE] * start + row.answer
        assert (labels[i] != IGNORE).sum() == len(row.answer)


@pytest.mark.parametrize("device, parts", [("cuda", [5]), ("cpu", [3, 2])])
def test_a_gpu_reads_a_batch_whole_and_a_cpu_in_two_halves(device, parts, monkeypatch):
    read = []

    def logits(model, rows):
        read.append(len(rows))
        return torch.tensor([[float(i)] for i in rows]), torch.tensor(rows)

    monkeypatch.setattr(mosaic, "padded_logits", logits)
    model = SimpleNamespace(device=torch.device(device))
    found, labels = mosaic.answer_logits(model, [1, 2, 3, 4, 5])
    assert read == parts
    assert found[:, 0].tolist() == labels.tolist() == [1, 2, 3, 4, 5]


def test_cudnns_attention_is_shut_out_of_the_forward_and_of_nothing_else(
    model, tokenizer, tokens
):
    enabled, seen = torch.backends.cuda.cudnn_sdp_enabled, []
    before = enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        model.model.layers[0].self_attn.register_forward_pre_hook(
            lambda *_: seen.append(enabled())
        )
        mosaic.answer_logits(model, rows_of(tokenizer, tokens))
        assert seen == [False, False] and enabled()  # both halves
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("length", [64, 192, 320])  # 64 modulo 128: cuDNN's bad ones
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_gradients_in_bf16_are_finite_and_those_of_fp32(device, length, tokenizer):
    """As in Qwen2: biases drive a query's log-sum-exp below -88.7."""
    size = dict(hidden_size=256, num_attention_heads=4, head_dim=64)
    model = tiny_model("qwen2", tokenizer, **size, max_position_embeddings=512)
    with torch.no_grad():
        for weight in model.parameters():  # tiny_model's is too lively for bf16
            weight.mul_(0.2 if weight.ndim == 2 else 1)
        for layer in model.model.layers:
            slow = torch.arange(64) % 32 >= 24  # dimensions that hardly turn
            for sign, proj in ((1, "q_proj"), (-1, "k_proj")):
                bias = layer.self_attn.get_submodule(proj).bias
                bias.copy_(8.0 * sign * slow.repeat(len(bias) // 64))
    model.requires_grad_(False)
    tokens = ControlTokens.for_model(model, tokenizer, ["alcohol"], 8).to(device)
    answer = [9, 8, 7, 6]
    fill = length - len(answer) - 7  # one of the eight stands where SLOT did
    rows = [
        Row([*range(100, 100 + n), SLOT, 40, 41], tokens.vectors[0], answer)
        for n in (fill - 3, 20)
    ]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model.to(device, dtype)
        tokens.zero_grad()
        rows = [row._replace(control=tokens.compose(["alcohol"])) for row in rows]
        assert mosaic.make_batch(model, rows, "right")[1].shape == (2, length)
        mosaic.answer_loss(*mosaic.answer_logits(model, rows)).backward()
        found.append(tokens.vectors[0].grad.flatten().clone())
    assert all(gradient.isfinite().all() for gradient in found)
    assert F.cosine_similarity(*found, dim=0) > 0.99


# --- 4. Answers and refusals ----------------------------------------------------------


def test_generate_answers_each_prompt_under_its_own_policy_as_if_alone(
    backbone, tokenizer
):
    table = ControlTokens.for_model(backbone, tokenizer, CATEGORIES)
    answer = functools.partial(mosaic.generate, backbone, tokenizer, table)
    together = answer(ASKED, POLICIES, 24)
    for asked, policy, found in zip(ASKED, POLICIES, together):
        assert answer([asked], [policy], 24) == [found]
    bare = mosaic.generate(backbone, tokenizer, None, ASKED, max_new_tokens=24)
    assert bare[1] == together[1] and bare[0] != together[0]
    assert answer(ASKED, POLICIES, 24, batch_size=2) == together  # in their own order


def test_generate_reads_several_turns(backbone, tokenizer):
    chat = [
        {"role": "system", "content": "Do not talk about gardening."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "How do I prune my roses?"},
    ]
    answers = mosaic.generate(backbone, tokenizer, None, [chat, chat[1:]], None, 32)
    assert [*map(mosaic.is_refusal, answers)] == [True, False]


def test_generate_gives_the_head_no_slice_of_states_and_leaves_no_hook(
    model, tokenizer
):
    head, seen = model.get_output_embeddings(), []
    with head.register_forward_hook(lambda _, args, out: seen.extend(args)):
        mosaic.generate(model, tokenizer, None, ASKED, None, 4)
    assert {states.shape[0] for states in seen} == {len(ASKED)} and len(ASKED) > 1
    assert all(states.is_contiguous() for states in seen)
    assert not head._forward_pre_hooks


def test_generate_puts_a_model_in_training_mode_out_of_it(tokenizer):
    model = tiny_model("opt", tokenizer, dropout=0.5)
    plain = mosaic.generate(model, tokenizer, None, ASKED, None, 12)
    assert mosaic.generate(model.train(), tokenizer, None, ASKED, None, 12) == plain


SETTINGS = [
    {"repetition_penalty": 9.0}, {"temperature": 0.6}, {"stop_strings": ["e"]},
    {"do_sample": True, "temperature": 5.0, "top_k": 3},
    {"return_dict_in_generate": True, "output_scores": True}, {"num_beams": 3},
    {"max_length": 5, "min_new_tokens": 12}, {"no_repeat_ngram_size": 1},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda setting: next(iter(setting)))
def test_settings_that_a_checkpoint_brings_change_no_answer(
    backbone, tokenizer, settings
):
    plain = mosaic.generate(backbone, tokenizer, None, ASKED, None, 12)
    own = backbone.generation_config
    backbone.generation_config = theirs = copy.deepcopy(own)
    try:
        for name, value in settings.items():
            setattr(theirs, name, value)
        found = mosaic.generate(backbone, tokenizer, None, ASKED, None, 12)
        assert found == plain and backbone.generation_config is theirs
    finally:
        backbone.generation_config = own


def test_while_it_answers_other_threads_find_the_models_own_settings(model, tokenizer):
    own, seen = model.generation_config, []
    look = SimpleNamespace(
        put=lambda ids: seen.append(model.generation_config is own), end=list
    )
    row = Row(mosaic.prompt_ids(tokenizer, ASKED[0]))
    mosaic.generate_ids(model, tokenizer, [row], 3, streamer=look)
    assert seen and all(seen)


def test_answers_end_where_the_tokenizer_or_the_checkpoint_says(model, tokenizer):
    for said, more in ((None, set()), (7, {7}), ([7, 9], {7, 9})):
        model.generation_config.eos_token_id = said
        assert {*mosaic.end_ids(model, tokenizer)} == {tokenizer.eos_token_id} | more
    model.generation_config.eos_token_id = [7, 9]
    rows = [Row(mosaic.prompt_ids(tokenizer, asked)) for asked in ASKED]
    first = mosaic.generate_ids(model, tokenizer, rows, 12)[0]
    model.generation_config.eos_token_id = first[4]
    (ended, *_) = mosaic.generate_ids(model, tokenizer, rows, 12)
    assert ended == first[: first.index(first[4]) + 1]


def test_without_a_known_end_generate_goes_on_and_train_stops_before_it_begins(
    model, tokens, tokenizer, requests, monkeypatch
):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = model.generation_config.eos_token_id = None
    tokenizer.chat_template = None  # its own writes the EOS
    (ids,) = mosaic.generate_ids(model, tokenizer, [Row([4, 5, 6])], 9)
    assert len(ids) == 9
    monkeypatch.delattr(mosaic, "training_references")
    start = copy.deepcopy(tokens.state_dict())
    with pytest.raises(ValueError, match="nothing ends an answer: set tokenizer.eos"):
        mosaic.train(model, tokenizer, tokens, requests, QUICK)
    assert all(torch.equal(start[k], v) for k, v in tokens.state_dict().items())


def test_generate_needs_a_list_and_a_policy_for_every_prompt(model, tokenizer, tokens):
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        mosaic.generate(model, tokenizer, tokens, ASKED, [()])
    with pytest.raises(ValueError, match="must be a list"):
        mosaic.generate(model, tokenizer, tokens, ASKED[0])


def test_generate_takes_no_table_of_another_backbone(tokenizer, tokens):
    other = tiny_model("llama", tokenizer, seed=1)
    with pytest.raises(ValueError, match="the table was made for"):
        mosaic.generate(other, tokenizer, tokens, ASKED)


# --- 5. The objective -----------------------------------------------------------------


def test_the_loss_is_a_sum_with_the_label_shift_of_transformers_own(model, tokenizer):
    rows = [
        mosaic.control_row(tokenizer, None, (), asked, [9, 8, 7]) for asked in ASKED
    ]
    logits, labels = mosaic.answer_logits(model, rows)
    inputs, every = mosaic.make_batch(model, rows, "right")
    mean = model(**inputs, labels=every).loss
    torch.testing.assert_close(mosaic.answer_loss(logits, labels), 9 * mean)
    weights = torch.rand(9)
    by_hand = -sum(
        w * row.log_softmax(-1)[y] for w, row, y in zip(weights, logits, labels)
    )
    torch.testing.assert_close(mosaic.answer_loss(logits, labels, weights), by_hand)


def test_kd_is_the_weighted_sum_of_divergences_by_a_slow_loop_and_by_torch():
    torch.manual_seed(0)
    base, controlled = torch.randn(7, 11) * 3, torch.randn(7, 11) * 3
    weights, slow = torch.rand(7), 0.0
    rows = zip(weights.tolist(), base.softmax(-1), controlled.softmax(-1))
    for w, p_row, q_row in rows:
        pairs = zip(p_row.tolist(), q_row.tolist())
        slow += w * sum(p * math.log(p / q) for p, q in pairs)
    found = mosaic.counterfactual_kd(base, controlled, weights)
    assert found.item() == pytest.approx(slow, rel=1e-5)
    categorical = torch.distributions.Categorical
    theirs = torch.distributions.kl_divergence(
        categorical(logits=base), categorical(logits=controlled)
    ).sum()
    torch.testing.assert_close(mosaic.counterfactual_kd(base, controlled), theirs)


def test_kd_sends_no_gradient_into_the_teacher():
    base = torch.randn(3, 5, requires_grad=True)
    controlled = torch.randn(3, 5, requires_grad=True)
    mosaic.counterfactual_kd(base, controlled).backward()
    assert base.grad is None and controlled.grad.abs().sum() > 0


# --- 6. Order-based sampling ----------------------------------------------------------


def labelled(categories, each=6):
    names = [c for c in (*categories, NEUTRAL) for _ in range(each)]
    found = [Request(f"{name} {i}", name) for i, name in enumerate(names)]
    near = [Request(f"near {i}", NEUTRAL, near=categories[0]) for i in range(each)]
    return found + near


def sampler(categories, per_subset=100, ratio=1.0, trainable=None):
    return OrderSampler(
        labelled(categories), categories, trainable or categories, per_subset, ratio,
        random.Random(0),
    )


def sides_of(order, *arguments, **options):
    """(positives, negatives) of an order for one epoch."""
    tasks = sampler(*arguments, **options).of_order(order)
    return [t for t in tasks if t.refuse], [t for t in tasks if not t.refuse]


@pytest.mark.parametrize(
    "order, subsets, shares",
    [(1, 5, {100}), (2, 10, {50}), (3, 10, {50}), (4, 5, {100}), (5, 1, {100})],
)
def test_budgets_for_five_categories_are_the_papers(order, subsets, shares):
    positives, negatives = sides_of(order, CATEGORIES)
    counts = Counter(task.policy for task in positives)
    assert len(counts) == subsets and set(counts.values()) == shares
    assert Counter(task.policy for task in negatives) == counts  # 1:1, subset by subset


def test_the_remainder_of_a_budget_is_spread_over_the_subsets():
    positives, _ = sides_of(2, CATEGORIES, per_subset=7)  # 35 over 10 subsets
    counts = Counter(task.policy for task in positives)
    assert sorted(counts.values()) == [3] * 5 + [4] * 5
    more = {policy for policy, n in counts.items() if n == 4}
    assert more != set(list(itertools.combinations(CATEGORIES, 2))[:5])  # drawn


def test_positives_are_spread_evenly_over_the_active_categories():
    positives, _ = sides_of(4, CATEGORIES)
    for policy in {task.policy for task in positives}:
        counts = Counter(t.request.category for t in positives if t.policy == policy)
        assert set(counts) == set(policy) and set(counts.values()) == {25}


def test_negatives_come_from_inactive_categories_neutral_and_near_misses():
    _, negatives = sides_of(3, CATEGORIES)
    for policy in {task.policy for task in negatives}:
        asked = [task.request for task in negatives if task.policy == policy]
        kinds = Counter("near" if q.near else q.category for q in asked)
        assert set(kinds) == {*CATEGORIES, NEUTRAL, "near"} - set(policy)
        assert max(kinds.values()) - min(kinds.values()) <= 1
    assert not any(task.refuse for task in negatives)


@pytest.mark.parametrize("ratio, count", [(0.5, 250), (2.0, 1000), (0.0, 0)])
def test_the_number_of_negatives_follows_the_ratio(ratio, count):
    positives, negatives = sides_of(2, CATEGORIES, ratio=ratio)
    assert (len(positives), len(negatives)) == (500, count)


def test_every_request_of_a_kind_is_used_equally_often():
    positives, _ = sides_of(1, CATEGORIES)
    uses = Counter(t.request for t in positives if t.request.category == "sex")
    assert max(uses.values()) - min(uses.values()) <= 1 and len(uses) == 6


def test_an_epoch_cycles_over_the_orders_and_loses_no_task():
    epoch = sampler(CATEGORIES, per_subset=8).epoch((1, 2, 3), batch_size=16)
    assert [*map(len, epoch)] == [16] * 15
    orders = [{len(task.policy) for task in batch} for batch in epoch]
    assert orders == [{1}, {2}, {3}] * 5
    active = [sum(task.refuse for task in batch) for batch in epoch]
    assert sum(active) == 3 * 40 and all(0 < n < 16 for n in active)  # mixed
    epoch = sampler(CATEGORIES, per_subset=1).epoch((1, 5), batch_size=4)
    assert [*map(len, epoch)] == [4, 2, 4, 2]  # 5 + 5 of order 1, 1 + 1 of order 5


def test_a_hundred_categories_are_sampled_without_enumerating_subsets():
    many = [f"c{i}" for i in range(100)]
    began = time.process_time()
    for order in (3, 50):  # C(100, 50) is 1e29
        positives, negatives = sides_of(order, many, per_subset=10)
        assert len(positives) == len(negatives) == 1000
        assert len({task.policy for task in positives}) == 1000
        assert {len(set(task.policy)) for task in positives} == {order}
    assert time.process_time() - began < 20  # enumerating would never end


def test_the_same_seed_draws_the_same_subsets_in_another_process():
    code = ("import random, mosaic; every = [f'c{i}' for i in range(40)]; "
            "print(mosaic.subsets(every, 20, 6, random.Random(0)))")
    drawn = set()
    for seed in "123":
        env = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code]
        drawn.add(subprocess.check_output(command, cwd=ROOT, env=env))
    assert len(drawn) == 1


def test_growth_samples_only_subsets_with_a_category_that_still_learns():
    positives, _ = sides_of(2, CATEGORIES, trainable=["sex"])
    assert {task.policy for task in positives} == {(c, "sex") for c in CATEGORIES[:4]}
    assert len(positives) == 100  # the total of order 1, where one subset still learns
    many = [f"c{i}" for i in range(100)]  # here subsets are drawn, not enumerated
    positives, _ = sides_of(3, many, trainable=["c7"])
    assert len(positives) == 100 and all("c7" in task.policy for task in positives)


def test_a_category_without_requests_is_named():
    with pytest.raises(ValueError, match="'golf'"):
        OrderSampler(labelled(["a"]), ["a", "golf"], ["a"], 1, 1.0, random.Random(0))


def test_an_epoch_smaller_than_the_data_takes_requests_from_all_over_it():
    asked = [Request(f"{i}", c) for c in ("a", NEUTRAL) for i in range(400)]
    drawn = OrderSampler(asked, ["a"], ["a"], 40, 1.0, random.Random(0)).of_order(1)
    places = [int(task.request.prompt) for task in drawn]
    assert min(places) < 100 and max(places) > 300


# --- 7. Training ----------------------------------------------------------------------


def test_defaults_are_those_that_the_readme_speaks_of():
    assert dataclasses.asdict(TrainConfig()) == {
        "orders": None, "epochs": 8, "optimizer": "muon", "learning_rate": 0.7,
        "kd_weight": 1.0, "first_weight": 3.0, "later_weight": 0.3,
        "positives_per_subset": 100, "negatives_per_positive": 1.0, "batch_size": 16,
        "answer_tokens": 16, "later_turns": 0.5, "seed": 0,
    }


@pytest.fixture
def trained(monkeypatch):
    """The batches of tasks that a training sees."""
    seen, real = [], mosaic.batch_losses
    monkeypatch.setattr(
        mosaic, "batch_losses",
        lambda model, tasks, *more: seen.append(tasks) or real(model, tasks, *more))
    return seen


def test_by_default_orders_one_to_four_are_trained_in_turn(
    model, tokenizer, tokens, requests, trained
):
    config = TrainConfig(epochs=1, positives_per_subset=2, answer_tokens=2)
    mosaic.train(model, tokenizer, tokens, requests, config)
    orders = [{len(task.policy) for task in tasks} for tasks in trained]
    assert orders == [{1}, {2}, {3}, {4}] * 2


def test_training_draws_as_many_negatives_as_told_and_only_what_still_learns(
    model, tokenizer, tokens, requests, trained
):
    tokens.freeze(CATEGORIES[:4])
    config = dataclasses.replace(QUICK, negatives_per_positive=2.0)
    mosaic.train(model, tokenizer, tokens, requests, config)
    tasks = [task for tasks in trained for task in tasks]
    assert Counter(task.refuse for task in tasks) == {True: 8, False: 16}
    assert all("sex" in task.policy for task in tasks)


def test_later_turns_are_of_requests_from_all_over_and_follow_many(
    model, tokenizer, requests
):
    found = mosaic.training_references(model, tokenizer, requests, QUICK)
    later, asked = found[len(requests):], [q.prompt for q in requests]
    places = [asked.index(q.prompt[-1]["content"]) for q in later]
    assert max(places) >= len(later) > 3
    assert len({q.prompt[0]["content"] for q in later}) > 3


def test_the_means_of_an_epoch_go_by_their_names(
    model, tokenizer, tokens, requests, monkeypatch
):
    rows = iter([[1.0, 2.0, 3.0, 0.5, math.nan], [3.0, 4.0, 5.0, math.nan, 0.25]])
    monkeypatch.setattr(
        mosaic, "batch_losses",
        lambda *given: torch.tensor(next(rows)) + 0 * tokens.vectors[0].sum())
    config = dataclasses.replace(
        QUICK, orders=(1,), positives_per_subset=2, batch_size=10)
    (means,) = mosaic.train(model, tokenizer, tokens, requests, config)
    assert means == {"refusal": 2, "reference": 3, "kd": 4,
                     "declines_active": 0.5, "declines_others": 0.25}


@pytest.mark.parametrize(
    "knob", [{"epochs": 0}, {"later_turns": 1.5}, {"kd_weight": -1.0},
             {"learning_rate": math.nan}, {"first_weight": math.inf},
             {"learning_rate": 0}, {"batch_size": 16.0}, {"epochs": 0.5},
             {"learning_rate": "1"}, {"epochs": None}, {"orders": []}],
    ids=str,
)
def test_a_knob_out_of_range_is_named(knob):
    (name,) = knob
    allowed = "it must be a (whole )?number in |name some, or take None"
    with pytest.raises(ValueError, match=f"{name} is .*; ({allowed})"):
        TrainConfig(**knob)


def test_what_may_be_a_fraction_may_be_given_as_a_whole_number():
    assert TrainConfig(learning_rate=2, negatives_per_positive=1, kd_weight=0)
    with pytest.raises(ValueError, match="learning_rate is 0; .* in 1e-09.."):
        TrainConfig(learning_rate=0)


def test_a_torch_without_muon_is_told_before_anything_is_computed(
    monkeypatch, model, tokenizer, tokens
):
    monkeypatch.delattr(torch.optim, "Muon")
    monkeypatch.delattr(mosaic, "training_references")
    with pytest.raises(AttributeError, match="has no attribute 'Muon'"):
        mosaic.train(model, tokenizer, tokens, [])


def test_a_table_is_trained_and_used_where_it_was_made_for(
    model, tokenizer, requests, tmp_path, monkeypatch
):
    chat = [{"role": "user", "content": "Hi there."},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "What goes in a Negroni?"}]
    read, make_batch = set(), mosaic.make_batch

    def noted(model, rows, side):
        placed = [row.prompt for row in rows if row.control is not None]
        read.update(tokenizer.decode(row[: row.index(SLOT)])[-9:] for row in placed)
        return make_batch(model, rows, side)

    monkeypatch.setattr(mosaic, "make_batch", noted)
    for place in mosaic.PLACES:
        table = ControlTokens.for_model(model, tokenizer, CATEGORIES, 2, place=place)
        mosaic.train(model, tokenizer, table, requests, QUICK)
        mosaic.generate(model, tokenizer, table, [chat], [["sex"]], 2)
        table.save(tmp_path / place)
        again = ControlTokens.load(tmp_path / place, model)
        mosaic.generate(model, tokenizer, again, [chat], [["sex"]], 2)
        heads = {tokenizer.decode(mosaic.prompt_ids(tokenizer, "")[:2])[-9:]}
        words = {q.prompt[-9:] for q in requests} | {"Hi there."}
        assert read and read <= (heads if place == "before" else words), read
        read.clear()


def test_a_place_that_is_none_and_references_for_another_are_refused(
    model, tokenizer, requests
):
    with pytest.raises(ValueError, match="'behind'; take before or after"):
        ControlTokens.for_model(model, tokenizer, ["sex"], place="behind")
    table = ControlTokens.for_model(model, tokenizer, CATEGORIES, place="before")
    learn = mosaic.training_references(model, tokenizer, requests, QUICK)
    with pytest.raises(ValueError, match="references of another place than 'before'"):
        mosaic.train(model, tokenizer, table, [], QUICK, references=learn)


def test_a_table_saved_when_there_was_one_place_stands_before_the_words(
    tokens, tmp_path
):
    del tokens.made_for["place"]
    tokens.save(tmp_path / "t")
    assert ControlTokens.load(tmp_path / "t").made_for["place"] == "before"


@pytest.mark.parametrize("place", mosaic.PLACES)
def test_reference_answers_are_the_models_own_greedy_answers(
    backbone, tokenizer, place
):
    asked = [Request(prompt, NEUTRAL, "test", "sex") for prompt in ASKED]
    found = mosaic.reference_answers(backbone, tokenizer, asked, 20, place=place)
    for request, reference in zip(asked, found, strict=True):
        ids = torch.tensor([mosaic.prompt_ids(tokenizer, request.prompt)])
        plain = backbone.generate(ids, do_sample=False, max_new_tokens=20)
        plain = plain[0, ids.shape[1] :].tolist()
        assert reference == mosaic.Reference(
            *dataclasses.astuple(request), tuple(ids[0].tolist()),
            tuple(mosaic.prompt_ids(tokenizer, request.prompt, place)), tuple(plain),
            tokenizer.decode(plain, skip_special_tokens=True).strip(),
        )


def test_what_the_backbone_declines_itself_is_counted_and_left_out(
    model, tokenizer, requests, monkeypatch, capsys
):
    real = mosaic.reference_answers
    declined = [request.prompt for request in requests[:3]]

    def answers(*arguments, **options):
        return [
            dataclasses.replace(r, text="No way.")
            if mosaic.user_words(r.prompt)[-1] in declined else r
            for r in real(*arguments, **options)
        ]

    monkeypatch.setattr(mosaic, "reference_answers", answers)
    more = [Request("never learnt", NEUTRAL, "test")]
    found = mosaic.training_references(
        model, tokenizer, requests + more, QUICK, refusal="No way."
    )
    alone = [r.prompt for r in found if isinstance(r.prompt, str)]
    assert alone == [q.prompt for q in requests if q.prompt not in declined]
    assert f"declines 3 of {len(requests)} training requests" in capsys.readouterr().out


def test_a_share_of_the_requests_comes_again_in_a_later_turn(
    model, tokenizer, requests
):
    def turns(share, seed=0):
        config = dataclasses.replace(QUICK, later_turns=share, seed=seed)
        found = mosaic.training_references(model, tokenizer, requests, config)
        alone = found[: len(requests)]
        assert [r.prompt for r in alone] == [q.prompt for q in requests]
        return found[len(requests) :]

    assert [len(turns(share)) for share in (0.0, 0.5, 1.0)] == [
        0, round(len(requests) / 2), len(requests)
    ]
    assert turns(0.5) == turns(0.5) != turns(0.5, seed=1)
    by_words = {q.prompt: q for q in requests}
    for again in turns(1.0):
        first, answer, last = again.prompt
        assert [m["role"] for m in again.prompt] == ["user", "assistant", "user"]
        own = by_words[last["content"]]
        assert (again.category, again.near) == (own.category, own.near)
        (before,) = mosaic.reference_answers(
            model, tokenizer, [by_words[first["content"]]], QUICK.answer_tokens
        )
        assert answer["content"] == before.text
        at = [i for i, token in enumerate(again.placed) if token == SLOT]
        for i, turn in zip(at, (first, last), strict=True):
            said = [token for token in again.placed[:i] if token != SLOT]
            assert tokenizer.decode(said).endswith(turn["content"])


def test_a_later_turn_keeps_its_own_system_message_if_there_is_no_other():
    before = Reference("Odds?", "betting", text="Seven to two.")
    system = {"role": "system", "content": "Be brief."}
    chat = [system, *mosaic.as_messages("And now?")]
    again = mosaic.later_turn(before, Request(chat, "betting"))
    roles = [message["role"] for message in again.prompt]
    assert again.prompt[0] == system and roles[1:] == ["user", "assistant", "user"]


def test_references_are_made_of_references_too(model, tokenizer, requests):
    once = mosaic.reference_answers(model, tokenizer, requests[:3], 4)
    assert mosaic.reference_answers(model, tokenizer, once, 4) == once


def test_a_later_turn_keeps_the_first_system_message_and_no_second(model, tokenizer):
    def chat(i):
        system = {"role": "system", "content": f"system {i}"}
        return [system, *mosaic.as_messages(f"asked {i}")]

    asked = [Request(chat(i), "sex") for i in range(4)]
    config = dataclasses.replace(QUICK, later_turns=1.0)
    found = mosaic.training_references(model, tokenizer, asked, config)
    assert len(found) == 8
    for again in found[4:]:
        system, asked, answer, last = again.prompt
        roles = [message["role"] for message in again.prompt]
        assert roles == ["system", "user", "assistant", "user"]
        assert system["content"][-1] == asked["content"][-1]
        assert last["content"].startswith("asked")
    assert all(r.prompt == chat(i) for i, r in enumerate(found[:4]))  # not edited


@pytest.mark.parametrize(
    "progress, first, later",
    [(0.0, 3, 0.3), (2 / 3, 3, 0.3), (5 / 6, 2, 0.65), (1.0, 1, 1)],
)
def test_weights_of_an_answer_go_over_to_the_plain_sum_in_the_last_third(
    progress, first, later
):
    rows = [Row([0], None, [5, 6, 7]), Row([0], None, [5]), Row([0], None, [5, 6])]
    found = mosaic.answer_weights(rows, TrainConfig(), progress)
    assert found.tolist() == pytest.approx([first, later, later, first, first, later])


def tasks_of(references, *policies):
    """Every request under every policy, in random order, as the sampler gives them."""
    tasks = [Task(r, policy) for policy in policies for r in references]
    return random.Random(0).sample(tasks, len(tasks))


def losses_of(model, tokenizer, tokens, tasks, rng, config=QUICK, progress=0.0):
    refusal = mosaic.refusal_ids(model, tokenizer, REFUSAL)
    rows = mosaic.task_rows(tokens, tasks, refusal, rng)
    weights = mosaic.answer_weights(rows, config, progress)
    found = mosaic.batch_losses(model, tasks, rows, weights, refusal)
    return rows, (found[:3], found[3:].detach())


@pytest.mark.parametrize("weights", [(1, 1), (3, 0.3)], ids=["plain sums", "weighted"])
def test_losses_of_a_mixed_batch_equal_a_slow_reference_row_by_row(
    model, tokenizer, tokens, requests, weights
):
    first, later = weights
    config = dataclasses.replace(QUICK, first_weight=first, later_weight=later)
    some = mosaic.training_references(model, tokenizer, requests[::4], config)
    assert any(len(r.prompt) == 3 for r in some)  # later turns are longer
    tasks = tasks_of(some, ("alcohol",), ("betting", "horror", "sex"))
    for i, (request, policy) in enumerate(tasks):  # answers of lengths of their own
        short = dataclasses.replace(request, answer=request.answer[: 1 + i % 5])
        tasks[i] = Task(short, policy)
    rows, (losses, shares) = losses_of(
        model, tokenizer, tokens, tasks, random.Random(0), config
    )
    sums, declines = [0.0, 0.0, 0.0], {True: [], False: []}
    with torch.no_grad():
        for task, row in zip(tasks, rows):
            n = len(row.answer)
            assert row.prompt == task.request.placed
            assert row.answer[-1] == tokenizer.eos_token_id or not task.refuse
            seen = model(inputs_embeds=embedded(model, row)[None]).logits[0]
            ids = [*task.request.bare, *row.answer]
            bare = model(input_ids=torch.tensor([ids])).logits[0]
            for t in range(n):
                w = first if t == 0 else later
                q, p = seen[t - n - 1].double().exp(), bare[t - n - 1].double().exp()
                q, p = q / q.sum(), p / p.sum()
                sums[0 if task.refuse else 1] -= w * q[row.answer[t]].log().item()
                if not task.refuse:
                    sums[2] += w * (p * (p.log() - q.log())).sum().item()
            starts = seen[-n - 1].argmax().item() == own_ids(tokenizer, REFUSAL)[0]
            declines[task.refuse].append(starts)
    expected = [one / len(tasks) for one in sums]  # the mean over all tasks
    assert losses.tolist() == pytest.approx(expected, rel=1e-4)
    rates = [sum(found) / len(found) for found in (declines[True], declines[False])]
    assert shares.tolist() == pytest.approx(rates)


def test_first_token_shares_tell_active_requests_from_others(
    model, tokenizer, tokens, requests, monkeypatch
):
    some = mosaic.reference_answers(model, tokenizer, requests, 3)
    tasks = tasks_of(some, ("alcohol",))
    real, first = mosaic.answer_logits, own_ids(tokenizer, REFUSAL)[0]

    def decided(model, rows):
        logits, labels = real(model, rows)
        starts = labels == first  # of each refusal
        return logits + 1e4 * F.one_hot(starts * first, logits.shape[1]), labels

    monkeypatch.setattr(mosaic, "answer_logits", decided)
    measure = functools.partial(losses_of, model, tokenizer, tokens)
    _, (_, shares) = measure(tasks, random.Random(0))
    assert shares.tolist() == [1.0, 0.0]
    active = [task for task in tasks if task.refuse]
    _, (losses, shares) = measure(active, random.Random(0))
    assert shares[0] == 1 and shares[1].isnan() and losses[1:].tolist() == [0, 0]
    others = [task for task in tasks if not task.refuse]
    _, (losses, shares) = measure(others, random.Random(0))
    assert shares[0].isnan() and shares[1] == 0 and losses[0] == 0 and losses[1] > 0


def test_no_position_of_a_training_batch_is_without_anything_to_attend_to(
    model, tokenizer, tokens, requests
):
    masks = []
    model.register_forward_pre_hook(
        lambda model, args, given: masks.append(given["attention_mask"]),
        with_kwargs=True,
    )
    some = mosaic.reference_answers(model, tokenizer, requests, 8)
    masks.clear()
    losses_of(model, tokenizer, tokens, tasks_of(some, ("sex",)), random.Random(0))
    assert not all(mask.all() for mask in masks)  # there is padding
    for mask in masks:  # with tokens, and the teacher's, in two halves each
        causal = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril()
        assert (causal & mask[:, None, :]).any(-1).all()  # (B, L, L) -> (B, L)
    assert len(masks) == 4


@pytest.mark.parametrize("policy", [("addiction", "sex"), ("alcohol", "sex"), ("sex",)])
def test_gradients_reach_the_active_categories_and_nothing_else(
    policy, model, tokenizer, tokens, requests
):
    model.requires_grad_(False)
    some = mosaic.reference_answers(model, tokenizer, requests, 8)
    tasks = tasks_of(some, policy)
    _, (losses, _) = losses_of(model, tokenizer, tokens, tasks, random.Random(0))
    losses.sum().backward()
    assert all(weight.grad is None for weight in model.parameters())
    for name, vectors in zip(tokens.categories, tokens.vectors):
        if name in policy:
            assert (vectors.grad.abs().sum(1) > 0).all()  # each of the M vectors
        else:
            assert vectors.grad is None  # zeros would be stepped on, by momentum


def test_training_shuffles_the_tokens_of_a_composition(tokenizer, model, tokens):
    (some,) = mosaic.reference_answers(model, tokenizer, [Request("Hi", "sex")], 4)
    task = Task(some, tuple(CATEGORIES))
    rows = mosaic.task_rows(tokens, [task] * 40, [5], random.Random(0))
    sets = {tuple(row.control[::3, 0].tolist()) for row in rows}
    assert len(sets) > 20 and len({frozenset(found) for found in sets}) == 1


def test_training_leaves_every_backbone_weight_bit_identical(
    model, tokenizer, tokens, requests
):
    model.train()  # as a careless caller would hand it over
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = [vectors.detach().clone() for vectors in tokens.vectors]
    assert len(mosaic.train(model, tokenizer, tokens, requests, QUICK)) == 1
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(map(torch.equal, start, tokens.vectors))
    assert not model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.slow
def test_a_compiled_backbone_trains_and_answers_as_the_plain_one(
    model, tokenizer, tokens, requests
):
    twin = copy.deepcopy(tokens)
    compiled = torch.compile(model, backend="eager")
    mosaic.train(compiled, tokenizer, tokens, requests, QUICK)
    mosaic.train(model, tokenizer, twin, requests, QUICK)
    for vectors, others in zip(tokens.vectors, twin.vectors):
        torch.testing.assert_close(vectors, others, rtol=0, atol=1e-5)
    answers = [
        mosaic.generate(which, tokenizer, tokens, ASKED, POLICIES, 8)
        for which in (compiled, model)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_the_learning_rate_is_in_units_of_the_embeddings_deviation(
    tokenizer, requests, optimizer
):
    config = TrainConfig(
        optimizer=optimizer, orders=(1,), epochs=1, positives_per_subset=2,
        batch_size=99,
    )
    moved = []
    for factor in (1, 10):
        model = tiny_model("llama", tokenizer, tie_word_embeddings=False)
        model.get_input_embeddings().weight.data *= factor
        table = ControlTokens.for_model(model, tokenizer, CATEGORIES, 3)
        start = torch.cat([*table.vectors]).detach()
        mosaic.train(model, tokenizer, table, requests, config)  # one step
        step = torch.cat([*table.vectors]).detach() - start
        unit = mosaic.embedding_std(model, tokenizer)
        moved.append(step.square().mean().sqrt().item())
        # Muon's orthogonal step is one within 30%.
        close = 0.3 if optimizer == "muon" else 1e-3
        assert moved[-1] == pytest.approx(0.7 * unit, rel=close)
    assert moved[1] == pytest.approx(10 * moved[0], rel=0.1)


def test_a_step_of_muon_moves_a_category_in_as_many_directions_as_it_has_tokens(
    tokenizer, requests
):
    spread = {}
    for optimizer in ("muon", "adam"):
        model = tiny_model("llama", tokenizer)
        table = ControlTokens.for_model(model, tokenizer, CATEGORIES, 4)
        start = [vectors.detach().clone() for vectors in table.vectors]
        config = TrainConfig(
            optimizer=optimizer, orders=(1,), epochs=1, positives_per_subset=2,
            batch_size=99,
        )
        mosaic.train(model, tokenizer, table, requests, config)
        sizes = [torch.linalg.svdvals(v - s) for v, s in zip(table.vectors, start)]
        spread[optimizer] = max((s[0] / s[-1]).item() for s in sizes)
    assert spread["muon"] < 2 < spread["adam"]


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_training_steps_on_the_weighted_sums_with_a_cosine_to_zero(
    model, tokenizer, tokens, requests, optimizer
):
    config = TrainConfig(
        optimizer=optimizer,
        orders=(1, 2), epochs=2, learning_rate=0.2, kd_weight=3.0, batch_size=8,
        positives_per_subset=2, answer_tokens=8, seed=4,
    )
    twin = copy.deepcopy(tokens)
    assert len(mosaic.train(model, tokenizer, tokens, requests, config)) == 2
    some = mosaic.training_references(model, tokenizer, requests, config)
    assert len(some) > len(requests)
    unit = mosaic.embedding_std(model, tokenizer)
    if optimizer == "muon":
        unit *= model.config.hidden_size**0.5
        mine = torch.optim.Muon(twin.parameters(), weight_decay=0, momentum=0.9)
    else:
        mine = torch.optim.Adam(twin.parameters())
    for epoch in range(2):
        rng = random.Random(f"4, epoch {epoch}")
        batches = OrderSampler(some, CATEGORIES, CATEGORIES, 2, 1.0, rng)
        batches = batches.epoch((1, 2), 8)
        for step, tasks in enumerate(batches):
            tasks = sorted(tasks, key=lambda task: len(task.request.placed))
            done = (epoch + step / len(batches)) / 2
            cosine = 0.5 * (1 + math.cos(math.pi * done))
            mine.param_groups[0]["lr"] = 0.2 * unit * cosine
            _, (losses, _) = losses_of(model, tokenizer, twin, tasks, rng, config, done)
            mine.zero_grad()
            (losses[0] + losses[1] + 3 * losses[2]).backward()
            mine.step()
    for vectors, others in zip(tokens.vectors, twin.vectors):
        torch.testing.assert_close(vectors, others, rtol=0, atol=1e-6)


# Resuming: the same tokens as if nothing had happened.

RESUMED = dataclasses.replace(QUICK, epochs=3, positives_per_subset=2)


def run(model, tokenizer, requests, config=RESUMED, seed=0, **options):
    table = ControlTokens.for_model(model, tokenizer, CATEGORIES, 2, seed=seed)
    history = mosaic.train(model, tokenizer, table, requests, config, **options)
    return list(table.vectors), history


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(
    model, tokenizer, requests
):
    one, two, other = (
        run(model, tokenizer, requests, dataclasses.replace(QUICK, seed=seed))[0]
        for seed in (0, 0, 1)
    )
    assert all(map(torch.equal, one, two)) and not any(map(torch.equal, one, other))


@pytest.mark.parametrize(
    "stopped_in, saving",
    [
        (2, True),
        pytest.param(1, False, marks=pytest.mark.slow),
        pytest.param(3, False, marks=pytest.mark.slow),
    ],
)
def test_a_run_stopped_in_any_epoch_is_resumed_to_the_same_tokens(
    model, tokenizer, requests, tmp_path, monkeypatch, stopped_in, saving
):
    whole, history = run(model, tokenizer, requests)
    path, steps, epochs = tmp_path / "training.pt", [], []
    real, real_save, real_epoch = mosaic.batch_losses, torch.save, mosaic.train_epoch

    def step(*arguments):
        steps.append(len(epochs))
        if not saving and steps.count(stopped_in) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    def save(state, file):
        real_save(state, file)
        if saving and len(epochs) == stopped_in:
            raise KeyboardInterrupt

    monkeypatch.setattr(
        mosaic, "train_epoch", lambda *a: epochs.append(a[-1]) or real_epoch(*a)
    )
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mosaic, "batch_losses", step)
        patch.setattr(torch, "save", save)
        run(model, tokenizer, requests, checkpoint=path)
    assert path.exists() == (stopped_in > 1) and len(epochs) == stopped_in
    for still in ([*range(stopped_in - 1, 3)], []):  # then it is finished, only read
        epochs.clear()
        again, resumed = run(model, tokenizer, requests, checkpoint=path)
        assert all(map(torch.equal, whole, again)) and resumed == history
        assert epochs == still


def test_a_checkpoint_of_another_run_is_refused(
    model, tokenizer, requests, tmp_path
):
    path = tmp_path / "training.pt"
    config = dataclasses.replace(QUICK, positives_per_subset=1)
    run(model, tokenizer, requests, config, checkpoint=path)
    before = path.read_bytes()
    refused = functools.partial(run, model, tokenizer, requests, checkpoint=path)
    other = dataclasses.replace(config, epochs=4, later_weight=0.5)
    said = pytest.raises(ValueError, match="other data, settings, start or date in")
    with said:
        refused(other)
    some = mosaic.training_references(model, tokenizer, requests, config)
    for change in (  # other answers; other prompts, where a template writes the date
        {"answer": some[0].answer[:3]}, {"bare": (*some[0].bare, 5)}
    ):
        others = [dataclasses.replace(some[0], **change), *some[1:]]
        with said:
            refused(config, references=others)
    with said:
        refused(config, seed=1)
    with said:
        run(tiny_model("llama", tokenizer, seed=1), tokenizer, requests, config,
            checkpoint=path)
    assert path.read_bytes() == before
    refused(config, references=some)  # the run's own
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises(ValueError, match="training.pt is damaged"):
        refused(config)


class Broken(torch.autograd.Function):
    """Passes losses on, and a gradient of NaN back."""

    @staticmethod
    def forward(ctx, losses):
        return losses.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.nan


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_and_keeps_the_epoch_before(
    model, tokenizer, requests, tmp_path, monkeypatch, what
):
    real, steps, path = mosaic.batch_losses, [], tmp_path / "training.pt"

    def broken(*arguments):
        found = real(*arguments)
        steps.append(path.exists())  # from the second epoch on
        if sum(steps) != 3:
            return found
        return found * math.nan if what == "loss" else Broken.apply(found)

    monkeypatch.setattr(mosaic, "batch_losses", broken)
    with pytest.raises(ValueError, match="not finite in epoch 2: lower the"):
        run(model, tokenizer, requests, checkpoint=path)
    saved = torch.load(path, weights_only=True)
    assert len(saved["history"]) == 1
    assert all(vectors.isfinite().all() for vectors in saved["tokens"].values())


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


def test_a_table_trained_with_a_range_of_orders_can_be_saved(
    model, tokenizer, requests, tmp_path
):
    table = ControlTokens.for_model(model, tokenizer, iter(CATEGORIES), 2)
    config = dataclasses.replace(QUICK, epochs=1, orders=range(1, 3))
    mosaic.train(model, tokenizer, table, requests, config)
    table.save(tmp_path / "t.safetensors")
    loaded = ControlTokens.load(tmp_path / "t.safetensors")
    assert loaded.made_for["training"]["orders"] == [1, 2]
    assert loaded.categories == CATEGORIES


@pytest.mark.parametrize("orders", [(0,), (6,), (1, 9), (1,)])
def test_orders_outside_one_to_k_and_a_table_all_frozen_are_refused(
    model, tokenizer, tokens, requests, orders
):
    if orders == (1,):
        tokens.freeze(CATEGORIES)
    with pytest.raises(ValueError, match=r"not frozen, and orders in 1\.\.5"):
        mosaic.train(model, tokenizer, tokens, requests, TrainConfig(orders=orders))


def test_requests_with_a_system_message_train_evaluate_and_generate(
    model, tokenizer, tokens, requests
):
    said = {"role": "system", "content": "You are the help desk of Acme."}
    asked = [
        dataclasses.replace(q, prompt=[said, *mosaic.as_messages(q.prompt)])
        for q in requests
    ]
    seen = []

    def respond(prompts, policies):
        seen.extend(zip(prompts, policies))
        return mosaic.generate(model, tokenizer, tokens, prompts, policies, 2)

    mosaic.train(model, tokenizer, tokens, asked, QUICK)
    (row,) = mosaic.evaluate(
        respond, asked, CATEGORIES, (5,), judge=lambda prompt, _: prompt[0] == said
    )
    assert row["dsr"]["rate"] == row["over_refusal"]["rate"] == 1
    ids = mosaic.prompt_ids(tokenizer, seen[0][0], "after")
    assert "help desk of Acme" in tokenizer.decode(ids[: ids.index(SLOT)])


@pytest.mark.slow
def test_a_trained_table_beats_the_untouched_backbone(backbone, tokenizer, requests):
    names = ["alcohol", "betting"]
    table = ControlTokens.for_model(
        backbone, tokenizer, names, requests=requests, place="before")
    config = TrainConfig(epochs=4, positives_per_subset=60)
    history = mosaic.train(backbone, tokenizer, table, requests, config)
    assert history[-1]["declines_active"] > 0.7 > 0.3 > history[-1]["declines_others"]

    def respond(prompts, policies):
        return mosaic.generate(backbone, tokenizer, table, prompts, policies, 8)

    asked = [q.prompt for q in requests if q.category in names]
    bare = mosaic.generate(backbone, tokenizer, None, asked, None, 8)
    plain = sum(map(mosaic.is_refusal, bare)) / len(bare)
    for row in mosaic.evaluate(respond, requests, table.categories, (1, 2)):
        assert row["dsr"]["rate"] > 0.7 > plain + 0.5, row
        assert row["over_refusal"]["rate"] < 0.2, row


# --- 8. Evaluation --------------------------------------------------------------------


def test_wilson_intervals_match_textbook_values():
    found = mosaic.share([True] * 8 + [False] * 2)
    assert found["rate"] == 0.8 and found["n"] == 10
    assert found["low"] == pytest.approx(0.4902, abs=1e-4)
    assert found["high"] == pytest.approx(0.9433, abs=1e-4)
    assert mosaic.share([True] * 100)["low"] == pytest.approx(0.9630, abs=1e-4)
    assert mosaic.share([]) == {"rate": 0.0, "n": 0, "low": 0.0, "high": 1.0}


@pytest.mark.parametrize("judge", ["the rules", "a judge of one's own"])
def test_evaluation_counts_each_kind_of_request_by_hand(judge):
    categories = ["a", "b", "c"]
    requests = [Request(c, c) for c in categories] + [
        Request("plain", NEUTRAL), Request("near a", NEUTRAL, near="a")
    ]
    no = REFUSAL if judge == "the rules" else "Njet."

    def respond(prompts, policies):  # declines what is active, "near a", too, and "b"
        pairs = zip(prompts, policies)
        return [no if p[-1] in s or p == "b" else "Sure." for p, s in pairs]

    own = {} if judge == "the rules" else {"judge": lambda prompt, said: said == no}
    one, two = mosaic.evaluate(respond, requests, categories, (1, 2), **own)
    assert (one["policies"], two["policies"]) == (3, 3)
    assert (one["dsr"]["rate"], one["dsr"]["n"]) == (1.0, 3)
    # Order 1: each policy has 2 inactive requests and a neutral one; "b" is in two.
    assert (one["over_refusal"]["rate"], one["over_refusal"]["n"]) == (2 / 9, 9)
    assert (one["near_miss"]["rate"], one["near_miss"]["n"]) == (1 / 3, 3)
    assert (two["over_refusal"]["rate"], two["over_refusal"]["n"]) == (1 / 6, 6)
    assert (two["near_miss"]["rate"], two["near_miss"]["n"]) == (2 / 3, 3)


def test_evaluation_draws_policies_where_an_order_has_too_many():
    categories, seen = [f"c{i}" for i in range(40)], []

    def respond(prompts, policies):
        seen.append(policies)
        return ["Sure."] * len(prompts)

    for _ in range(2):
        (row,) = mosaic.evaluate(
            respond, [Request("x", "c1")], categories, (20,), most_policies=6
        )
        assert row["policies"] == 6
    assert seen[0] == seen[1] and len(set(seen[0])) == 6
    for orders in ((3,), (2, 3)):  # whatever is measured beside it
        mosaic.evaluate(respond, [Request("x", "c1")], categories, orders, 6)
    assert seen[2] == seen[4]


# --- What is refused before anything runs ---------------------------------------------


def test_a_checkpoint_is_not_taken_up_for_another_refusal(
    model, tokenizer, requests, tmp_path
):
    config = dataclasses.replace(QUICK, positives_per_subset=1)
    few = dict(tokens_per_category=2)
    tables = [
        ControlTokens.for_model(model, tokenizer, CATEGORIES, **few, refusal=sentence)
        for sentence in (mosaic.REFUSAL, "Not here, please.")
    ]
    path = str(tmp_path / "training.pt")
    mosaic.train(model, tokenizer, tables[0], requests, config, checkpoint=path)
    with pytest.raises(ValueError, match="other data, settings, start or date in"):
        mosaic.train(model, tokenizer, tables[1], requests, config, checkpoint=path)


def test_an_order_without_a_policy_is_refused_by_evaluation():
    for order in (0, 3):
        with pytest.raises(ValueError, match=f"2 categories has order {order}"):
            mosaic.evaluate(lambda p, s: ["No."] * len(p), [], ["a", "b"], [order])


@pytest.mark.parametrize("prompt", [
    {"role": "user", "content": "Hi"}, [{"role": "user", "content": None}], ["Hi"],
    [{"role": "system", "content": "Be brief."}],
    [{"role": "user", "content": "Hi"}, {"content": "Hi"}], None, math.nan, 7,
])
def test_what_is_no_list_of_messages_is_refused_by_name(prompt):
    with pytest.raises(ValueError, match="is no message|'user'"):
        mosaic.as_messages(prompt)


def test_a_near_miss_is_neutral():
    with pytest.raises(ValueError, match="'Mocktails.', 'betting', near 'alcohol': "):
        Request("Mocktails?", "betting", near="alcohol")
    with pytest.raises(ValueError, match="'neutral', near nan: only neutral requests"):
        Request("Mocktails?", "neutral", near=math.nan)  # pandas' empty cell


def test_a_policy_is_never_passed_over_for_want_of_a_table(model, tokenizer):
    with pytest.raises(ValueError, match="a policy needs a table of control tokens"):
        mosaic.generate(model, tokenizer, None, ["Hi", "Hi"], [[], ["alcohol"]])


def test_a_table_meets_no_backbone_but_its_own(model, tokenizer, tokens, requests):
    other = tiny_model("llama", tokenizer, seed=1)
    with pytest.raises(ValueError, match="the table was made for"):
        tokens.add(other, tokenizer, ["tobacco"])
    with pytest.raises(ValueError, match="the table was made for"):
        mosaic.train(other, tokenizer, tokens, requests, QUICK)


def test_the_mark_of_the_place_is_nothing_that_a_user_can_type(tokenizer):
    said = f"{mosaic.MARK} Hi {mosaic.MARK}"
    turns = [{"role": "user", "content": said}, {"role": "assistant", "content": said},
             {"role": "user", "content": said}]
    for place in mosaic.PLACES:
        ids = mosaic.prompt_ids(tokenizer, turns, place)
        assert ids.count(SLOT) == 2  # one in each of the user's turns
        assert mosaic.prompt_ids(tokenizer, mosaic.MARK, place).count(SLOT) == 1
