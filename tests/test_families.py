"""Any small open model: every family of architectures and manner of chat template."""

from functools import cache, partial

import pytest
import torch
import transformers
from conftest import CATEGORIES, EMBEDDED, FAMILIES, SMALL, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

import mosaic
from mosaic import MARK, NEUTRAL, SLOT, ControlTokens, Request, TrainConfig

PROMPTS = [
    "What goes in a Negroni?", "My dog barks at the postman, what helps?", "Odds?"
]
POLICIES = [("alcohol",), (), ("alcohol", "betting", "sex")]
REQUESTS = [
    Request(prompt, category)
    for category in ("alcohol", "betting", NEUTRAL)
    for prompt in (f"a word on {category}", f"and more, much more on {category}")
]
BRIEF = TrainConfig(epochs=1, positives_per_subset=2, answer_tokens=6)

# --- Architectures --------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_mixed_batch_are_read_and_answered_as_each_alone(
    family, tied, tokenizer
):
    model = tiny_model(family, tokenizer, tie_word_embeddings=tied)
    head, embed = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embed.weight) == tied
    tokens = ControlTokens.for_model(model, tokenizer, CATEGORIES, 3)
    row = partial(mosaic.control_row, tokenizer, tokens)
    answers = [9, 8], [7], [6, 5, 4]
    rows = [*map(row, POLICIES, PROMPTS, answers)]
    with torch.no_grad():
        alone = [mosaic.answer_logits(model, [one])[0] for one in rows]
        found, labels = mosaic.answer_logits(model, rows)
        torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-4)
        assert labels.tolist() == [9, 8, 7, 6, 5, 4]
        plain = model(torch.tensor([[*rows[1].prompt, 7]])).logits[0, -2:-1]
    torch.testing.assert_close(alone[1], plain)  # no policy: the backbone's own
    answer = partial(mosaic.generate, model, tokenizer, tokens, max_new_tokens=8)
    each = [answer([prompt], [policy])[0] for prompt, policy in zip(PROMPTS, POLICIES)]
    assert answer(PROMPTS, POLICIES) == each and (tied or len(set(each)) > 1)
    assert mosaic.generate(model, tokenizer, None, PROMPTS, None, 8)[1] == each[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_moves_only_the_tokens_and_drops_nothing_out(family, tokenizer):
    model = tiny_model(family, tokenizer).train()  # as a careless caller hands it over
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tables = []
    for _ in range(2):
        tokens = ControlTokens.for_model(model, tokenizer, ["alcohol", "betting"], 3)
        start = [vector.detach().clone() for vector in tokens.vectors]
        mosaic.train(model, tokenizer, tokens, REQUESTS, BRIEF)
        assert not any(map(torch.equal, start, tokens.vectors))
        tables.append(list(tokens.vectors))
        torch.rand(7)  # dropout would now be drawn anew
    assert all(map(torch.equal, *tables)) and not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "opt", "bloom"])
def test_recomputing_layers_to_save_memory_changes_no_token(family, tokenizer):
    model = tiny_model(family, tokenizer)
    tables = []
    for recompute in (False, True):
        for layer in model.modules():
            if recompute and isinstance(layer, GradientCheckpointingLayer):
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        tokens = ControlTokens.for_model(model, tokenizer, ["alcohol", "betting"], 3)
        mosaic.train(model, tokenizer, tokens, REQUESTS, BRIEF)
        tables.append(list(tokens.vectors))
    assert all(map(torch.equal, *tables))


def test_a_model_that_embeds_elsewhere_is_refused_with_a_way_out(model, tokenizer):
    model.config.hidden_size_per_layer_input = 16  # Gemma 3n and 4
    with pytest.raises(ValueError, match="reads ids, not embeddings alone"):
        ControlTokens.for_model(model, tokenizer, CATEGORIES)
    model.config.hidden_size_per_layer_input = 0
    for family, why in (("falcon_h1", "reads ids, not embeddings alone"),
                        ("rwkv", "reads padding"), ("gpt_oss", "thinks aloud first")):
        model.config.model_type = family
        with pytest.raises(ValueError, match=why):
            ControlTokens.for_model(model, tokenizer, CATEGORIES)


@pytest.mark.parametrize(
    "kind", ["lora", "ia3", "prompt tuning", "wrapped", "offloaded"]
)
def test_a_model_with_an_adapter_or_not_whole_is_refused_everywhere(
    kind, model, tokenizer, tokens, tmp_path
):
    if kind == "offloaded":
        model.model.layers[1].to("meta")
    elif kind == "wrapped":  # by anything that names its weights as LoRA does
        model.model.layers[1].mlp.lora_A = torch.nn.Linear(2, 2)
    else:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
        if kind == "ia3":
            config = peft.IA3Config("CAUSAL_LM", target_modules=["q_proj"],
                                    feedforward_modules=[])
        elif kind == "prompt tuning":
            config = peft.PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2)
        model = peft.get_peft_model(model, config)
    said = r"carries an adapter: take model\.merge_and_unload\(\)"
    said = "split or offloaded: load the whole" if kind == "offloaded" else said
    with pytest.raises(ValueError, match=said):
        ControlTokens.for_model(model, tokenizer, CATEGORIES)
    with pytest.raises(ValueError, match=said):
        tokens.add(model, tokenizer, ["golf"])
    with pytest.raises(ValueError, match=said):
        mosaic.export_checkpoint(model, tokenizer, tokens, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_merged_adapter_is_a_backbone_like_any_other(model, tokenizer, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    merged = peft.get_peft_model(model, config).merge_and_unload()
    tokens = ControlTokens.for_model(merged, tokenizer, ["alcohol"], 3)
    mosaic.export_checkpoint(merged, tokenizer, tokens, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_gemma_3_with_a_vision_tower_is_refused_before_anything_is_trained(tokenizer):
    text = SMALL | {"vocab_size": len(tokenizer), "sliding_window": 8}
    vision = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    tokens = ControlTokens.for_model(model, tokenizer, ["alcohol", "betting"], 3)
    start = [vector.detach().clone() for vector in tokens.vectors]
    with pytest.raises(ValueError, match="Gemma3ForConditionalGeneration doesn't have"):
        mosaic.train(model, tokenizer, tokens, REQUESTS, BRIEF)
    assert all(map(torch.equal, start, tokens.vectors))


# --- Chat templates -------------------------------------------------------------------

TURN = "<|head|>{{ m.role }}<|sep|>{{ m.content }}<|eot|>"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}"
)
TEMPLATES = {  # template, how often has it BOS, the text around a user's words
    "llama 3": (
        "{{ bos_token }}{% for m in messages %}" + TURN + "{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|sep|>{% endif %}",
        1,
        "<|begin|><|head|>user<|sep|>{}<|eot|><|head|>assistant<|sep|>",
    ),
    "qwen 2.5": (
        "{% if messages[0].role != 'system' %}<|head|>system<|sep|>Be kind.<|eot|>"
        "{% endif %}{% for m in messages %}" + TURN + "{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|sep|>{% endif %}",
        0,
        "<|head|>system<|sep|>Be kind.<|eot|>"
        "<|head|>user<|sep|>{}<|eot|><|head|>assistant<|sep|>",
    ),
    "gemma": (
        NO_SYSTEM + "{{ bos_token }}{% for m in messages %}<|head|>"
        "{{ 'model' if m.role == 'assistant' else m.role }}<|sep|>{{ m.content }}"
        "<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|head|>model<|sep|>{% endif %}",
        1,
        "<|begin|><|head|>user<|sep|>{}<|eot|><|head|>model<|sep|>",
    ),
    "phi 3": (  # leaves system messages out, and ends a whole talk once more
        "{% for m in messages if m.role != 'system' %}" + TURN + "{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|sep|>"
        "{% else %}{{ eos_token }}{% endif %}\n",
        0,
        "<|head|>user<|sep|>{}<|eot|><|head|>assistant<|sep|>",
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ m.content + eos_token }}{% else %}[INST] {{ m.content }} [/INST]{% endif %}"
        "{% endfor %}{{ '' }}\n",  # a last newline, which jinja leaves out
        1,
        "<|begin|>[INST] {} [/INST]",
    ),
    "qwen 3": (  # thinks unless told not to, and leaves no thought in what was said
        "{% for m in messages %}" + TURN + "{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|sep|>"
        "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
        "{% endif %}",
        0,
        "<|head|>user<|sep|>{}<|eot|><|head|>assistant<|sep|><think>\n\n</think>\n\n",
    ),
    "smollm 2": (  # a role's header is BOS itself
        "{% for m in messages %}" + TURN.replace("<|head|>", "<|begin|>")
        + "{% endfor %}"
        "{% if add_generation_prompt %}<|begin|>assistant<|sep|>{% endif %}",
        2,
        "<|begin|>user<|sep|>{}<|eot|><|begin|>assistant<|sep|>",
    ),
    "gemma 3": (  # knows no system role, and trims
        NO_SYSTEM + "{{ bos_token }}{% for m in messages %}"
        + TURN.replace("m.content", "m.content | trim") + "{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|sep|>{% endif %}",
        1,
        "<|begin|><|head|>user<|sep|>{}<|eot|><|head|>assistant<|sep|>",
    ),
    "parts": (  # content as a list of parts
        "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|sep|>"
        "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
        "{% endif %}{% endfor %}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|sep|>{% endif %}",
        1,
        "<|begin|><|head|>user<|sep|>{}<|eot|><|head|>assistant<|sep|>",
    ),
    "spaces": (
        "\n{% for m in messages %}" + TURN + "{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|sep|>{% endif %}  ",
        0,
        "\n<|head|>user<|sep|>{}<|eot|><|head|>assistant<|sep|>  ",
    ),
    "blanks before a block": (  # which jinja leaves out at a line's start
        "  {% for m in messages %}" + TURN + "{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|sep|>{% endif %}",
        0,
        "<|head|>user<|sep|>{}<|eot|><|head|>assistant<|sep|>",
    ),
    "none": (None, 1, "<|begin|>user: {}\n\nassistant:"),
}


@cache
def tokenizer_like(manner):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    marks = ["<|head|>", "<|sep|>", "<|eot|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = TEMPLATES[manner][0]
    return tokenizer


def turns(*words, system=None):
    said = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant") * len(words)
    return said + [{"role": r, "content": w} for r, w in zip(roles, words)]


def filled(placed, own):
    """Ids with `own` wherever SLOT stood."""
    return [i for token in placed for i in (own if token == SLOT else [token])]


CHATS = {  # the last words, without blanks, are always "Odds?"
    "a string": "Odds?",
    "blanks around": turns(" \n Odds?  "),
    "several turns": turns("Odds?", "Which ones?", "Odds?"),
    "a system message": turns("Odds?", system="No odds? Be kind."),
    "the assistant last": turns("Odds?", "Which ones?"),
    "one letter, that the template writes, too": turns("a"),
}


@pytest.mark.parametrize("place", mosaic.PLACES)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("manner", TEMPLATES)
def test_control_tokens_stand_right_at_all_that_the_user_says(manner, chat, place):
    tokenizer, chat = tokenizer_like(manner), CHATS[chat]
    if "system" in str(chat) and manner in ("gemma", "gemma 3"):
        pytest.skip("these take none")
    bare = mosaic.prompt_ids(tokenizer, chat)
    placed = mosaic.prompt_ids(tokenizer, chat, place)
    if chat == "Odds?":
        assert tokenizer.decode(bare) == TEMPLATES[manner][2].format("Odds?")
        assert bare.count(tokenizer.bos_token_id) == TEMPLATES[manner][1]
    said = [m["content"] for m in mosaic.as_messages(chat) if m["role"] == "user"]
    at = [i for i, token in enumerate(placed) if token == SLOT]
    for i, words in zip(at, said, strict=True):
        side = placed[i:] if place == "before" else placed[:i]
        side = tokenizer.decode([token for token in side if token != SLOT])
        meets = side.startswith if place == "before" else side.endswith
        assert meets(words.strip())
    text = tokenizer.decode([token for token in placed if token != SLOT])
    trimmed = " \n Odds?" if place == "before" else "Odds?  "
    assert text == tokenizer.decode(bare).replace(trimmed, "Odds?")


def test_what_stands_before_the_tokens_is_the_same_ids_under_every_policy():
    tokenizer = tokenizer_like("qwen 2.5")
    model = tiny_model("llama", tokenizer)
    tokens = ControlTokens.for_model(model, tokenizer, CATEGORIES, 3)
    chat = turns("Odds of 7/2?", system="Be brief.")
    rows = [
        mosaic.control_row(tokenizer, tokens, policy, chat)
        for policy in ((), ("alcohol",), CATEGORIES)
    ]
    start = rows[1].prompt.index(SLOT)
    read = [
        mosaic.make_batch(model, [row], "left")[0]["inputs_embeds"][0] for row in rows
    ]
    for x in read:
        assert torch.equal(x[:start], read[0][:start])
    assert len(read[2]) == len(read[1]) + 12 == len(read[0]) + 15
    assert torch.equal(read[1][start : start + 3], tokens.compose(["alcohol"]))


@pytest.mark.parametrize("place", mosaic.PLACES)
def test_a_chat_under_one_policy_only_grows_so_that_an_engine_keeps_its_cache(place):
    tokenizer = tokenizer_like("qwen 2.5")
    chat = turns("Odds?", "Which?", "7/2?", "No.", "Why?", system="Be brief.")
    before = []
    for n in (2, 4, 6):
        ids = mosaic.prompt_ids(tokenizer, chat[:n], place)
        assert ids[: len(before)] == before and ids.count(SLOT) == n / 2
        before = ids


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}Hello.",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages * 2 %}{{ m.content }}{% endfor %}",
    ],
)
def test_a_template_that_drops_or_repeats_the_users_words_is_refused(template):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="drops or repeats words: .*Odds"):
        mosaic.prompt_ids(tokenizer, "Odds?", "after")


def test_a_template_that_always_opens_a_thought_is_refused():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    said = "{% for m in messages %}{{ m.content }} {% endfor %}"
    header = "{% if add_generation_prompt %}assistant <think>\n{% endif %}"
    tokenizer.chat_template = said + header
    for place in (None, *mosaic.PLACES):
        with pytest.raises(ValueError, match="has the model think aloud: take another"):
            mosaic.prompt_ids(tokenizer, "Odds?", place)


@pytest.mark.parametrize("manner", TEMPLATES)
def test_a_refusal_ends_as_the_template_ends_a_turn(manner):
    tokenizer = tokenizer_like(manner)
    model = tiny_model("llama", tokenizer)  # which names eos alone, as GGUF files do
    eot = tokenizer.convert_tokens_to_ids("<|eot|>")
    ids = mosaic.refusal_ids(model, tokenizer, "I can't.")
    assert tokenizer.decode(ids[:-1]).strip() == "I can't."
    expected = tokenizer.eos_token_id if manner in ("mistral", "none") else eot
    assert ids[-1] == expected
    assert {*mosaic.end_ids(model, tokenizer)} == {tokenizer.eos_token_id, expected}


def test_blanks_between_turns_end_no_answer():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizer.add_tokens(["\n\n"])  # as Gemma has them
    tokenizer.chat_template = None
    ends = mosaic.end_ids(tiny_model("llama", tokenizer), tokenizer)
    assert ends == [tokenizer.eos_token_id]


def test_an_export_ends_its_answers_where_the_template_ends_a_turn(tmp_path):
    tokenizer = tokenizer_like("gemma")
    model = tiny_model("llama", tokenizer)  # which names eos alone
    tokens = ControlTokens.for_model(model, tokenizer, ["alcohol"], 2)
    mosaic.export_checkpoint(model, tokenizer, tokens, str(tmp_path / "served"))
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "served")
    assert tokenizer.convert_tokens_to_ids("<|eot|>") in settings.eos_token_id


def test_a_refusal_is_the_ids_that_the_template_gives_it_in_a_chat():
    said = {}
    for manner in ("none", "qwen 2.5"):  # one writes a blank before an answer
        tokenizer = tokenizer_like(manner)
        model = tiny_model("llama", tokenizer)
        ids = mosaic.refusal_ids(model, tokenizer, "I can't.")
        asked = mosaic.prompt_ids(tokenizer, "?")
        chat = turns("?", "I can't.") + turns("?")
        whole = mosaic.prompt_ids(tokenizer, chat)
        assert whole[: len(asked + ids) - 1] == asked + ids[:-1]
        said[manner] = tokenizer.convert_ids_to_tokens(ids[0])
    assert said == {"none": "\u0120I", "qwen 2.5": "I"}


# --- Tokenizers -----------------------------------------------------------------------


def letters_tokenizer(kind):
    """Of single letters; words may begin otherwise behind a special token."""
    letters = ["<unk>", "<s>", "</s>", "\u2581", "\n"]
    letters = {c: i for i, c in enumerate(letters + [chr(c) for c in range(33, 127)])}
    if kind == "llama":
        made = transformers.LlamaTokenizer(vocab=letters, merges=[], legacy=False)
    else:
        marks = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
        inside = Tokenizer(models.BPE(letters, [], unk_token="<unk>"))
        scheme = dict(replacement="\u2581", prepend_scheme=kind)
        inside.pre_tokenizer = pre_tokenizers.Metaspace(**scheme)
        inside.decoder = decoders.Metaspace(**scheme)
        made = transformers.PreTrainedTokenizerFast(tokenizer_object=inside, **marks)
    opening = "" if kind == "llama" else "{{ bos_token }}"  # llama: words come first
    header = "''" if kind == "llama" else "'<|' + m.role + '|>\n'"
    made.chat_template = (
        opening + "{% for m in messages %}{{ " + header + " + m.content + eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    return made


@pytest.mark.parametrize("place", mosaic.PLACES)
@pytest.mark.parametrize("kind", ["llama", "first", "always", "never"])
def test_what_is_behind_the_tokens_is_split_in_training_as_in_an_export(
    kind, place, tmp_path
):
    tokenizer = letters_tokenizer(kind)
    if place == "after":  # here, too, text comes behind the tokens
        tokenizer.chat_template = tokenizer.chat_template.replace(
            "m.content + eos_token", "m.content + 'ok' + eos_token")
    model = tiny_model("llama", tokenizer)
    tokens = ControlTokens.for_model(model, tokenizer, ["alcohol"], 2, place=place)
    mosaic.export_checkpoint(model, tokenizer, tokens, tmp_path / "out")
    served = AutoTokenizer.from_pretrained(tmp_path / "out")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = [i for i in mosaic.prompt_ids(tokenizer, "Odds?", place) if i != SLOT]
    same = ids == mosaic.prompt_ids(tokenizer, "Odds?")
    alike = ["first", "never"] + ["llama"] * (place == "after")  # it begins with words
    assert same == (kind in alike)  # else not the bare ids with a hole
    for chat in (turns("Odds?"), turns("Hi", "Hi.", " 7/2?")):
        ids = served.apply_chat_template(
            chat, policy=["alcohol"], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        row = mosaic.control_row(tokenizer, tokens, ["alcohol"], chat, [9])
        own = served.convert_tokens_to_ids(["<|alcohol:0|>", "<|alcohol:1|>"])
        assert ids == filled(row.prompt, own)
        with torch.no_grad():
            found = exported(torch.tensor([ids])).logits[0, -1:, : len(tokenizer)]
            torch.testing.assert_close(found, mosaic.answer_logits(model, [row])[0])


def test_a_template_that_is_changed_is_read_anew():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    before = mosaic.prompt_ids(tokenizer, "Odds?")
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert mosaic.prompt_ids(tokenizer, "Odds?") == before[2:-2]


def test_a_tokenizer_that_is_changed_is_read_anew():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    assert len(mosaic.prompt_ids(tokenizer, "<|new|>")) > 5
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    new = tokenizer.convert_tokens_to_ids("<|new|>")
    assert mosaic.prompt_ids(tokenizer, "<|new|>", "before")[2:4] == [SLOT, new]


def test_a_refusal_behind_other_text_is_split_as_the_template_splits_it():
    tokenizer = letters_tokenizer("always")  # a blank before words that come first
    ids = mosaic.refusal_ids(tiny_model("llama", tokenizer), tokenizer, "No.")
    assert tokenizer.convert_ids_to_tokens(ids) == ["N", "o", ".", "</s>"]
    alone = tokenizer("No.", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(alone) == ["\u2581", "N", "o", "."]


def test_the_mark_that_finds_the_place_leaves_the_tokenizer_as_it_was(tokenizer):
    before = len(tokenizer)
    assert SLOT in mosaic.prompt_ids(tokenizer, "Odds?", "after")
    assert len(tokenizer) == before and MARK not in tokenizer.get_vocab()
