"""Tiny models from configs, the embedded backbone, and a handful of requests.

Tests marked `slow` run only with `python -m pytest --slow` or MOSAIC_SLOW=1.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data_sample" / "recipe")]

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mosaic import NEUTRAL, ControlTokens, Request

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

CATEGORIES = ["addiction", "alcohol", "betting", "horror", "sex"]
EMBEDDED = ROOT / "data_sample" / "tiny_chat"
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=256,
)
WINDOW = {"sliding_window": 8}  # shorter than any prompt
OLD = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
MARKS = ("bos", "eos", "pad")
FAMILIES = {
    "llama": SMALL,
    "mistral": SMALL | WINDOW,
    "qwen2": SMALL,
    "qwen3": SMALL,
    "gemma": SMALL,  # scales embeddings inside their module
    "gemma2": SMALL | WINDOW | {"attn_implementation": "eager"},  # soft-caps its logits
    "gemma3_text": SMALL | WINDOW,
    "phi": SMALL,
    "phi3": SMALL,
    "smollm3": SMALL,
    "granite": SMALL | {"embedding_multiplier": 3.0, "logits_scaling": 4.0},
    "cohere": SMALL,  # multiplies its logits by a scale
    "olmo2": SMALL,
    "gpt2": dict(n_embd=32, n_layer=2, n_head=2, n_positions=256),  # absolute positions
    "gpt_neox": OLD | {"intermediate_size": 48, "max_position_embeddings": 256},
    "opt": OLD | {"ffn_dim": 48, "word_embed_proj_dim": 32},  # dropout of 0.1
    "falcon": OLD | {"hidden_dropout": 0.1},
    "bloom": dict(hidden_size=32, n_layer=2, n_head=2, hidden_dropout=0.1),  # ALiBi
}


def tiny_model(family: str, tokenizer, seed: int = 0, **options):
    """A random-weight model of a family that fits the embedded tokenizer."""
    torch.manual_seed(seed)
    size = {"vocab_size": len(tokenizer)}
    ids = {f"{mark}_token_id": getattr(tokenizer, f"{mark}_token_id") for mark in MARKS}
    config = AutoConfig.for_model(family, **size | ids | FAMILIES[family] | options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # livelier than 0.02, so that wrong inputs show in the logits
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(5)
    return model


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: only with --slow or MOSAIC_SLOW=1")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow") and os.environ.get("MOSAIC_SLOW") != "1":
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: needs --slow"))


def read(name: str, folder: Path = ROOT / "data_sample") -> list[dict]:
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in lines.splitlines()]


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED)


@pytest.fixture
def model(tokenizer):
    return tiny_model("llama", tokenizer)


@pytest.fixture
def tokens(model, tokenizer):
    return ControlTokens.for_model(model, tokenizer, CATEGORIES, tokens_per_category=3)


@pytest.fixture(scope="session")
def backbone():
    return AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def requests():
    """Two dozen requests: four of each category, four neutral, one near miss each."""
    found = []
    for row in read("requests"):
        request = Request(row["request"], row["category"], row["split"], row["near"])
        same = [
            q for q in found if (q.category, q.near) == (request.category, request.near)
        ]
        if request.split == "train" and len(same) < (1 if request.near else 4):
            found.append(request)
    assert sum(q.category == NEUTRAL for q in found) == 9
    return found
