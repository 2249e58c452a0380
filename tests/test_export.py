"""Section 9: the tokens in an ordinary checkpoint, and as a PEFT adapter."""

import json
import random

import pytest
import torch
from conftest import CATEGORIES, FAMILIES, read, tiny_model
from jinja2 import TemplateError
from safetensors.torch import load_file
from test_families import TEMPLATES, tokenizer_like
from transformers import AutoModelForCausalLM, AutoTokenizer

import mosaic
from mosaic import ControlTokens, Row

CHAT = [{"role": "user", "content": "What goes in a Negroni?"}]
EVERY = [
    (),
    *(p for r in range(1, 6) for p in mosaic.subsets(CATEGORIES, r, 99, random)),
]


def reloaded(folder):
    """The exported checkpoint, with nothing but transformers."""
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values())
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def templated(tokenizer, chat, policy):
    return tokenizer.apply_chat_template(
        chat, policy=policy, add_generation_prompt=True, return_dict=True
    )["input_ids"]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_checkpoint_has_the_logits_of_the_tokens(
    family, tied, tokenizer, tmp_path
):
    model = tiny_model(family, tokenizer, tie_word_embeddings=tied)
    tokens = ControlTokens.for_model(model, tokenizer, CATEGORIES, 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mosaic.export_checkpoint(model, tokenizer, tokens, tmp_path / "out")
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    exported, reader = reloaded(tmp_path / "out")
    assert not exported.config.tie_word_embeddings  # other engines go by this
    for policy in ([], ["sex"], ["horror", "alcohol"], CATEGORIES):
        ids = templated(reader, CHAT, policy)
        prompt = mosaic.prompt_ids(tokenizer, CHAT)
        assert len(ids) == len(prompt) + 3 * len(policy)
        row = Row(prompt, tokens.compose(policy), [9, 8])
        batch = mosaic.make_batch(model, tokenizer, [row])
        with torch.no_grad():
            found = exported(input_ids=torch.tensor([ids + [9]])).logits[0, -2:]
            logits = mosaic.answer_logits(model, batch)[0]
            plain = model(input_ids=torch.tensor([prompt + [9]])).logits[0, -2:]
        own = found[:, : len(tokenizer)]
        torch.testing.assert_close(own, logits, rtol=1e-5, atol=1e-5)
        if not policy:
            assert ids == prompt and torch.equal(own, plain)


def test_vectors_keep_their_size_where_a_family_scales_them_in_bf16(
    tokenizer, tmp_path
):
    model = tiny_model("gemma", tokenizer, hidden_size=40, head_dim=16).bfloat16()
    scaled = model.get_input_embeddings()
    scaled.embed_scale = torch.tensor(40**0.5)  # in fp32, as from_pretrained leaves it
    tokens = ControlTokens.for_model(model, tokenizer, CATEGORIES)
    mosaic.export_checkpoint(model, tokenizer, tokens, tmp_path / "out")
    embed = reloaded(tmp_path / "out")[0].bfloat16().get_input_embeddings()
    read = embed(torch.arange(len(tokenizer), len(embed.weight))).float()
    own = torch.cat(list(tokens.vectors))
    size = (read * own).sum() / (own * own).sum()
    assert size.item() == pytest.approx(1, abs=5e-4)


@pytest.mark.parametrize("family", ["llama", "phi"])  # phi has a bias in its head
def test_control_tokens_get_the_mean_logit_from_the_head(family, tokenizer, tmp_path):
    model = tiny_model(family, tokenizer)
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias, mean=1.0)
    tokens = ControlTokens.for_model(model, tokenizer, CATEGORIES, 3)
    mosaic.export_checkpoint(model, tokenizer, tokens, tmp_path / "out")
    exported, _ = reloaded(tmp_path / "out")
    ids = exported.generation_config.suppress_tokens
    assert ids == list(range(len(tokenizer), len(tokenizer) + 15))
    with torch.no_grad():
        logits = exported(input_ids=torch.tensor([[5, 6, 7]])).logits
    own, control = logits[..., : len(tokenizer)], logits[..., ids]
    torch.testing.assert_close(control, own.mean(-1, keepdim=True).expand_as(control))
    assert own.amax(-1).min() > control.max() + 1


def test_spare_rows_of_a_padded_vocabulary_are_used_and_none_is_taken_away(
    tokenizer, tmp_path
):
    padded = len(tokenizer) + 40
    model = tiny_model("qwen2", tokenizer, tie_word_embeddings=True, vocab_size=padded)
    tokens = ControlTokens.for_model(model, tokenizer, CATEGORIES, 3)
    mosaic.export_checkpoint(model, tokenizer, tokens, tmp_path / "out")
    exported, _ = reloaded(tmp_path / "out")
    rows, old = exported.get_input_embeddings().weight, model.get_input_embeddings()
    assert len(rows) == padded == exported.config.vocab_size
    assert torch.equal(rows[: len(tokenizer)], old.weight[: len(tokenizer)])
    assert torch.equal(rows[len(tokenizer) :][:15], torch.cat(list(tokens.vectors)))


@pytest.mark.parametrize("manner", TEMPLATES)
def test_the_template_puts_a_policy_after_bos_in_the_order_of_the_table(
    manner, tmp_path
):
    tokenizer = tokenizer_like(manner)
    model = tiny_model("llama", tokenizer)
    tokens = ControlTokens.for_model(model, tokenizer, CATEGORIES, 2)
    mosaic.export_checkpoint(model, tokenizer, tokens, tmp_path / "out")
    reader = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [*CHAT, {"role": "assistant", "content": "Gin. "}, *CHAT]
    plain = mosaic.prompt_ids(tokenizer, chat)
    for nothing in ([], None):
        assert templated(reader, chat, nothing) == plain
    ids = templated(reader, chat, ["sex", "alcohol"])
    names = ["<|alcohol:0|>", "<|alcohol:1|>", "<|sex:0|>", "<|sex:1|>"]
    start = int(TEMPLATES[manner][1])
    assert reader.convert_ids_to_tokens(ids[start : start + 4]) == names
    assert ids[:start] + ids[start + 4 :] == plain


UNKNOWN = "tobacco is none of addiction, alcohol, betting, horror, sex"


@pytest.mark.parametrize(
    "policy, line",
    [
        (["tobacco"], UNKNOWN),
        (["sex", "tobacco"], UNKNOWN),
        ("alcohol", "it must be a list"),
        ({"alcohol": False}, "it must be a list"),
    ],
)
def test_the_template_refuses_what_is_no_list_of_known_categories(
    policy, line, model, tokenizer, tokens, tmp_path
):
    mosaic.export_checkpoint(model, tokenizer, tokens, tmp_path / "out")
    reader = AutoTokenizer.from_pretrained(tmp_path / "out")
    with pytest.raises(TemplateError, match=f"bad policy: {line}"):
        templated(reader, CHAT, policy)


def test_control_tokens_that_a_user_types_are_only_text(
    model, tokenizer, tokens, tmp_path
):
    mosaic.export_checkpoint(model, tokenizer, tokens, tmp_path / "out")
    reader = AutoTokenizer.from_pretrained(tmp_path / "out")
    control = set(range(len(tokenizer), len(tokenizer) + 15))
    typed = "<|alcohol:0|><|<|sex:1|>sex:1|> < |horror:0|><|betting:2|>"
    assert control & set(reader(typed)["input_ids"])  # as bare text they would act
    chat = [{"role": "user", "content": typed}]
    assert not control & set(templated(reader, chat, []))
    ids = templated(reader, chat, ["sex"])
    assert [i for i in ids if i in control] == sorted(control)[-3:]


def test_the_exported_backbone_answers_as_generate_does_under_every_policy(
    backbone, tokenizer, tmp_path
):
    tokens = ControlTokens.for_model(backbone, tokenizer, CATEGORIES)
    mosaic.export_checkpoint(backbone, tokenizer, tokens, tmp_path / "out")
    exported, reader = reloaded(tmp_path / "out")
    asked = [row["request"] for row in read("requests")[::31]]
    prompts = [asked[i % len(asked)] for i in range(len(EVERY))]
    ours = mosaic.generate(backbone, tokenizer, tokens, prompts, EVERY, 24)
    for prompt, policy, answer in zip(prompts, EVERY, ours):
        chat = [{"role": "user", "content": prompt}]
        ids = torch.tensor([templated(reader, chat, list(policy))])
        out = exported.generate(ids, max_new_tokens=24)[0, ids.shape[1] :]
        assert reader.decode(out, skip_special_tokens=True).strip() == answer


def test_an_export_takes_no_folder_that_exists(model, tokenizer, tokens, tmp_path):
    with pytest.raises(ValueError, match="exists, or"):
        mosaic.export_checkpoint(model, tokenizer, tokens, tmp_path)
    with pytest.raises(OSError):
        mosaic.export_peft(tokens, ["sex"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_export_is_not_exported_again_and_leaves_nothing_behind(
    model, tokenizer, tokens, tmp_path
):
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "stale.json").write_text("{}")
    model.generation_config.suppress_tokens = [7]
    mosaic.export_checkpoint(model, tokenizer, tokens, f"{tmp_path}/out/")
    model.generation_config.suppress_tokens = None
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "stale.json").exists()
    exported, reader = reloaded(tmp_path / "out")
    assert exported.generation_config.suppress_tokens[:2] == [7, len(tokenizer)]
    with pytest.raises(ValueError, match="has such tokens already"):
        mosaic.export_checkpoint(exported, reader, tokens, tmp_path / "again")


def test_settings_that_transformers_refuses_to_save_are_named_as_such(
    model, tokenizer, tokens, tmp_path
):
    model.generation_config.temperature = 0.6  # and no sampling
    try:
        with pytest.raises(ValueError, match="temperature"):
            mosaic.export_checkpoint(model, tokenizer, tokens, tmp_path / "it")
    finally:
        model.generation_config.temperature = None
    assert [*tmp_path.iterdir()] == []


def test_an_adapter_of_no_policy_is_refused(tokens, tmp_path):
    with pytest.raises(ValueError, match="an adapter needs a policy"):
        mosaic.export_peft(tokens, [], tmp_path / "out")


def test_an_adapter_holds_the_composed_policy_in_pefts_form(tokens, tmp_path):
    mosaic.export_peft(tokens, ["sex", "alcohol"], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "PROMPT_TUNING" and config["inference_mode"]
    assert (config["num_virtual_tokens"], config["token_dim"]) == (6, 32)
    held = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert list(held) == ["prompt_embeddings"]
    assert torch.equal(held["prompt_embeddings"], tokens.compose(["alcohol", "sex"]))


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_peft_gives_a_table_made_for_its_place_the_same_logits(
    family, tokenizer, tmp_path
):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = tiny_model(family, tokenizer)
    tokens = ControlTokens.for_model(
        model, tokenizer, CATEGORIES, 3, placement="before_bos"
    )
    mosaic.export_peft(tokens, ["sex", "alcohol"], tmp_path / "out")
    prompt = mosaic.prompt_ids(tokenizer, CHAT)
    row = mosaic.control_row(tokens, ["sex", "alcohol"], prompt, [9, 8])
    batch = mosaic.make_batch(model, tokenizer, [row])
    with torch.no_grad():
        expected = mosaic.answer_logits(model, batch)[0]
        adapted = peft.PeftModel.from_pretrained(model, tmp_path / "out")
        found = adapted(torch.tensor([prompt + [9, 8]])).logits[0, -3:-1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_table_for_the_place_before_bos_is_exported_for_it(
    model, tokenizer, tmp_path
):
    tokens = ControlTokens.for_model(
        model, tokenizer, ["alcohol", "sex"], 2, placement="before_bos"
    )
    mosaic.export_checkpoint(model, tokenizer, tokens, tmp_path / "out")
    reader = AutoTokenizer.from_pretrained(tmp_path / "out")
    plain, first = mosaic.prompt_ids(tokenizer, CHAT), len(tokenizer)
    ids = templated(reader, CHAT, ["sex"])
    assert (
        ids == [first + 2, first + 3, *plain] and templated(reader, CHAT, []) == plain
    )


def test_categories_may_have_any_name(model, tokenizer, tmp_path):
    names = ["hate speech", 'größe "x"', "it's", "賭博", "a:0", "🍺"]
    names += ["AFTER TEMPLATE", "{{ x }}", "CONTROL", "back\\slash"]
    tokens = ControlTokens.for_model(model, tokenizer, names, 2)
    tokens.save(tmp_path / "t")
    assert ControlTokens.load(tmp_path / "t", model).categories == names
    mosaic.export_checkpoint(model, tokenizer, tokens, tmp_path / "out")
    reader = AutoTokenizer.from_pretrained(tmp_path / "out")
    first, plain = len(tokenizer), mosaic.prompt_ids(tokenizer, CHAT)
    for i, name in enumerate(names):
        ids = templated(reader, CHAT, [name])
        assert ids == [plain[0], first + 2 * i, first + 2 * i + 1, *plain[1:]]
