"""How fast and how lean mosaic.py trains and generates, against what one writes today.

    python tests/benchmarks/speed.py                       # 2 layers of a 0.5B shape
    python tests/benchmarks/speed.py --layers 24           # the whole shape, on a GPU
    python tests/benchmarks/speed.py --model data_sample/tiny_chat
    python tests/benchmarks/speed.py --ways "mosaic.py" "without the teacher"

The job is one for all: tasks of orders 1 to 4 over data_sample/requests.jsonl. The peer
is prompt tuning as peft does it (with peft where it is installed, else in plain torch):
logits at every position, and a second forward without the prompt for the KD. Speeds are
medians over paired rounds in one process, on a CPU in processor time; a peak of memory
is taken in a process of its own, on a CPU without what Python and the libraries hold
before a model is there (Linux only). Everything goes to --json as well.
"""

import argparse
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
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.modeling_layers import GradientCheckpointingLayer

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

import mosaic
from data_sample.reading import read_requests
from mosaic import IGNORE, NEUTRAL, ControlTokens, OrderSampler, Reference, TrainConfig
from train_demo import EMBEDDED, REQUESTS, load_backbone

try:
    import peft
except ImportError:
    peft = None

SHAPE = dict(  # Qwen2.5-0.5B
    vocab_size=151_936, hidden_size=896, intermediate_size=4864,
    num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True)


class Job:
    """A model, fresh tokens, and batches of tasks."""

    def __init__(self, flags):
        torch.manual_seed(0)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.tokenizer, _ = load_backbone(
            flags.model or str(EMBEDDED), self.device)
        if not flags.model:
            config = Qwen2Config(num_hidden_layers=flags.layers, **SHAPE)
            config.eos_token_id = self.tokenizer.eos_token_id
            dtype = self.model.dtype
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            self.model = model.to(self.device)
        self.model.eval().requires_grad_(False)
        requests = [q for q in read_requests(str(REQUESTS)) if q.split == "train"]
        # What the answers say is of no account here; 16 ids, as long as they get.
        self.learn, size = [], len(self.tokenizer)
        for q in requests:
            bare, placed = (mosaic.prompt_ids(self.tokenizer, q.prompt, place)
                            for place in (None, "after"))
            answer = torch.randint(size, (16,)).tolist()
            self.learn.append(Reference(
                q.prompt, q.category, q.split, q.near, bare, placed, answer))
        names = dict.fromkeys(q.category for q in requests)
        self.categories = [name for name in names if name != NEUTRAL]
        sampler = OrderSampler(
            self.learn, self.categories, self.categories, 100, 1.0, random.Random(0))
        batches = sampler.epoch((1, 2, 3, 4), flags.batch_size)[: flags.steps]
        self.batches = [
            sorted(batch, key=lambda task: len(task.request.placed))
            for batch in batches]
        self.m = flags.tokens_per_category
        self.tokens = ControlTokens.for_model(
            self.model, self.tokenizer, self.categories, self.m)
        self.refusal = mosaic.refusal_ids(self.model, self.tokenizer, mosaic.REFUSAL)
        self.peft_models = {}

    def answer(self, task) -> list[int]:
        return self.refusal if task.refuse else task.request.answer

    def clock(self) -> float:
        """Seconds; on a CPU its own, for other work on the machine is not counted."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time() / torch.get_num_threads()

    def peft_model(self, order: int):
        """As many virtual tokens as a policy of this size has."""
        if order not in self.peft_models:
            config = peft.PromptTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=self.m * order)
            self.peft_models[order] = peft.get_peft_model(
                self.model, config, f"order{order}")
        return self.peft_models[order]


# --- One step of training, in several ways --------------------------------------------


def ours(job, tasks, rng):
    rows = mosaic.task_rows(job.tokens, tasks, job.refusal, rng)
    weights = mosaic.answer_weights(rows, TrainConfig(), 0.5)
    return mosaic.batch_losses(job.model, tasks, rows, weights, job.refusal)[:3].sum()


def without_the_teacher(job, tasks, rng):
    """As ours, but for the KD and the second forward that it needs."""
    rows = mosaic.task_rows(job.tokens, tasks, job.refusal, rng)
    weights = mosaic.answer_weights(rows, TrainConfig(), 0.5).to(job.device)
    return mosaic.answer_loss(*mosaic.answer_logits(job.model, rows), weights)


def head_at_every_position(job, tasks, rng):
    """As ours, but the answer positions are picked from the logits of all positions."""

    def wide(model, rows):
        inputs, labels = mosaic.make_batch(model, rows, "right")
        labels = labels[:, 1:]
        at = (labels != IGNORE).nonzero(as_tuple=True)
        return model(**inputs, use_cache=False).logits.float()[at], labels[at]

    narrow, mosaic.answer_logits = mosaic.answer_logits, wide
    try:
        return ours(job, tasks, rng)
    finally:
        mosaic.answer_logits = narrow


def recomputed(job, tasks, rng):
    """As ours, keeping no activations inside the layers."""
    layers = [m for m in job.model.modules()
              if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    loss = ours(job, tasks, rng)
    for layer in layers:
        del layer.forward
    return loss


def peer(job, tasks, rng):
    """Prompt tuning with a distillation loss, as a user of peft would write it."""
    rows = [([*task.request.bare], [*job.answer(task)]) for task in tasks]
    length = max(len(prompt) + len(answer) for prompt, answer in rows)

    def padded(rows, pad):
        rows = [row + [pad] * (length - len(row)) for row in rows]
        return torch.tensor(rows, device=job.device)

    ids = padded([p + a for p, a in rows], 0)
    mask = padded([[1] * len(p + a) for p, a in rows], 0)
    labels = padded([[IGNORE] * len(p) + a for p, a in rows], IGNORE)
    if peft:
        wide = job.peft_model(len(tasks[0].policy))
        out = wide(input_ids=ids, attention_mask=mask, labels=labels)
        with torch.no_grad(), wide.disable_adapter():
            base = wide(input_ids=ids, attention_mask=mask).logits
    else:
        prompt = torch.stack([job.tokens.compose(task.policy, rng) for task in tasks])
        embeds = job.model.get_input_embeddings()(ids)
        ahead = mask.new_ones(prompt.shape[:2])
        out = job.model(
            inputs_embeds=torch.cat([prompt.to(embeds), embeds], 1),
            attention_mask=torch.cat([ahead, mask], 1),
            labels=torch.cat([ahead * IGNORE, labels], 1))
        with torch.no_grad():
            base = job.model(input_ids=ids, attention_mask=mask).logits
    kept = torch.tensor([not task.refuse for task in tasks], device=job.device)
    answers = (labels[:, 1:] != IGNORE) & kept[:, None]
    log_p = base[:, :-1].float().log_softmax(-1)
    log_q = out.logits[:, -length:-1].float().log_softmax(-1)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return out.loss + (kl * answers).sum() / answers.sum().clamp(min=1)


WAYS = {
    "mosaic.py": ours,
    "without the teacher": without_the_teacher,
    "head at every position": head_at_every_position,
    "recompute": recomputed,
    "prompt tuning": peer,
}


def run_steps(job, way):
    """Seconds of one pass over the job's batches, with Adam's steps."""
    rng, optimizer = random.Random(0), torch.optim.Adam(job.tokens.parameters())
    began = job.clock()
    for tasks in job.batches:
        loss = way(job, tasks, rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return job.clock() - began


def training(job, names, rounds):
    """{way: steps a second and its ratio}: medians of rounds that try every way."""
    seconds = {name: [] for name in names}
    for turn in range(rounds + 1):  # the first warms up
        for name in names:
            took = run_steps(job, WAYS[name])
            if turn:
                seconds[name].append(took)
    own = seconds[names[0]]
    return {
        name: {"steps_per_second": len(job.batches) / statistics.median(took),
               "ratio": statistics.median(a / b for a, b in zip(took, own))}
        for name, took in seconds.items()}


# --- Memory, generation, share of the peak --------------------------------------------


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


def generation(job, rounds):
    """Seconds for 32 prompts: bare, under 32 policies, their ratio."""
    policies = [()]  # and the 31 others
    for r in range(1, 6):
        policies += mosaic.subsets(job.categories, r, 99, random)
    prompts, times = [q.prompt for q in job.learn[:32]], ([], [])
    for turn in range(rounds + 1):
        for some, took in zip((None, policies), times):
            began = job.clock()
            mosaic.generate(job.model, job.tokenizer, job.tokens, prompts, some, 32)
            if turn:
                took.append(job.clock() - began)
    bare, under = map(statistics.median, times)
    ratio = statistics.median(b / a for a, b in zip(*times))
    return {"bare": bare, "32 policies": under, "ratio": ratio}


def matrix_peak(job):
    """FLOP/s of a large matrix product in the model's dtype."""
    n, best = 8192 if job.device == "cuda" else 2048, 0.0
    a = torch.randn(n, n, device=job.device, dtype=job.model.dtype)
    for _ in range(6):
        began = job.clock()
        a @ a
        best = max(best, 2 * n**3 / (job.clock() - began))
    return best


def share_of_peak(job, steps_per_second):
    """4 P FLOPs a token, forward and backward, for weights are not trained.

    2 P for the teacher. P: the layers' weights; the head's at answers only.
    """
    head = job.model.get_output_embeddings().weight
    tables = {id(w): w.numel() for w in (head, job.model.get_input_embeddings().weight)}
    body = sum(p.numel() for p in job.model.parameters()) - sum(tables.values())
    flops = 0
    for task in (task for batch in job.batches for task in batch):
        answer = len(job.answer(task))
        bare = len(task.request.bare) + answer
        flops += 4 * (body * (bare + job.m * len(task.policy)) + head.numel() * answer)
        if not task.refuse:  # the teacher
            flops += 2 * (body * bare + head.numel() * answer)
    return flops / len(job.batches) * steps_per_second / matrix_peak(job)


# --- The whole ------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="", help="instead of the Qwen2.5-0.5B shape")
    add("--layers", type=int, default=2, help="of the shape (24 whole)")
    add("--steps", type=int, default=20)
    add("--batch_size", type=int, default=16)
    add("--tokens_per_category", type=int, default=5)
    add("--rounds", type=int, default=3)
    add("--ways", nargs="+", default=[*WAYS], choices=[*WAYS], help="first: ratio 1")
    add("--json", default="", help="where to write all figures")
    add("--memory", default="", choices=["", *WAYS], help="internal")
    flags = parser.parse_args()
    libraries = resident("VmRSS") if flags.memory else 0.0
    job = Job(flags)
    if flags.memory:
        print(libraries, peak_memory(job, WAYS[flags.memory]))
        return
    found = {
        "device": torch.cuda.get_device_name() if job.device == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "peer": f"peft {peft.__version__}" if peft else "plain torch",
        "training": training(job, flags.ways, flags.rounds),
        "generation_seconds": generation(job, flags.rounds)}
    for name, row in found["training"].items():
        command = [sys.executable, __file__, "--memory", name]
        for key in ("model", "layers", "steps", "batch_size", "tokens_per_category"):
            command += [f"--{key}", str(getattr(flags, key))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        libraries, row["peak_gb"] = map(float, done.stdout.split()[-2:])
        row["peak_gb"] -= libraries if job.device == "cpu" else 0.0
    if "mosaic.py" in found["training"]:
        rate = found["training"]["mosaic.py"]["steps_per_second"]
        found["share_of_matrix_peak"] = share_of_peak(job, rate)
    print("| way | steps/s | time, first = 1 | peak GB |\n|---|---|---|---|")
    for name, row in found["training"].items():
        print(f"| {name} | {row['steps_per_second']:.2f} | {row['ratio']:.2f} "
              f"| {row['peak_gb']:.2f} |")
    print({key: value for key, value in found.items() if key != "training"})
    if flags.json:
        Path(flags.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
