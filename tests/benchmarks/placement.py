"""What PEFT's place costs: control tokens before BOS instead of after it.

    python tests/benchmarks/placement.py

Two tables of the embedded backbone, one trained at either place (seed 0, as the demo),
and the first of them used at the other place: DSR / OR on the validation split, with
95% Wilson intervals.
"""

import sys
from pathlib import Path

import transformers

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

import mosaic
from mosaic import NEUTRAL, PLACES, ControlTokens
from train_demo import EMBEDDED, JUDGED_TOKENS, load_backbone, read_requests

ORDERS = 1, 3, 5


def rows(model, tokenizer, requests, config=mosaic.TrainConfig(), orders=ORDERS):
    """(trained, used, shares by order) of the three ways."""
    names = dict.fromkeys(q.category for q in requests)
    categories = [name for name in names if name != NEUTRAL]
    asked = [q for q in requests if q.split == "validation"]
    for trained in PLACES:
        tokens = ControlTokens.for_model(
            model, tokenizer, categories, placement=trained
        )
        mosaic.train(model, tokenizer, tokens, requests, config)
        for used in PLACES[PLACES.index(trained) :]:
            tokens.about["placement"] = used
            respond = lambda prompts, policies: mosaic.generate(
                model, tokenizer, tokens, prompts, policies, JUDGED_TOKENS
            )
            yield trained, used, mosaic.evaluate(respond, asked, categories, orders)


def shown(share):
    low, high = 100 * share["low"], 100 * share["high"]
    return f"{100 * share['rate']:.1f} [{low:.1f}, {high:.1f}]"


def main():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, tokenizer, _ = load_backbone(str(EMBEDDED), "cpu")
    requests = read_requests(str(ROOT / "data_sample" / "requests.jsonl"))
    print("| trained | used |" + "".join(f" order {r} |" for r in ORDERS))
    print("|---|---|" + "---|" * len(ORDERS))
    for trained, used, table in rows(model, tokenizer, requests):
        pairs = [f"{shown(row['dsr'])} / {shown(row['over_refusal'])}" for row in table]
        print(f"| {trained} | {used} | {' | '.join(pairs)} |", flush=True)


if __name__ == "__main__":
    main()
