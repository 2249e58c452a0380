"""Random policies, shapes, lengths and scripts against slow row-by-row references.

    python tests/benchmarks/fuzz.py --cases 2000

Each case draws a table, prompts in any script, policies and answers by its seed, and
compares compose, make_batch with answer_logits, generate and evaluate with the plainest
code that does the same. It stops at the first difference and names the seed.
"""

import argparse
import itertools
import random
import sys
from pathlib import Path
from zlib import crc32

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

import mosaic
from mosaic import NEUTRAL, REFUSAL, ControlTokens, Request
from train_demo import EMBEDDED

SCRIPTS = ("abc XYZ,.'", "äßñ ÉØ", "жук пЯ", "電子 日本", "عرب ي", "हिंदी")
SCRIPTS += ("🙂🎲 \n\t", "<|user|>:0")


def small_model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=2, initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def text(rng: random.Random, most: int = 30) -> str:
    """Up to `most` characters of one to three scripts."""
    letters = "".join(rng.sample(SCRIPTS, rng.randint(1, 3)))
    return "".join(rng.choice(letters) for _ in range(rng.randint(0, most)))


def prompt(rng: random.Random):
    if rng.random() < 0.6:
        return text(rng)
    roles = itertools.cycle(("user", "assistant"))
    turns = range(rng.choice((1, 3, 5)))
    return [{"role": role, "content": text(rng)} for _, role in zip(turns, roles)]


def embedded(model, tokenizer, table, chat, policy) -> torch.Tensor:
    """(length, D): what the model should read, by hand."""
    chat = [{"role": "user", "content": chat}] if isinstance(chat, str) else chat
    if policy:  # at all that the user says
        after = table.made_for["place"] == "after"
        chat = [turn if turn["role"] == "assistant" else {**turn, "content": (
                    turn["content"].rstrip() + "\0" if after else
                    "\0" + turn["content"].lstrip())} for turn in chat]
    shown = tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True)
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"]
           for part in shown.split("\0")]
    weight = model.get_input_embeddings().weight
    own = [v for name, v in zip(table.categories, table.vectors) if name in policy]
    parts = [weight[ids[0]]]
    for part in ids[1:]:
        parts += [*own, weight[part]]
    return torch.cat(parts)


def case(seed: int, model, tokenizer) -> int:
    """The number of prompts compared. AssertionError: something differs."""
    rng = random.Random(seed)
    names = {text(rng, 8).strip() or f"c{i}" for i in range(rng.randint(1, 5))}
    names = sorted(names - {NEUTRAL})
    table = ControlTokens.for_model(
        model, tokenizer, names, rng.randint(1, 4), seed=seed,
        place=rng.choice([*mosaic.PLACES]))
    prompts = [prompt(rng) for _ in range(rng.randint(1, 6))]
    policies = [rng.sample(names, rng.randint(0, len(names))) for _ in prompts]
    with torch.no_grad():
        read = [embedded(model, tokenizer, table, *p) for p in zip(prompts, policies)]
        same_logits(rng, model, tokenizer, table, prompts, policies, read)
        same_answers(rng, model, tokenizer, table, prompts, policies, read)
    same_shares(rng, names)
    return len(prompts)


def same_logits(rng, model, tokenizer, table, prompts, policies, read):
    answers = [[rng.randrange(len(tokenizer)) for _ in range(rng.randint(0, 5))]
               for _ in prompts]
    rows = [mosaic.control_row(tokenizer, table, *row)
            for row in zip(policies, prompts, answers)]
    expected = []
    for x, answer in zip(read, answers):
        if answer:
            x = torch.cat([x, model.get_input_embeddings().weight[answer]])
            logits = model(inputs_embeds=x[None]).logits[0]
            expected.append(logits[-len(answer) - 1 : -1])
    found, labels = mosaic.answer_logits(model, rows)
    assert labels.tolist() == [i for answer in answers for i in answer]
    if expected:
        torch.testing.assert_close(found, torch.cat(expected), rtol=1e-3, atol=1e-3)


def same_answers(rng, model, tokenizer, table, prompts, policies, read):
    most = rng.randint(1, 5)
    found = mosaic.generate(model, tokenizer, table, prompts, policies, most)
    for answer, x in zip(found, read):
        ids, gap = [], 1.0
        while len(ids) < most and tokenizer.eos_token_id not in ids:
            logits = model(inputs_embeds=x[None]).logits[0, -1]
            (first, second), (best, _) = (one.tolist() for one in logits.topk(2))
            gap = min(gap, first - second)
            ids.append(best)
            x = torch.cat([x, model.get_input_embeddings().weight[[best]]])
        slow = tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert answer == slow or gap < 1e-3, (answer, slow)  # but for a tie


def same_shares(rng, names):
    kinds = [rng.choice([*names, NEUTRAL]) for _ in range(rng.randint(1, 9))]
    requests = [Request(f"{i}", kind) for i, kind in enumerate(kinds)]
    requests += [Request(f"near {i}", NEUTRAL, near=names[0]) for i in range(2)]

    def say(prompt, policy):
        return (REFUSAL, "Well.")[crc32(f"{prompt}{tuple(policy)}".encode()) % 2]

    def respond(prompts, policies):
        return [*map(say, prompts, policies)]

    for row in mosaic.evaluate(respond, requests, names, range(1, len(names) + 1)):
        found = {"dsr": [], "over_refusal": [], "near_miss": []}
        for policy in itertools.combinations(names, row["order"]):
            for q in requests:
                kind = "near_miss" if q.near else "over_refusal"
                kind = "dsr" if q.category in policy else kind
                found[kind].append(say(q.prompt, policy) == REFUSAL)
        for kind, hits in found.items():
            assert row[kind]["n"] == len(hits)
            assert abs(row[kind]["rate"] * len(hits) - sum(hits)) < 1e-6


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    flags = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    model = small_model(tokenizer)
    for seed in tqdm(range(flags.first, flags.first + flags.cases), mininterval=5):
        try:
            case(seed, model, tokenizer)
        except Exception:
            print(f"\nseed {seed}", file=sys.stderr)
            raise
    print(f"{flags.cases} cases, no difference")


if __name__ == "__main__":
    main()
