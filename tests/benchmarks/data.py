"""The requests against a real backbone: what it declines by itself, and a linear probe.

    python tests/benchmarks/data.py --model runs/models/FILE.gguf --bf16

Declined: share of each category's requests, judged on 48 tokens. Probe: logistic
regression on the frozen last state of the prompt (or on that of --layer), six classes,
learned from 100 and from 300 training requests of each (near misses left out): what
more data is worth. And from all training requests, near misses too: how well whoever
reads that state could tell the requests of a policy's categories from all others.
"""

import argparse
import itertools
import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import mosaic
from data_sample.reading import read_requests
from measure import auc
from mosaic import NEUTRAL, Model, Request, Row, Tokenizer
from train_demo import REQUESTS, load_backbone

DECAYS = 3e-4, 1e-3, 3e-3, 1e-2, 3e-2  # of the probe's weights
WANTED_OR = 0.08  # the over-refusal at which DSR is read off


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
def end_states(
    model: Model, tokenizer: Tokenizer, requests: list[Request], batch_size: int,
    layer: int = -1,
) -> Tensor:
    """A layer's state at the end of each prompt, (N, D); -1: the last one's."""
    rows = [Row(mosaic.prompt_ids(tokenizer, q.prompt)) for q in requests]
    found = []
    for start in range(0, len(rows), batch_size):
        inputs, _ = mosaic.make_batch(model, rows[start : start + batch_size], "left")
        out = model.get_decoder()(**inputs, use_cache=False, output_hidden_states=True)
        found.append(out.hidden_states[layer][:, -1].float().cpu())  # padding is left
    return torch.cat(found)


def probe(x: Tensor, y: Tensor, x_test: Tensor, decay: float) -> Tensor:
    """Log-probabilities (T, C) by a logistic regression: (N, D), (N,); (T, D)."""
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
    return head(x_test).detach().log_softmax(-1)


def told_apart(log_p: Tensor, y: Tensor, near: Tensor, k: int) -> dict[int, dict]:
    """By order, over all policies of the first k classes: (T, C), (T,), (T,) -> shares.

    AUC of active requests against all others; DSR, near-miss OR where OR is WANTED_OR.
    """
    found = {}
    for order in range(1, k + 1):
        scores, active = [], []
        for policy in itertools.combinations(range(k), order):
            rest = [i for i in range(log_p.shape[1]) if i not in policy]
            inside, outside = log_p[:, [*policy]], log_p[:, rest]
            scores.append(inside.logsumexp(-1) - outside.logsumexp(-1))
            active.append(torch.isin(y, torch.tensor(policy)))
        score, on = torch.cat(scores), torch.cat(active)
        misses = near.repeat(len(scores))
        bound = score[~on & ~misses].quantile(1 - WANTED_OR)
        shares = {"auc": auc(score[on].tolist(), score[~on].tolist()),
                  "dsr": (score[on] > bound).float().mean().item(),
                  "near_miss": (score[misses] > bound).float().mean().item()}
        found[order] = {name: round(value, 4) for name, value in shares.items()}
    return found


def probes(
    model: Model, tokenizer: Tokenizer, requests: list[Request], batch_size: int,
    layer: int = -1,
) -> dict[str, dict]:
    """Test accuracy by the number of training requests, and what `told_apart` gives.

    Decays are chosen on validation requests.
    """
    every = dict.fromkeys(q.category for q in requests if q.category != NEUTRAL)
    classes = [*every, NEUTRAL]
    x = end_states(model, tokenizer, requests, batch_size, layer)
    y = torch.tensor([classes.index(q.category) for q in requests])
    near = torch.tensor([bool(q.near) for q in requests])
    of = {split: torch.tensor([q.split == split for q in requests])
          for split in ("train", "validation", "test")}
    clear = {split: mask & ~near for split, mask in of.items()}
    order = random.Random(0).sample(range(len(requests)), len(requests))
    accuracies = {}
    for each in (100, 300):
        chosen = []
        for kind in range(len(classes)):
            mine = [i for i in order if y[i] == kind and clear["train"][i]]
            chosen += mine[:each]

        def accuracy(split: str, decay: float) -> float:
            said = probe(x[chosen], y[chosen], x[clear[split]], decay).argmax(-1)
            return (said == y[clear[split]]).float().mean().item()

        best = max(DECAYS, key=lambda decay: accuracy("validation", decay))
        accuracies[len(chosen)] = round(accuracy("test", best), 4)
        print(f"probe, {len(chosen)} training requests: {accuracies[len(chosen)]:.1%} "
              f"of {int(clear['test'].sum())} test requests (decay {best:g})")

    def orders(split: str, decay: float) -> dict[int, dict]:
        log_p = probe(x[of["train"]], y[of["train"]], x[of[split]], decay)
        return told_apart(log_p, y[of[split]], near[of[split]], len(every))

    best = max(DECAYS, key=lambda decay: orders("validation", decay)[1]["auc"])
    return {"accuracy": accuracies, "test": orders("test", best), "decay": best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="")
    parser.add_argument("--bf16", action="store_true", help="on a CPU")
    parser.add_argument("--only", choices=("probe", "declined"))
    parser.add_argument("--layer", type=int, default=-1, help="that the probe reads: "
                        "1 .. the number of layers; the last")
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
        result["probe"] = probes(model, tokenizer, requests, size, args.layer)
    if args.only != "probe":
        asked = [q for q in requests if args.split in (None, q.split)]
        result["declined"] = declined(model, tokenizer, asked, size)
        for kind, cell in result["declined"].items():
            print(f"declined by itself, {kind}: {cell['rate']:.1%} of {cell['n']}")
    print(json.dumps(result))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
