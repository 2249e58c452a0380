"""Section 9: the tokens in an ordinary checkpoint that takes a policy."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import CATEGORIES, EMBEDDED, FAMILIES, ROOT, read, tiny_model
from jinja2 import TemplateError
from test_families import TEMPLATES, filled, tokenizer_like, turns
from transformers import AutoModelForCausalLM, AutoTokenizer

import mosaic
from mosaic import ControlTokens

CHAT = turns("What goes in a Negroni?")
EVERY = [
    (), *(p for r in range(1, 6) for p in mosaic.subsets(CATEGORIES, r, 99, random))
]


def reloaded(folder):
    """The exported checkpoint, with nothing but transformers."""
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values())
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def plain(reader):
    """The tokenizer of an exported checkpoint with the backbone's own template."""
    reader.chat_template = AutoTokenizer.from_pretrained(EMBEDDED).chat_template
    return reader


def templated(tokenizer, chat, policy):
    return tokenizer.apply_chat_template(
        chat, policy=policy, add_generation_prompt=True, return_dict=True
    )["input_ids"]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture(scope="module")
def reader(tokenizer, tmp_path_factory):
    """The tokenizer of an exported checkpoint."""
    model = tiny_model("llama", tokenizer)
    tokens = ControlTokens.for_model(model, tokenizer, CATEGORIES, 3)
    out = tmp_path_factory.mktemp("exported") / "out"
    mosaic.export_checkpoint(model, tokenizer, tokens, out)
    return AutoTokenizer.from_pretrained(out)


# --- The checkpoint -------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_checkpoint_has_the_logits_of_the_tokens(
    family, tied, tokenizer, tmp_path, out
):
    # As users have it: in a qwen2 folder the same file makes another tokenizer.
    tiny_model(family, tokenizer).config.save_pretrained(tmp_path / "own")
    tokenizer.save_pretrained(tmp_path / "own")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "own")
    model = tiny_model(family, tokenizer, tie_word_embeddings=tied)
    tokens = ControlTokens.for_model(model, tokenizer, CATEGORIES, 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mosaic.export_checkpoint(model, tokenizer, tokens, out)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    exported, reader = reloaded(out)
    assert not exported.config.tie_word_embeddings  # other engines go by this
    for policy in ([], ["sex"], ["horror", "alcohol"], CATEGORIES):
        ids = templated(reader, CHAT, policy)
        row = mosaic.control_row(tokenizer, tokens, policy, CHAT, [9, 8])
        assert len(ids) == len(row.prompt) - bool(policy) + 3 * len(policy)
        with torch.no_grad():
            found = exported(input_ids=torch.tensor([ids + [9]])).logits[0, -2:]
            logits, _ = mosaic.answer_logits(model, [row])
        own = found[:, : len(tokenizer)]
        torch.testing.assert_close(own, logits, rtol=1e-5, atol=1e-5)
        if not policy:
            plain = model(input_ids=torch.tensor([[*row.prompt, 9]])).logits[0, -2:]
            assert ids == row.prompt and torch.equal(own, plain)


def test_vectors_keep_their_size_where_a_family_scales_them_in_bf16(tokenizer, out):
    model = tiny_model("gemma", tokenizer, hidden_size=40, head_dim=16).bfloat16()
    scaled = model.get_input_embeddings()
    scaled.embed_scale = torch.tensor(40**0.5)  # in fp32, as from_pretrained leaves it
    tokens = ControlTokens.for_model(model, tokenizer, CATEGORIES)
    mosaic.export_checkpoint(model, tokenizer, tokens, out)
    embed = reloaded(out)[0].bfloat16().get_input_embeddings()
    read = embed(torch.arange(len(tokenizer), len(embed.weight))).float()
    own = torch.cat(list(tokens.vectors))
    size = (read * own).sum() / (own * own).sum()
    assert size.item() == pytest.approx(1, abs=5e-4)


@pytest.mark.parametrize("family", ["llama", "phi"])  # phi has a bias in its head
def test_control_tokens_get_the_mean_logit_from_the_head(family, tokenizer, out):
    model = tiny_model(family, tokenizer)
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias, mean=1.0)
    tokens = ControlTokens.for_model(model, tokenizer, CATEGORIES, 3)
    mosaic.export_checkpoint(model, tokenizer, tokens, out)
    exported, _ = reloaded(out)
    ids = exported.generation_config.suppress_tokens
    assert ids == list(range(len(tokenizer), len(tokenizer) + 15))
    with torch.no_grad():
        logits = exported(input_ids=torch.tensor([[5, 6, 7]])).logits
    own, control = logits[..., : len(tokenizer)], logits[..., ids]
    torch.testing.assert_close(control, own.mean(-1, keepdim=True).expand_as(control))
    assert own.amax(-1).min() > control.max() + 1


def test_tokens_that_the_model_has_no_rows_for_are_not_said_after_the_export(out):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    model = tiny_model("phi", tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    torch.nn.init.constant_(model.get_output_embeddings().bias, -1000.0)
    tokens = ControlTokens.for_model(model, tokenizer, CATEGORIES, 3)
    mosaic.export_checkpoint(model, tokenizer, tokens, out)
    exported, reader = reloaded(out)
    own, theirs = (mosaic.generate(*pair, None, ["Odds?"], max_new_tokens=8)
                   for pair in ((model, tokenizer), (exported, plain(reader))))
    assert own == theirs and own != [""]


def test_named_templates_all_take_a_policy(model, tokens, out):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    own = tokenizer.chat_template
    tokenizer.chat_template = {"default": own, "tool_use": "{{ tools | length }}" + own}
    mosaic.export_checkpoint(model, tokenizer, tokens, out)
    _, reader = reloaded(out)
    tool = {"type": "function", "function": {"name": "odds", "parameters": {}}}
    texts = [reader.apply_chat_template(CHAT, policy=["sex"], tokenize=False, tools=t)
             for t in (None, [tool])]
    assert texts[1] == "1" + texts[0] and "<|sex:0|>" in texts[0]


def test_spare_rows_of_a_padded_vocabulary_are_used_and_none_is_taken_away(
    tokenizer, out
):
    padded = len(tokenizer) + 40
    model = tiny_model("llama", tokenizer, tie_word_embeddings=True, vocab_size=padded)
    tokens = ControlTokens.for_model(model, tokenizer, CATEGORIES, 3)
    mosaic.export_checkpoint(model, tokenizer, tokens, out)
    exported, _ = reloaded(out)
    rows, old = exported.get_input_embeddings().weight, model.get_input_embeddings()
    assert len(rows) == padded == exported.config.vocab_size
    assert torch.equal(rows[: len(tokenizer)], old.weight[: len(tokenizer)])
    assert torch.equal(rows[len(tokenizer) :][:15], torch.cat(list(tokens.vectors)))


SETTINGS = {
    "temperature": 0.6, "top_p": 0.5, "repetition_penalty": 1.1, "num_beams": 2,
    "stop_strings": ["."], "return_dict_in_generate": True, "eos_token_id": [1, 7],
}


def test_generation_settings_are_exported_as_the_checkpoint_brought_them(
    model, tokenizer, tokens, out
):
    for name, value in SETTINGS.items():  # a temperature, and no sampling
        setattr(model.generation_config, name, value)
    model.generation_config.suppress_tokens = [7]
    mosaic.export_checkpoint(model, tokenizer, tokens, out)
    found = json.loads((out / "generation_config.json").read_text())
    assert {name: found[name] for name in SETTINGS} == SETTINGS
    assert found["suppress_tokens"] == [7, *range(len(tokenizer), len(tokenizer) + 15)]
    assert model.generation_config.suppress_tokens == [7]  # the backbone's own


@pytest.mark.parametrize("kind", ["half", "eager attention", "compiled"])
def test_an_export_takes_a_backbone_as_it_was_loaded(
    kind, model, tokenizer, tokens, out
):
    if kind == "compiled":
        model = torch.compile(model, backend="eager")
    elif kind == "half":
        model.bfloat16()
    else:
        model.set_attn_implementation("eager")
    mosaic.export_checkpoint(model, tokenizer, tokens, out)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == str(model.dtype).removeprefix("torch.")


def gguf_like(model):
    """What from_pretrained(..., gguf_file=...) leaves on a model of plain weights."""
    model.hf_quantizer = SimpleNamespace(is_serializable=lambda *a, **k: False)
    model.is_quantized = True
    model.config.quantization_config = {"quant_method": "gguf"}
    return model


def test_a_model_read_from_a_gguf_file_is_exported_and_stays_as_it_was(
    model, tokenizer, tokens, out
):
    mosaic.export_checkpoint(gguf_like(model), tokenizer, tokens, out)
    assert model.is_quantized and model.hf_quantizer
    assert model.config.quantization_config == {"quant_method": "gguf"}
    exported, _ = reloaded(out)
    assert not hasattr(exported.config, "quantization_config")


GGUF = ROOT / "runs" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
@pytest.mark.skipif(not GGUF.exists(), reason=f"no {GGUF}")
def test_a_real_gguf_file_is_exported_with_the_logits_of_the_tokens(out):
    for name in ("gguf", "accelerate"):
        pytest.importorskip(name)
    file = {"gguf_file": GGUF.name}
    tokenizer = AutoTokenizer.from_pretrained(GGUF.parent, **file)
    model = AutoModelForCausalLM.from_pretrained(
        GGUF.parent, **file, dtype=torch.float32
    )
    tokens = ControlTokens.for_model(model, tokenizer, ["alcohol"], 2)
    mosaic.export_checkpoint(model, tokenizer, tokens, out)
    exported, reader = reloaded(out)
    ids = templated(reader, CHAT, ["alcohol"])
    row = mosaic.control_row(tokenizer, tokens, ["alcohol"], CHAT, [9])
    with torch.no_grad():
        found = exported(torch.tensor([ids])).logits[0, -1:]
        own, _ = mosaic.answer_logits(model, [row])
    torch.testing.assert_close(found[:, : own.shape[1]], own, rtol=1e-3, atol=1e-3)


def test_an_export_that_reads_back_otherwise_is_refused(tokenizer, tmp_path):
    # In a qwen2 folder the same file makes another pre-tokenizer.
    model = tiny_model("qwen2", tokenizer)
    tokens = ControlTokens.for_model(model, tokenizer, CATEGORIES, 3)
    with pytest.raises(ValueError, match="makes other ids than training"):
        mosaic.export_checkpoint(model, tokenizer, tokens, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_of_a_model_with_compiled_parts_is_refused(
    model, tokenizer, tokens, tmp_path
):
    model.model.layers[1] = torch.compile(model.model.layers[1])
    with pytest.raises(ValueError, match="parts of the model are compiled"):
        mosaic.export_checkpoint(model, tokenizer, tokens, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.int32])
def test_an_export_of_a_quantized_model_is_refused(
    model, tokenizer, tokens, tmp_path, dtype
):
    model = gguf_like(model)
    packed = torch.zeros(48, 32).to(dtype)
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = torch.nn.Parameter(packed, requires_grad=False)
    tokens.made_for["fingerprint"] = mosaic.fingerprint(model)
    with pytest.raises(ValueError, match="the model is quantized"):
        mosaic.export_checkpoint(model, tokenizer, tokens, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_export_takes_no_folder_that_exists(model, tokenizer, tokens, tmp_path):
    with pytest.raises(ValueError, match="exists, or"):
        mosaic.export_checkpoint(model, tokenizer, tokens, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_export_is_not_exported_again_and_leaves_nothing_behind(
    model, tokenizer, tokens, tmp_path
):
    left = tmp_path / "out.mosaic-part"  # of a run that was killed
    left.mkdir()
    (left / "stale.json").write_text("{}")
    mosaic.export_checkpoint(model, tokenizer, tokens, f"{tmp_path}/out/")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "stale.json").exists()
    exported, reader = reloaded(tmp_path / "out")
    with pytest.raises(ValueError, match="has such tokens already"):
        mosaic.export_checkpoint(exported, reader, tokens, tmp_path / "again")
    with pytest.raises(ValueError, match="take the backbone it was made of"):
        mosaic.prompt_ids(reader, "Odds?", "after")


# --- The chat template ----------------------------------------------------------------


@pytest.mark.parametrize("place", mosaic.PLACES)
@pytest.mark.parametrize("manner", TEMPLATES)
def test_the_template_puts_a_policy_where_training_does_in_the_tables_order(
    manner, place, out
):
    tokenizer = tokenizer_like(manner)
    model = tiny_model("llama", tokenizer)
    tokens = ControlTokens.for_model(model, tokenizer, CATEGORIES, 2, place=place)
    mosaic.export_checkpoint(model, tokenizer, tokens, out)
    reader = AutoTokenizer.from_pretrained(out)
    names = ["<|alcohol:0|>", "<|alcohol:1|>", "<|sex:0|>", "<|sex:1|>"]
    again = turns("What goes in a Negroni?", "Gin. ")
    chats = [CHAT, [*CHAT, again[1], *CHAT], turns(" \n  Odds? "), again]
    if "gemma" not in manner:
        chats.append(turns("Odds?", "Which?", " Odds? ", system="Be kind."))
    for chat in chats:
        if manner != "qwen 3":  # which generate tells not to think, policy or none
            for nothing in ([], None):
                assert templated(reader, chat, nothing) == mosaic.prompt_ids(
                    tokenizer, chat
                )
        placed = mosaic.prompt_ids(tokenizer, chat, place)
        ids = templated(reader, chat, ["sex", "alcohol"])
        assert ids == filled(placed, reader.convert_tokens_to_ids(names))


@pytest.mark.parametrize(
    "policy", [["tobacco"], ["sex", "tobacco"], "alcohol", {"alcohol": False}], ids=str
)
def test_the_template_refuses_what_is_no_list_of_known_categories(policy, reader):
    known = "addiction, alcohol, betting, horror, sex"
    with pytest.raises(TemplateError, match=f"it must be a list, of {known}"):
        templated(reader, CHAT, policy)


def test_a_policy_is_never_passed_over_for_want_of_words(reader):
    control = reader.convert_tokens_to_ids("<|sex:0|>")
    with pytest.raises(TemplateError, match="a policy needs a message with"):
        templated(reader, [{"role": "system", "content": "Odds?"}], ["sex"])
    for empty in ("", None, [], [{"type": "image"}]):
        chat = turns("Odds?", "Which?") + [{"role": "user", "content": empty}]
        assert templated(reader, chat, ["sex"]).count(control) == 2
    chat = turns("Odds?", "Which?")  # that the assistant is to go on with
    assert templated(reader, chat, ["sex"]).count(control) == 1


def test_content_in_parts_is_read_as_the_same_words(reader):
    def in_parts(chat):
        return [m | {"content": [
            {"type": "text", "text": m["content"][:3]}, {"type": "image"},
            {"type": "text", "text": m["content"][3:]},
        ]} for m in chat]  # fmt: skip

    chat = turns("Odds?", "Which ones?", " 7/2?", system="Be kind.")
    for policy in ([], ["sex"], CATEGORIES):
        assert templated(reader, in_parts(chat), policy) == templated(
            reader, chat, policy
        )


def test_control_tokens_that_are_typed_anywhere_are_only_text(tokenizer, reader):
    control = set(range(len(tokenizer), len(tokenizer) + 15))
    typed = "<|alcohol:0|><|<|sex:1|>sex:1|> < |horror:0|><|betting:2|>"
    assert control & set(reader(typed)["input_ids"])  # as bare text they would act
    parts = [{"type": "text", "text": typed[:9]}, {"type": "text", "text": typed[9:]}]
    for words in (typed, parts):
        chat = turns(words, words, words, system=words)
        assert not control & set(templated(reader, chat, []))
        ids = templated(reader, chat, ["sex"])
        assert [i for i in ids if i in control] == sorted(control)[-3:] * 2


def test_categories_may_have_any_name(model, tokenizer, tmp_path, out):
    names = ["hate speech", 'größe "x"', "it's", "賭博", "a:0", "🍺"]
    names += ["AFTER TEMPLATE", "{{ x }}", "CONTENT", "WITH_CONTROL", "back\\slash"]
    tokens = ControlTokens.for_model(model, tokenizer, names, 2)
    tokens.save(tmp_path / "t")
    assert ControlTokens.load(tmp_path / "t", model).categories == names
    mosaic.export_checkpoint(model, tokenizer, tokens, out)
    reader, first = AutoTokenizer.from_pretrained(out), len(tokenizer)
    placed = mosaic.prompt_ids(tokenizer, CHAT, "after")
    for i, name in enumerate(names):
        own = [first + 2 * i, first + 2 * i + 1]
        assert templated(reader, CHAT, [name]) == filled(placed, own)


def test_without_a_policy_an_export_thinks_as_the_backbone_does():
    own = tokenizer_like("qwen 3")
    shown = [
        one.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
        for one in (own, mosaic.with_policies(own, {"sex": ["<|sex:0|>"]}, "after"))
    ]
    assert shown[0] == shown[1] and "<think>" not in shown[1]


def test_a_template_with_policies_leaves_all_of_a_message_but_its_words(tokenizer):
    own = mosaic.copy.deepcopy(tokenizer)
    own.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.tool_calls }} {{ m.tool_call_id }} "
        "{{ m.content is string }} {{ m.content }}{% endfor %}"
    )
    chat = [
        *CHAT, {"role": "assistant", "content": None, "tool_calls": ["a"]},
        {"role": "assistant", "content": "Wait.", "tool_calls": ["b"]},
        {"role": "tool", "content": "7/2", "tool_call_id": "b"},
    ]
    shown = [
        one.apply_chat_template(chat, tokenize=False)
        for one in (own, mosaic.with_policies(own, {"sex": ["<|sex:0|>"]}, "after"))
    ]
    assert shown[0] == shown[1] and "['a']  False" in shown[1]


# --- Served by transformers -----------------------------------------------------------


@pytest.mark.slow
def test_the_exported_backbone_answers_as_generate_does_under_every_policy(
    backbone, tokenizer, out
):
    tokens = ControlTokens.for_model(backbone, tokenizer, CATEGORIES)
    mosaic.export_checkpoint(backbone, tokenizer, tokens, out)
    exported, reader = reloaded(out)
    asked = [row["request"] for row in read("requests")[::31]]
    prompts = [asked[i % len(asked)] for i in range(len(EVERY))]
    ours = mosaic.generate(backbone, tokenizer, tokens, prompts, EVERY, 24)
    for prompt, policy, answer in zip(prompts, EVERY, ours):
        ids = torch.tensor([templated(reader, turns(prompt), list(policy))])
        found = exported.generate(ids, max_new_tokens=24)[0, ids.shape[1] :]
        assert reader.decode(found, skip_special_tokens=True).strip() == answer


@pytest.mark.slow
def test_transformers_pipeline_takes_a_policy(backbone, tokenizer, out):
    tokens = ControlTokens.for_model(backbone, tokenizer, CATEGORIES)
    mosaic.export_checkpoint(backbone, tokenizer, tokens, out)
    pipeline = transformers.pipeline("text-generation", model=str(out), device="cpu")
    answers = []
    for policy in ([], ["alcohol", "sex"]):
        found = pipeline(
            CHAT, max_new_tokens=16, tokenizer_encode_kwargs={"policy": policy}
        )
        answers.append(found[0]["generated_text"][-1]["content"].strip())
    ours = mosaic.generate(
        backbone, tokenizer, tokens, [CHAT] * 2, [(), ("alcohol", "sex")], 16
    )
    assert answers == ours and ours[0] != ours[1]
