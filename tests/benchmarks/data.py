"""The requests against a real backbone: what it declines by itself, and a linear probe.

    python tests/benchmarks/data.py --model runs/models/FILE.gguf --bf16

Declined: share of each category's requests, judged on 48 tokens. Probe: logistic
regression on the frozen last state of the prompt, six classes, learned from 100 and
from 300 training requests of each (near misses left out): what more data is worth.
"""

import argparse
import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import mosaic
from data_sample.reading import read_requests
from mosaic import Model, Request, Row, Tokenizer
from train_demo import REQUESTS, load_backbone

DECAYS = 3e-4, 1e-3, 3e-3, 1e-2, 3e-2  # of the probe's weights


def declined(
    model: Model, tokenizer: Tokenizer, requests: list[Request], batch_size: int
) -> dict[str, dict]:
    """By category, and for near misses, the share that the backbone declines itself."""
    found = mosaic.reference_answers(model, tokenizer, requests, 48, batch_size)
    groups: dict[str, list[bool]] = {}
    for q in found:
        kind = "near misses" if q.near else q.category
        groups.setdefault(kind, []).append(mosaic.is_refusal(q.text))
    groups["all"] = [no for group in groups.values() for no in group]
    return {kind: mosaic.share(group) for kind, group in groups.items()}


@torch.no_grad()
def last_states(
    model: Model, tokenizer: Tokenizer, requests: list[Request], batch_size: int
) -> Tensor:
    """The last layer's state at the end of each prompt, (N, D)."""
    rows = [Row(mosaic.prompt_ids(tokenizer, q.prompt)) for q in requests]
    found = []
    for start in range(0, len(rows), batch_size):
        inputs, _ = mosaic.make_batch(model, rows[start : start + batch_size], "left")
        out = model.get_decoder()(**inputs, use_cache=False)
        found.append(out.last_hidden_state[:, -1].float().cpu())  # padded on the left
    return torch.cat(found)


def probe(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, decay: float) -> float:
    """Test accuracy of a logistic regression, (N, D), (N,) and the same to test."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    torch.manual_seed(0)
    head = nn.Linear(x.shape[1], int(y.max()) + 1)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(head(x), y) + decay * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (head(x_test).argmax(-1) == y_test).float().mean().item()


def probes(
    model: Model, tokenizer: Tokenizer, requests: list[Request], batch_size: int
) -> dict[int, float]:
    """Test accuracy by the number of training requests; the decay from validation."""
    clear = [q for q in requests if not q.near]
    classes = [*dict.fromkeys(q.category for q in clear)]
    x = last_states(model, tokenizer, clear, batch_size)
    y = torch.tensor([classes.index(q.category) for q in clear])
    of = {split: torch.tensor([q.split == split for q in clear])
          for split in ("train", "validation", "test")}
    order = random.Random(0).sample(range(len(clear)), len(clear))
    found = {}
    for each in (100, 300):
        chosen = []
        for kind in range(len(classes)):
            mine = [i for i in order if y[i] == kind and of["train"][i]]
            chosen += mine[:each]

        def accuracy(split: str, decay: float) -> float:
            return probe(x[chosen], y[chosen], x[of[split]], y[of[split]], decay)

        best = max(DECAYS, key=lambda decay: accuracy("validation", decay))
        found[len(chosen)] = round(accuracy("test", best), 4)
        print(f"probe, {len(chosen)} training requests: {found[len(chosen)]:.1%} of "
              f"{int(of['test'].sum())} test requests (decay {best:g})", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="")
    parser.add_argument("--bf16", action="store_true", help="on a CPU")
    parser.add_argument("--only", choices=("probe", "declined"))
    parser.add_argument("--split", help="of what is asked; all three")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 256 if device == "cuda" else 32
    model, tokenizer, name = load_backbone(args.model, device)
    model = model.to(torch.bfloat16) if args.bf16 else model
    model.eval().requires_grad_(False)
    requests = read_requests(str(REQUESTS))
    result = {"model": name}
    if args.only != "declined":
        result["probe"] = probes(model, tokenizer, requests, size)
    if args.only != "probe":
        asked = [q for q in requests if args.split in (None, q.split)]
        result["declined"] = declined(model, tokenizer, asked, size)
        for kind, cell in result["declined"].items():
            print(f"declined by itself, {kind}: {cell['rate']:.1%} of {cell['n']}")
    print(json.dumps(result))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
