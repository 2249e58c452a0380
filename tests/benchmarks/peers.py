"""The paper's peers of MOSAIC: SFT and ORPO with LoRA, steered by a written policy.

One adapter serves every policy: the policy is written out as a rule in front of the
request, and the adapter is trained on the same tasks and reference answers as control
tokens are, for as many epochs as paper.py says. (Differs from the paper, which does not
say how its adapters learn what is switched off: one adapter for all policies fits the
one size that it gives.) The other way to compose, an adapter for each category and
their updates added, takes the same functions; see paper.py.

LoRA is written out below, 40 lines, rather than taken from peft: the benchmarks then
run with this repository's five packages, and adding, merging and taking back updates
exactly is all that is needed.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

import mosaic
from mosaic import Model, OrderSampler, Request, Row, Tokenizer, TrainConfig
from train_demo import instruct, takes_system

# --- LoRA -----------------------------------------------------------------------------


class Lora(nn.Module):
    """A frozen linear map plus a trained update of low rank: W x + scale * B A x."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, draw: torch.Generator):
        super().__init__()
        out, size = base.weight.shape
        self.base, self.scale = base, alpha / rank
        start = torch.randn(rank, size, generator=draw) / math.sqrt(size)
        self.a = nn.Parameter(start.to(base.weight.device))  # (rank, in)
        self.b = nn.Parameter(self.a.new_zeros(out, rank))  # zero: it starts as W x

    def forward(self, x: Tensor) -> Tensor:
        update = (x.to(self.a) @ self.a.T) @ self.b.T  # (.., in) -> (.., out), fp32
        return self.base(x) + (self.scale * update).to(x)

    def delta(self) -> Tensor:
        """The update as a dense matrix, (out, in)."""
        return self.scale * self.b @ self.a


def add_lora(
    module: nn.Module, rank: int = 8, alpha: float = 16, seed: int = 0
) -> dict[str, Lora]:
    """Put a Lora around every linear map below `module`, but for the output head."""
    draw, added = torch.Generator().manual_seed(seed), {}
    for name, child in [*module.named_modules()]:
        if isinstance(child, nn.Linear) and not name.endswith("lm_head"):
            added[name] = Lora(child, rank, alpha, draw)
            module.set_submodule(name, added[name])
    return added


def count(module: nn.Module, rank: int = 8) -> int:
    """How many numbers an adapter on every linear map below `module` trains."""
    maps = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    sizes = [m.weight.shape for n, m in maps.items() if not n.endswith("lm_head")]
    return sum(rank * (out + size) for out, size in sizes)


def remove_lora(module: nn.Module) -> None:
    """Put the frozen linear maps back."""
    for name, child in [*module.named_modules()]:
        if isinstance(child, Lora):
            module.set_submodule(name, child.base)


@contextlib.contextmanager
def merged(module: nn.Module, updates: dict[str, Tensor]) -> Iterator[None]:
    """Add updates, (out, in) by name, to the weights; afterwards the very old bits."""
    weights = {name: module.get_submodule(name).weight for name in updates}
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        for name, weight in weights.items():
            weight += updates[name].to(weight)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(kept[name])


# --- Losses ---------------------------------------------------------------------------


def row_log_probs(model: Model, tokenizer: Tokenizer, rows: list[Row]) -> Tensor:
    """Mean log-probability of each row's answer, per token: (B,)."""
    batch = mosaic.make_batch(model, tokenizer, rows)
    logits, labels, _ = mosaic.answer_logits(model, batch)
    log_p = -F.cross_entropy(logits, labels, reduction="none")  # (N,)
    parts = log_p.split([len(row.answer) for row in rows])
    return torch.stack([part.mean() for part in parts])


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """L_OR of ORPO (arXiv 2403.07691, eq. 7): mean log-probabilities (B,) -> ().

    -log sigmoid(log odds(chosen) - log odds(rejected)), odds(p) = p / (1 - p).
    """
    log_odds = [
        p - torch.log1p(-p.exp().clamp(max=1 - 1e-6)) for p in (chosen, rejected)
    ]
    return -F.logsigmoid(log_odds[0] - log_odds[1]).mean()


def sft_loss(model: Model, tokenizer: Tokenizer, wanted: list[Row], other) -> Tensor:
    """Cross-entropy of the wanted answers, mean over all their tokens.

    As usual for SFT; `mosaic.train` gives refusals and other answers a mean each.
    """
    batch = mosaic.make_batch(model, tokenizer, wanted)
    logits, labels, _ = mosaic.answer_logits(model, batch)
    return mosaic.answer_loss(logits, labels)


def orpo_loss(
    model: Model, tokenizer: Tokenizer, wanted: list[Row], other: list[Row]
) -> Tensor:
    """Cross-entropy of the wanted answer, plus 0.1 of the odds-ratio loss."""
    n = len(wanted)
    log_p = row_log_probs(model, tokenizer, wanted + other)  # (2B,)
    tokens = torch.tensor([len(row.answer) for row in wanted]).to(log_p)
    nll = -(log_p[:n] * tokens).sum() / tokens.sum()
    return nll + 0.1 * odds_ratio_loss(log_p[:n], log_p[n:])


# --- Training -------------------------------------------------------------------------

Loss = Callable[[Model, Tokenizer, list[Row], list[Row]], Tensor]
Ids = Callable[[str, mosaic.Policy], list[int]]  # of a prompt under a policy
Updates = dict[str, Tensor]  # (out, in) by the name of a linear map


def by_rule(tokenizer: Tokenizer) -> Ids:
    """Prompts with the policy written out, as the demo's written instruction does."""
    system = takes_system(tokenizer)
    return lambda prompt, policy: mosaic.prompt_ids(
        tokenizer, instruct(prompt, policy, system)
    )


def train_lora(
    model: Model,
    tokenizer: Tokenizer,
    ids: Ids,
    sampler: OrderSampler,
    known: dict[Request, mosaic.Reference],
    loss: Loss,
    config: TrainConfig,
    rank: int = 8,
) -> Updates:
    """Train one adapter on all linear maps over a sampler's tasks; returns its update.

    The schedule is that of `mosaic.train`; the model is left as it was.
    """
    model.eval().requires_grad_(False)
    added = add_lora(model, rank, 2 * rank, config.seed)
    weights = [p for one in added.values() for p in (one.a, one.b)]
    optimizer = torch.optim.Adam(weights)
    refusal, draw = mosaic.refusal_ids(model, tokenizer, mosaic.REFUSAL), sampler.draw
    length = partial(mosaic.task_length, known)
    try:
        for epoch in range(config.epochs):
            batches = sampler.epoch(config.orders, config.batch_size, length)
            for i, tasks in enumerate(tqdm(batches, f"epoch {epoch + 1}", leave=False)):
                wanted, other = [], []
                for request, policy in tasks:
                    # In any order, as control tokens are trained.
                    prompt = ids(request.prompt, draw.sample(policy, len(policy)))
                    pair = [refusal, known[request].row.answer]
                    if request.category not in policy:
                        pair.reverse()
                    wanted.append(Row(prompt, None, pair[0]))
                    other.append(Row(prompt, None, pair[1]))
                cosine = math.cos(math.pi * (epoch + i / len(batches)) / config.epochs)
                optimizer.param_groups[0]["lr"] = (
                    config.learning_rate * (1 + cosine) / 2
                )
                optimizer.zero_grad()
                loss(model, tokenizer, wanted, other).backward()
                optimizer.step()
        return {name: one.delta().detach() for name, one in added.items()}
    finally:
        remove_lora(model)
