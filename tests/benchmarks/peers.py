"""The paper's peers of MOSAIC: SFT and ORPO with LoRA, steered by a written policy.

One adapter serves every policy: the policy is written out as a rule in front of the
request, and the adapter is trained on the same tasks, reference answers and number of
steps as control tokens are. (Differs from the paper, which does not say how its
adapters learn what is switched off: one adapter for all policies fits the one size that
it gives.) The rule has the categories' names: summaries would make prompts five times
as long.

LoRA is written out below, 40 lines, rather than taken from peft: the benchmarks then
run with this repository's five packages, and merging and taking back updates exactly is
all that is needed.
"""

import contextlib
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

import mosaic
from mosaic import Model, OrderSampler, Reference, Row, Tokenizer, TrainConfig
from train_demo import instruct

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


# --- Vectors at every layer -----------------------------------------------------------


class Layers(nn.Module):
    """Control tokens with vectors of their own at every layer (P-tuning v2).

    Hooks on the decoder layers write `start + unit * steps` over what stands at a
    control token, so that training, AUC and generate need not know. They start at what
    the backbone itself makes of the tokens there.
    """

    def __init__(self, model: Model, tokens: mosaic.ControlTokens):
        super().__init__()
        self.tokens, self.at = tokens, None
        table = torch.stack([*tokens.vectors]).detach().to(model.dtype)  # (K, M, D)
        with torch.no_grad():
            found = model(inputs_embeds=table, output_hidden_states=True)
        start = torch.stack(found.hidden_states[1:-1]).float()  # (layers - 1, K, M, D)
        self.start = start.flatten(1, 2)  # (layers - 1, K*M, D)
        self.unit = self.start.abs().flatten(1).median(1).values[:, None, None]
        self.steps = nn.Parameter(torch.zeros_like(self.start))
        layers = model.get_decoder().layers
        for i, layer in enumerate(layers):
            layer.register_forward_pre_hook(self.hook(i))

    def hook(self, i: int) -> Callable:
        def write(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden, *rest = args  # (B, L, D)
            if i == 0:  # which of the K*M tokens stands where: by their first numbers
                table = torch.cat([*self.tokens.vectors]).detach().to(hidden)[:, :16]
                same = hidden.detach()[:, :, None, :16] == table  # (B, L, K*M, 16)
                row, position, token = same.all(-1).nonzero(as_tuple=True)
                self.at = (row, position), token
                return args
            (row, position), token = self.at
            if len(token):
                deep = self.start[i - 1] + self.unit[i - 1] * self.steps[i - 1]
                hidden = hidden.index_put((row, position), deep[token].to(hidden))
            return hidden, *rest

        return write


# --- Losses ---------------------------------------------------------------------------


def answer_log_probs(model: Model, rows: Sequence[Row]) -> list[Tensor]:
    """log p(y_t) at each row's answer tokens, B of (n,)."""
    logits, labels = mosaic.answer_logits(model, rows)
    log_p = -F.cross_entropy(logits, labels, reduction="none")  # (N,)
    return [*log_p.split([len(row.answer) for row in rows])]


def sft_loss(model: Model, wanted: list[Row], other: list[Row]) -> Tensor:
    """Cross-entropy of the wanted answers, mean over all their tokens, as usual."""
    return -torch.cat(answer_log_probs(model, wanted)).mean()


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """L_OR of ORPO (arXiv 2403.07691, eq. 7): mean log-probabilities (B,) -> ().

    -log sigmoid(log odds(chosen) - log odds(rejected)), odds(p) = p / (1 - p).
    """
    log_odds = [
        p - torch.log1p(-p.exp().clamp(max=1 - 1e-6)) for p in (chosen, rejected)]
    return -F.logsigmoid(log_odds[0] - log_odds[1]).mean()


def orpo_loss(model: Model, wanted: list[Row], other: list[Row]) -> Tensor:
    """Cross-entropy of the wanted answers, plus 0.1 of the odds-ratio loss."""
    log_p, n = answer_log_probs(model, wanted + other), len(wanted)
    means = torch.stack([one.mean() for one in log_p])  # (2B,)
    return -torch.cat(log_p[:n]).mean() + 0.1 * odds_ratio_loss(means[:n], means[n:])


# --- Training -------------------------------------------------------------------------

Loss = Callable[[Model, list[Row], list[Row]], Tensor]
Updates = dict[str, Tensor]  # (out, in) by the name of a linear map


def ruled_row(
    tokenizer: Tokenizer, task: mosaic.Task, rng: random.Random | None = None,
    summaries: dict[str, str] | None = None,
) -> Row:
    """What is read for a task: its policy as a written rule, in any order to train."""
    policy = rng.sample(task.policy, len(task.policy)) if rng else task.policy
    rule = instruct(task.request.prompt, policy, summaries or {}, tokenizer)
    return Row(mosaic.prompt_ids(tokenizer, rule))


def task_pairs(
    tokenizer: Tokenizer, tasks: Sequence[mosaic.Task], refusal: list[int],
    rng: random.Random,
) -> tuple[list[Row], list[Row]]:
    """The tasks' rows with the wanted answer, and with the other one."""
    wanted, other = [], []
    for task in tasks:
        row, own = ruled_row(tokenizer, task, rng), task.request.answer
        pair = (refusal, own) if task.refuse else (own, refusal)
        wanted.append(row._replace(answer=pair[0]))
        other.append(row._replace(answer=pair[1]))
    return wanted, other


def train_lora(
    model: Model, tokenizer: Tokenizer, categories: Sequence[str],
    references: Sequence[Reference], loss: Loss, config: TrainConfig, rank: int = 8,
) -> Updates:
    """Train one adapter on all linear maps for every policy; returns its update.

    Tasks and schedule are those of `mosaic.train`; the rate is Adam's own. The model is
    left as it was.
    """
    model.eval().requires_grad_(False)
    added = add_lora(model, rank, 2 * rank, config.seed)
    optimizer = torch.optim.Adam([p for one in added.values() for p in (one.a, one.b)])
    refusal = mosaic.refusal_ids(model, tokenizer, mosaic.REFUSAL)
    try:
        for epoch in range(config.epochs):
            rng = random.Random(f"{config.seed}, epoch {epoch}")
            sampler = OrderSampler(
                references, categories, categories, config.positives_per_subset,
                config.negatives_per_positive, rng)
            batches, seen = sampler.epoch(config.orders, config.batch_size), []
            for i, tasks in enumerate(tqdm(batches, f"epoch {epoch + 1}", leave=False)):
                wanted, other = task_pairs(tokenizer, tasks, refusal, rng)
                progress = (epoch + i / len(batches)) / config.epochs
                cosine = (1 + math.cos(math.pi * progress)) / 2
                optimizer.param_groups[0]["lr"] = config.learning_rate * cosine
                optimizer.zero_grad()
                value = loss(model, wanted, other)
                value.backward()
                optimizer.step()
                seen.append(value.item())
            tqdm.write(f"epoch {epoch + 1}/{config.epochs}   {mean(seen):.3f}")
        return {name: one.delta().detach() for name, one in added.items()}
    finally:
        remove_lora(model)
