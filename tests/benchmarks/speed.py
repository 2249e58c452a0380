"""How fast and how lean mosaic.py trains and generates, against what one writes today.

    python tests/benchmarks/speed.py                       # 2 layers of a 0.5B shape
    python tests/benchmarks/speed.py --layers 24           # the whole shape, on a GPU
    python tests/benchmarks/speed.py --model data_sample/tiny_chat

The job is one for all: tasks of orders 1 to 4 over data_sample/requests.jsonl. The peer
is prompt tuning as peft does it (with peft where it is installed, else in plain torch):
logits at every position, and a second forward pass without the prompt for the KD.
Speeds are medians over paired rounds in one process; a peak of memory is taken in a
process of its own, on a CPU without what Python and the libraries hold before a model
is there (Linux only). Everything goes to --json as well.
"""

import argparse
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config
from transformers.modeling_layers import GradientCheckpointingLayer

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

import mosaic
from mosaic import IGNORE, ControlTokens, OrderSampler
from train_demo import read_requests

try:
    import peft
except ImportError:
    peft = None

CATEGORIES = ["addiction", "alcohol", "betting", "horror", "sex"]
SHAPE = dict(  # Qwen2.5-0.5B
    vocab_size=151_936,
    hidden_size=896,
    intermediate_size=4864,
    num_attention_heads=14,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


class Job:
    """A model, fresh tokens, and batches of tasks with their reference answers."""

    def __init__(self, flags):
        torch.manual_seed(0)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(ROOT / "data_sample/tiny_chat")
        if flags.model:
            self.tokenizer = AutoTokenizer.from_pretrained(flags.model)
            model = AutoModelForCausalLM.from_pretrained(flags.model)
        else:
            config = Qwen2Config(num_hidden_layers=flags.layers, **SHAPE)
            config.eos_token_id = self.tokenizer.eos_token_id
            model = AutoModelForCausalLM.from_config(config)
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.model = model.to(self.device, dtype).eval().requires_grad_(False)
        self.refusal = mosaic.refusal_ids(self.model, self.tokenizer, mosaic.REFUSAL)
        requests = read_requests(str(ROOT / "data_sample/requests.jsonl"))
        learn = [q for q in requests if q.split == "train"]
        draw = random.Random(0)
        sampler = OrderSampler(learn, CATEGORIES, CATEGORIES, 100, 1.0, draw)
        # Random weights never end an answer: 28 tokens is what the backbone's take.
        self.known = mosaic.reference_answers(self.model, self.tokenizer, learn, 28)
        length = partial(mosaic.task_length, self.known)
        epoch = sampler.epoch((1, 2, 3, 4), flags.batch_size, length)
        self.batches = epoch[: flags.steps]
        self.tokens = ControlTokens.for_model(self.model, self.tokenizer, CATEGORIES)

    def wait(self):
        if self.device == "cuda":
            torch.cuda.synchronize()


# --- One step of training, in several ways --------------------------------------------


def ours(job, tasks, draw, known=None):
    rows = mosaic.task_rows(job.tokens, tasks, job.known, job.refusal, draw)
    losses = mosaic.task_losses(
        job.model, job.tokenizer, tasks, rows, known or job.known
    )
    return sum(losses)


def teacher_every_step(job, tasks, draw):
    bare = {q: mosaic.Reference(one.row) for q, one in job.known.items()}
    return ours(job, tasks, draw, bare)


def head_at_every_position(job, tasks, draw):
    """As ours, but the answer positions are picked from the logits of all positions."""
    narrow = mosaic.answer_logits

    def wide(model, batch):
        labels = batch.labels[:, 1:]
        row, place = (labels != IGNORE).nonzero(as_tuple=True)
        logits = model(
            inputs_embeds=batch.inputs_embeds,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).logits.float()
        return logits[row, place], labels[row, place].to(logits.device), None

    mosaic.answer_logits = wide
    try:
        return ours(job, tasks, draw)
    finally:
        mosaic.answer_logits = narrow


def recomputed(job, tasks, draw):
    """As ours, with the README's way of keeping no activations inside the layers."""
    layers = [
        m for m in job.model.modules() if isinstance(m, GradientCheckpointingLayer)
    ]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    loss = ours(job, tasks, draw)
    for layer in layers:
        del layer.forward
    return loss


def peer(job, tasks, draw):
    """Prompt tuning with a distillation loss, as a user of peft would write it."""
    rows = []
    for task in tasks:
        row = job.known[task.request].row
        answer = job.refusal if task.refuse else row.answer
        rows.append((row.prompt, list(answer)))
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    fill = lambda ids, pad: ids + [pad] * (length - len(ids))
    to = lambda rows: torch.tensor(rows, device=job.device)
    ids = to([fill(p + a, 0) for p, a in rows])
    mask = to([fill([1] * len(p + a), 0) for p, a in rows])
    labels = to([fill([IGNORE] * len(p) + a, IGNORE) for p, a in rows])
    wide = job.peft_model(len(tasks[0].policy)) if peft else None
    if peft:
        out = wide(input_ids=ids, attention_mask=mask, labels=labels)
    else:
        prompt = torch.stack([job.tokens.compose(task.policy, draw) for task in tasks])
        embeds = job.model.get_input_embeddings()(ids)
        embeds = torch.cat([prompt.to(embeds), embeds], 1)
        ahead = mask.new_ones(prompt.shape[:2])
        out = job.model(
            inputs_embeds=embeds,
            attention_mask=torch.cat([ahead, mask], 1),
            labels=torch.cat([ahead * IGNORE, labels], 1),
        )
    with torch.no_grad():
        if peft:
            with wide.disable_adapter():
                base = wide(input_ids=ids, attention_mask=mask).logits
        else:
            base = job.model(input_ids=ids, attention_mask=mask).logits
    control = out.logits[:, -length:]
    kept = torch.tensor([not task.refuse for task in tasks], device=job.device)
    answers = (labels[:, 1:] != IGNORE) & kept[:, None]
    log_p = base[:, :-1].float().log_softmax(-1)
    log_q = control[:, :-1].float().log_softmax(-1)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return out.loss + (kl * answers).sum() / answers.sum().clamp(min=1)


WAYS = {
    "mosaic.py": ours,
    "- teacher states kept": teacher_every_step,
    "- head on answer positions": head_at_every_position,
    "+ recompute": recomputed,
    "prompt tuning": peer,
}


def with_peft(job):
    """Job gets `peft_model(order)`: as many virtual tokens as a policy of that size."""
    made = {}

    def peft_model(order):
        if order not in made:
            config = peft.PromptTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=5 * order
            )
            made[order] = peft.get_peft_model(job.model, config, f"order{order}")
        return made[order]

    job.peft_model = peft_model


def run_steps(job, way, seed=0):
    """(seconds, losses) of one pass over the job's batches, with Adam's steps."""
    draw, losses = random.Random(seed), []
    optimizer = torch.optim.Adam(job.tokens.parameters(), lr=0.01)
    job.wait()
    began = time.perf_counter()
    for tasks in job.batches:
        loss = way(job, tasks, draw)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    job.wait()
    return time.perf_counter() - began, [loss.item() for loss in losses]


def training(job, rounds):
    """{way: steps a second and its ratios}: medians of rounds that try every way."""
    seconds = {name: [] for name in WAYS}
    start = {name: v.detach().clone() for name, v in job.tokens.named_parameters()}
    losses = {}
    for turn in range(rounds + 1):  # the first warms up
        for name, way in WAYS.items():
            job.tokens.load_state_dict(start)
            took, losses[name] = run_steps(job, way)
            if turn:
                seconds[name].append(took)
    job.tokens.load_state_dict(start)
    answers = sum(
        len(job.refusal if t.refuse else job.known[t.request].row.answer)
        for batch in job.batches
        for t in batch
    )
    table, own = {}, seconds["mosaic.py"]
    for name, took in seconds.items():
        apart = max(abs(a - b) for a, b in zip(losses[name], losses["mosaic.py"]))
        table[name] = {
            "steps_per_second": len(job.batches) / statistics.median(took),
            "answer_tokens_per_second": answers / statistics.median(took),
            "time_against_ours": statistics.median(a / b for a, b in zip(took, own)),
            "largest_difference_of_a_loss": None if way_differs(name) else apart,
        }
    return table


def way_differs(name):
    return name == "prompt tuning"  # another place of the tokens and another mean


# --- Memory, categories, generation, peak ---------------------------------------------


def resident(name):
    """GB of this process: VmRSS, now; VmHWM, at most (Linux only)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) * 1024 / 1e9


def peak_memory(job, way):
    """GB at most while training: allocated on a GPU, resident on a CPU."""
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run_steps(job, way)
        return torch.cuda.max_memory_allocated() / 1e9
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    run_steps(job, way)
    return resident("VmHWM")


def epoch_by_categories(job, budget):
    """{K: seconds} of an epoch of the same number of tasks, of K categories."""
    seconds = {}
    for k in (5, 20, 100):
        names = [f"c{i}" for i in range(k)]
        known = {}  # every request under some category, every category with some
        for i, (q, one) in zip(range(400), itertools.cycle(job.known.items())):
            known[mosaic.Request(q.prompt, names[i % k])] = one
            known[mosaic.Request(q.prompt, mosaic.NEUTRAL)] = one
        tokens = ControlTokens.for_model(job.model, job.tokenizer, names)
        config = mosaic.TrainConfig(
            epochs=1, positives_per_subset=budget // k, orders=(1, 2, 3, 4)
        )
        job.wait()
        began = time.perf_counter()
        mosaic.train(job.model, job.tokenizer, tokens, list(known), config, known)
        job.wait()
        seconds[k] = time.perf_counter() - began
    return seconds


def generation(job, rounds):
    """Seconds for 32 prompts: bare, under 32 policies, their ratio."""
    policies = [()]  # and the 31 others
    for r in range(1, 6):
        policies += mosaic.subsets(CATEGORIES, r, 99, random)
    prompts = [q.prompt for q in list(job.known)[:32]]
    times = {"bare": [], "32 policies": []}
    for turn in range(rounds + 1):
        for name, some in (("bare", None), ("32 policies", policies)):
            began = time.perf_counter()
            mosaic.generate(
                job.model, job.tokenizer, job.tokens, prompts, some, max_new_tokens=32
            )
            job.wait()
            if turn:
                times[name].append(time.perf_counter() - began)
    ratio = statistics.median(
        b / a for a, b in zip(times["bare"], times["32 policies"])
    )
    return {name: statistics.median(took) for name, took in times.items()} | {
        "ratio": ratio
    }


def matrix_peak(job):
    """FLOP/s of a large matrix product in the model's dtype."""
    n = 8192 if job.device == "cuda" else 2048
    a = torch.randn(n, n, device=job.device, dtype=job.model.dtype)
    best = 0.0
    for _ in range(6):
        job.wait()
        began = time.perf_counter()
        a @ a
        job.wait()
        best = max(best, 2 * n**3 / (time.perf_counter() - began))
    return best


def share_of_peak(job, steps_per_second):
    """4 P FLOPs a token: forward 2 P, backward 2 P, for weights are not trained."""
    body = sum(p.numel() for p in job.model.parameters())
    embedding = job.model.get_input_embeddings().weight.numel()
    head = job.model.get_output_embeddings().weight
    tied = head is job.model.get_input_embeddings().weight
    body -= embedding if tied else embedding + head.numel()
    inside = answers = kept = 0
    for task in (task for batch in job.batches for task in batch):
        row = job.known[task.request].row
        answer = len(job.refusal if task.refuse else row.answer)
        inside += len(row.prompt) + 5 * len(task.policy) + answer
        answers += answer
        kept += 0 if task.refuse else answer
    # The head: forward and backward at the answers, forward again for the teacher.
    flops = 4 * body * inside + head.numel() * (4 * answers + 2 * kept)
    return flops / len(job.batches) * steps_per_second / matrix_peak(job)


# --- The whole ------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="instead of the Qwen2.5-0.5B shape")
    parser.add_argument("--layers", type=int, default=2, help="of the shape (24 whole)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--budget", type=int, default=200, help="positives an order for K = 5, 20, 100"
    )
    parser.add_argument("--json", default="", help="where to write all figures")
    parser.add_argument("--memory", default="", choices=["", *WAYS], help="internal")
    flags = parser.parse_args()
    libraries = resident("VmRSS") if flags.memory else 0.0
    job = Job(flags)
    if peft:
        with_peft(job)
    if flags.memory:
        print(libraries, peak_memory(job, WAYS[flags.memory]))
        return
    found = {"device": torch.cuda.get_device_name() if job.device == "cuda" else "CPU"}
    found["threads"], found["peer"] = torch.get_num_threads(), "plain torch"
    if peft:
        found["peer"] = f"peft {peft.__version__}"
    found["training"] = training(job, flags.rounds)
    for name, row in found["training"].items():
        command = [sys.executable, __file__, "--memory", name]
        for key in ("model", "layers", "steps", "batch_size"):
            command += [f"--{key}", str(getattr(flags, key))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row["libraries_gb"], row["peak_gb"] = map(float, done.stdout.split()[-2:])
        if job.device == "cpu":  # a GPU holds none of them
            row["peak_gb"] -= row["libraries_gb"]
    if flags.budget:
        epochs = epoch_by_categories(job, flags.budget)
        found["epoch_seconds_by_categories"] = epochs
    found["generation_seconds"] = generation(job, flags.rounds)
    rate = found["training"]["mosaic.py"]["steps_per_second"]
    found["share_of_matrix_peak"] = share_of_peak(job, rate)
    print("| way | steps/s | time, ours = 1 | peak GB | libraries | loss apart |")
    print("|---|---|---|---|---|---|")
    for name, row in found["training"].items():
        apart = row["largest_difference_of_a_loss"]
        print(
            f"| {name} | {row['steps_per_second']:.2f} "
            f"| {row['time_against_ours']:.2f} | {row['peak_gb']:.2f} "
            f"| {row['libraries_gb']:.2f} "
            f"| {'' if apart is None else f'{apart:.0e}'} |"
        )
    print({key: value for key, value in found.items() if key != "training"})
    if flags.json:
        Path(flags.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
