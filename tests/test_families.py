"""Any small open model: every family of architectures and manner of chat template."""

import random
import re

import pytest
import torch
import transformers
from conftest import CATEGORIES, EMBEDDED, FAMILIES, README, SMALL, tiny_model
from transformers import AutoTokenizer

import mosaic
import train_demo
from mosaic import NEUTRAL, ControlTokens, Request, Row, TrainConfig

PROMPTS = [
    "What goes in a Negroni?",
    "My dog barks at the postman, what helps?",
    "Odds?",
]
POLICIES = [("alcohol",), (), ("alcohol", "betting", "sex")]
REQUESTS = [
    Request(prompt, category)
    for category in ("alcohol", "betting", NEUTRAL)
    for prompt in (f"a word on {category}", f"and more, much more on {category}")
]

# --- Architectures --------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_of_a_mixed_batch_are_those_of_each_prompt_alone(
    family, tied, tokenizer
):
    model = tiny_model(family, tokenizer, tie_word_embeddings=tied)
    head, embed = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embed.weight) == tied
    tokens = ControlTokens.for_model(model, tokenizer, CATEGORIES, 3)
    alone = [
        mosaic.generate(model, tokenizer, tokens, [prompt], [policy], 8)[0]
        for prompt, policy in zip(PROMPTS, POLICIES)
    ]
    together = mosaic.generate(model, tokenizer, tokens, PROMPTS, POLICIES, 8)
    assert together == alone and (tied or len(set(alone)) > 1)
    bare = mosaic.generate(model, tokenizer, None, PROMPTS, None, 8)
    assert bare[1] == alone[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_moves_only_the_tokens_and_drops_nothing_out(family, tokenizer):
    model = tiny_model(family, tokenizer).train()  # as a careless caller hands it over
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tables = []
    for _ in range(2):
        tokens = ControlTokens.for_model(model, tokenizer, ["alcohol", "betting"], 3)
        start = [vector.detach().clone() for vector in tokens.vectors]
        config = TrainConfig(epochs=1, positives_per_subset=2, answer_tokens=6)
        mosaic.train(model, tokenizer, tokens, REQUESTS, config)
        assert not any(map(torch.equal, start, tokens.vectors))
        tables.append(list(tokens.vectors))
        torch.rand(7)  # dropout would now be drawn anew
    assert all(map(torch.equal, *tables)) and not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(weight.grad is None for weight in model.parameters())


RECOMPUTE = re.search(r"```python\n(from functools.*?)```", README, re.S)[1]


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "opt", "bloom"])
def test_recomputing_as_the_readme_does_changes_no_gradient(family, tokenizer):
    model = tiny_model(family, tokenizer).requires_grad_(False)
    tokens = ControlTokens.for_model(model, tokenizer, ["alcohol", "betting"], 3)
    tasks = [mosaic.Task(q, ("alcohol",)) for q in REQUESTS]
    found = []
    for recipe in ("", RECOMPUTE):
        exec(recipe, {"model": model})
        known = mosaic.reference_answers(model, tokenizer, REQUESTS, 6)
        kept = []  # of each tensor that waits for the backward pass, its size

        def keep(tensor, kept=kept):
            kept.append(tensor.numel() * (tensor.shape[-1:] != (len(tokenizer),)))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            rows = mosaic.task_rows(tokens, tasks, known, [5, 6], random.Random(0))
            losses = mosaic.task_losses(model, tokenizer, tasks, rows, known)
        tokens.zero_grad()
        sum(losses).backward()
        found.append((losses, [v.grad.clone() for v in tokens.vectors[:1]], sum(kept)))
    torch.testing.assert_close(found[0][:2], found[1][:2], rtol=0, atol=0)
    assert found[1][2] < 0.5 * found[0][2]


def test_a_model_that_embeds_elsewhere_is_refused_with_a_way_out(model, tokenizer):
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=99, d_model=8, num_layers=1, d_kv=4, d_ff=8)
    )
    with pytest.raises(ValueError, match="t5 is an encoder-decoder,"):
        ControlTokens.for_model(t5, tokenizer, CATEGORIES)
    model.config.hidden_size_per_layer_input = 16  # Gemma 3n and 4
    with pytest.raises(ValueError, match="llama .* embeds in every layer, or"):
        ControlTokens.for_model(model, tokenizer, CATEGORIES)
    model.config.hidden_size_per_layer_input = 0
    model.config.model_type = "rwkv"
    with pytest.raises(ValueError, match="rwkv .* reads padding: take another"):
        ControlTokens.for_model(model, tokenizer, CATEGORIES)


GEMMA_3 = re.search(r"```python\n(own = .*?)```", README, re.S)[1]


def test_gemma_3_with_a_vision_tower_needs_what_the_readme_says(tokenizer):
    text = SMALL | {"head_dim": 16, "vocab_size": len(tokenizer), "sliding_window": 8}
    vision = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    names = ["alcohol", "betting"]
    with pytest.raises(ValueError, match="Gemma3ForConditionalGeneration takes no emb"):
        ControlTokens.for_model(model, tokenizer, names)
    exec(GEMMA_3, {"model": model})
    tokens = ControlTokens.for_model(model, tokenizer, names, 3)
    config = TrainConfig(epochs=1, positives_per_subset=2, answer_tokens=6)
    mosaic.train(model, tokenizer, tokens, REQUESTS, config)
    policies = [("alcohol",), (), ("alcohol", "betting")]
    together = mosaic.generate(model, tokenizer, tokens, PROMPTS, policies, 8)
    for prompt, policy, answer in zip(PROMPTS, policies, together):
        one = mosaic.generate(model, tokenizer, tokens, [prompt], [policy], 8)
        assert one == [answer]


# --- Chat templates -------------------------------------------------------------------

TURN = "<|head|>{{ m.role }}<|sep|>{{ m.content }}<|eot|>"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}"
)
TEMPLATES = {  # template, has it a BOS, the text around a user's words
    "llama 3": (
        "{{ bos_token }}{% for m in messages %}" + TURN + "{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|sep|>{% endif %}",
        True,
        "<|begin|><|head|>user<|sep|>{}<|eot|><|head|>assistant<|sep|>",
    ),
    "qwen 2.5": (
        "{% if messages[0].role != 'system' %}<|head|>system<|sep|>Be kind.<|eot|>"
        "{% endif %}{% for m in messages %}" + TURN + "{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|sep|>{% endif %}",
        False,
        "<|head|>system<|sep|>Be kind.<|eot|>"
        "<|head|>user<|sep|>{}<|eot|><|head|>assistant<|sep|>",
    ),
    "gemma": (
        NO_SYSTEM + "{{ bos_token }}{% for m in messages %}<|head|>"
        "{{ 'model' if m.role == 'assistant' else m.role }}<|sep|>{{ m.content }}"
        "<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|head|>model<|sep|>{% endif %}",
        True,
        "<|begin|><|head|>user<|sep|>{}<|eot|><|head|>model<|sep|>",
    ),
    "phi 3": (  # leaves system messages out, and ends a whole talk once more
        "{% for m in messages if m.role != 'system' %}" + TURN + "{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|sep|>"
        "{% else %}{{ eos_token }}{% endif %}\n",
        False,
        "<|head|>user<|sep|>{}<|eot|><|head|>assistant<|sep|>",
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ m.content + eos_token }}{% else %}[INST] {{ m.content }} [/INST]{% endif %}"
        "{% endfor %}{{ '' }}\n",  # a last newline, which jinja leaves out
        True,
        "<|begin|>[INST] {} [/INST]",
    ),
    "qwen 3": (  # thinks unless told not to, and leaves no thought in what was said
        "{% for m in messages %}" + TURN + "{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|sep|>"
        "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
        "{% endif %}",
        False,
        "<|head|>user<|sep|>{}<|eot|><|head|>assistant<|sep|><think>\n\n</think>\n\n",
    ),
    "spaces": (
        "\n{% for m in messages %}" + TURN + "{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|sep|>{% endif %}  ",
        False,
        "\n<|head|>user<|sep|>{}<|eot|><|head|>assistant<|sep|>  ",
    ),
    "none": (None, True, "<|begin|>user: {}\n\nassistant:"),
}


def tokenizer_like(manner):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    marks = ["<|head|>", "<|sep|>", "<|eot|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = TEMPLATES[manner][0]
    return tokenizer


@pytest.mark.parametrize("manner", TEMPLATES)
def test_tokens_stand_after_the_only_bos_and_labels_on_the_answer(manner):
    tokenizer = tokenizer_like(manner)
    _, has_bos, around = TEMPLATES[manner]
    model = tiny_model("llama", tokenizer)
    prompt = mosaic.prompt_ids(tokenizer, "Odds?")
    assert tokenizer.decode(prompt) == around.format("Odds?")
    assert prompt.count(tokenizer.bos_token_id) == has_bos
    tokens = ControlTokens.for_model(model, tokenizer, CATEGORIES, 3)
    control = tokens.compose(["sex"])
    batch = mosaic.make_batch(model, tokenizer, [Row(prompt, control, [9, 8])])
    assert torch.equal(batch.inputs_embeds[0, has_bos : has_bos + 3], control)
    assert batch.labels[0].tolist() == [-100] * (len(prompt) + 3) + [9, 8]


@pytest.mark.parametrize("manner", TEMPLATES)
def test_a_refusal_ends_as_the_template_ends_a_turn(manner):
    tokenizer = tokenizer_like(manner)
    model = tiny_model("llama", tokenizer)
    eot = tokenizer.convert_tokens_to_ids("<|eot|>")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, eot]
    ids = mosaic.refusal_ids(model, tokenizer, "I can't.")
    assert tokenizer.decode(ids[:-1]) == "I can't."
    expected = tokenizer.eos_token_id if manner in ("mistral", "none") else eot
    assert ids[-1] == expected


@pytest.mark.parametrize("manner", TEMPLATES)
def test_a_written_rule_reaches_the_model_with_or_without_a_system_role(manner):
    tokenizer = tokenizer_like(manner)
    system = train_demo.takes_system(tokenizer)
    turns = train_demo.instruct("Odds?", ["betting"], system)
    text = tokenizer.decode(mosaic.prompt_ids(tokenizer, turns))
    assert text.count("Do not talk about betting.") == text.count("Odds?") == 1
    assert len(turns) == (1 if manner in ("gemma", "phi 3") else 2)
