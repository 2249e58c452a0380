"""One training on any backbone, with its curve: control tokens, or what bounds them.

    python tests/benchmarks/real.py --model FILE.gguf --bf16 --steps 460 --orders 1 \\
        --categories alcohol betting
    python tests/benchmarks/real.py --model FOLDER --minutes 10 --batch_size 64
    python tests/benchmarks/real.py --model FOLDER --method lora --minutes 10
    python tests/benchmarks/real.py --model FOLDER --tokens FILE.safetensors --test
    python tests/benchmarks/real.py --model FOLDER --method lora --steps 0 \\
        --summaries data_sample/summaries.json  # the written rule alone
    python tests/benchmarks/real.py --sweep FILE   # a line of flags each, side by side
    python tests/benchmarks/real.py --picture FILE.svg RUN.json ...   # their curves

Control tokens stand after the user's words, which they can read there, or with --place
before in front of them as in the paper; on the embedded backbone that is the default.

Methods: tokens; shared and mlp, the same tokens trained through parameters that all
categories have in common and folded back (see Reparametrised); layers, vectors at every
layer; lora, one adapter steered by the written policy.

What is cheap or comes first: --prefix reads what all prompts begin with (a template's
system message) once, and --read_once also the words before control tokens, or else the
control tokens of a policy once for all rows of a batch under it; --decide_until and
--first_order_until put the decision, and policies of one category, before the rest.

Prints along the way the AUC of the refusal's log-probability by order, on training and
validation requests; at the end DSR, OR and near-miss OR on validation, or with --test
on the test split. The loop is that of mosaic.train, but ends by steps or by the clock.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import platform
import random
import shlex
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import mosaic
import peers
from data_sample.reading import read_requests, read_summaries
from data_sample.recipe.word_lists import CATEGORIES, PROFESSIONAL, Lists
from measure import auc, answer_log_probabilities, drift, write_whole
from mosaic import (
    NEUTRAL, ControlTokens, OrderSampler, Request, Row, Task, TrainConfig, batched
)
from robustness import border_cases, safe_prompts
from train_demo import EMBEDDED, JUDGED_TOKENS, instruct, load_backbone

KNOBS = ("optimizer", "learning_rate", "kd_weight", "first_weight", "later_weight",
         "batch_size", "answer_tokens", "later_turns", "negatives_per_positive", "seed")
METHODS = ("tokens", "shared", "mlp", "layers", "lora")


def misfit(args: argparse.Namespace) -> str:
    """Why these flags do not go together, if so."""
    if args.keep_teacher and (not args.bf16 or args.method in ("layers", "lora")):
        return "--keep_teacher goes with --bf16 and control tokens"
    if (args.tokens or args.go_on) and args.method in ("layers", "lora"):
        return "a saved table is for methods that train one"
    if args.prefix and args.method in ("layers", "lora"):
        return "--prefix is for control tokens that stand behind it"
    return ""


def flags() -> argparse.Namespace:
    default = TrainConfig()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="", help="folder, GGUF file or hub name; empty: embedded")
    add("--method", choices=METHODS, default="tokens")
    add("--data", default=str(ROOT / "data_sample" / "requests.jsonl"))
    add("--more", type=int, default=0, help="so many more training requests of a kind "
        "from those that the embedded backbone was taught from, data_sample/recipe")
    add("--categories", nargs="+", help="only these; all of the data")
    add("--orders", type=int, nargs="+", help="1 .. min(K, 4)")
    add("--summaries", default="", help="JSON, a sentence for each category: of the "
        "written rule of --method lora; its names")
    add("--mlp_rate", type=float, default=1e-3, help="Adam's, of --method mlp")
    add("--first_order_until", type=float, default=0, help="this share on order 1 only")
    add("--decide_until", type=float, default=0,
        help="up to this share only the first three tokens of answers are learned")
    add("--prefix", action="store_true",
        help="what all prompts begin with is read once and kept as a cache")
    add("--read_once", action="store_true", help="--prefix, and what comes first is "
        "read once: a first turn's words for all of the run, or else a policy's "
        "control tokens for all of a batch")
    add("--keep_teacher", action="store_true", help="the backbone's distributions are "
        "kept from epoch to epoch; with --bf16, on a CPU")
    add("--place", choices=mosaic.PLACES, help="of control tokens, before or after the "
        "user's words; that of a saved table, or else after, embedded before")
    add("--steps", type=int, default=1000)
    add("--minutes", type=float, help="the clock ends it, in place of --steps")
    add("--tokens_per_category", type=int, default=20)
    add("--tokens", default="", help="a saved table: nothing is trained")
    add("--go_on", default="", help="a saved table to train further: no new start")
    add("--start", choices=("words", "name", "normal"), default="words")
    add("--start_scale", type=float, default=1, help="times the default length")
    add("--refusal", default=mosaic.REFUSAL, help="the sentence that is trained; a "
        "saved table has its own")
    for name in KNOBS:
        value = getattr(default, name)
        add(f"--{name}", type=type(value), default=value)
    add("--bf16", action="store_true", help="on a CPU; on CUDA it always is")
    add("--measure_every", type=int, default=115, help="steps between two AUCs")
    add("--measure_orders", type=int, nargs="+", help="of the curve; as --orders")
    add("--most", type=int, default=0, help="requests of a kind in the curve; 0: all")
    add("--final_orders", type=int, nargs="+", help="of DSR and OR; 1 .. K")
    add("--sample", type=int, default=0, help="requests of a kind measured at the end")
    add("--policies", type=int, default=5, help="at most, of an order, measured")
    add("--references", default="", help="a file that keeps the backbone's answers")
    add("--no_answers", action="store_true", help="AUC only, no DSR and OR")
    add("--test", action="store_true", help="measure on the test split at the end, "
        "also in a second turn, on border cases and on what the backbone declines")
    add("--xstest", default="", help="XSTest's prompts (CSV): the safe ones declined")
    add("--sweep", help="a file with a line of flags for each run, all at once")
    add("--picture", nargs="+", help="an SVG file to draw, and runs: FILE, LABEL=FILE, "
        "or FILE,FILE of one that went on")
    add("--output", default="runs/real/run.json")
    args = parser.parse_args()
    args.prefix |= args.read_once
    if wrong := misfit(args):
        parser.error(wrong)
    return args


def few(requests: list, most: int, seed: int = 0) -> list:
    """At most `most` requests of each kind, drawn with a seed; 0: all."""
    rng, count = random.Random(seed), {}
    chosen = []
    for request in rng.sample(requests, len(requests)):
        kind = request.category, request.near
        count[kind] = count.get(kind, 0) + 1
        if not most or count[kind] <= most:
            chosen.append(request)
    return chosen


def listed_requests(most: int, seed: int = 0) -> list[Request]:
    """At most `most` of a kind, from the lists that the embedded backbone learned from.

    Written apart from the data; what comes close to a request that is not to train on
    is left out. Lookalikes are near misses, of whichever category.
    """
    lists = Lists()
    found = [Request(row[-1], name if name in CATEGORIES else NEUTRAL)
             for name, subject in lists.subjects.items() for row in subject.scenes
             if name not in PROFESSIONAL]
    found += [Request(row[-1], NEUTRAL, near="any") for row in lists.lookalike_scenes]
    return few(found, most, seed)


class Prefixed:
    """A backbone that has read already what rows begin with: keys and values are kept.

    It takes the model's place in mosaic.answer_logits, for rows that lack these `ids`
    and what `read_policies` or `read_words` has read after them.
    """

    def __init__(self, model: mosaic.Model, ids: Sequence[int]):
        self.model, self.turn, self.words = model, [], {}
        with torch.no_grad():
            read = model(torch.tensor([ids], device=model.device), use_cache=True)
        self.kept = self.halves(read)

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    @staticmethod
    def halves(read: transformers.utils.ModelOutput) -> Tensor:
        """Keys and values of all layers, (B, 2 * layers, heads, P, d)."""
        layers = read.past_key_values.layers
        return torch.stack([x for one in layers for x in (one.keys, one.values)], 1)

    def after(self, model: nn.Module, past: list[Tensor], mask: Tensor,
              positions: Tensor, **inputs):
        """`model` on rows of which the i-th goes on from past[i]."""
        sizes = torch.tensor([[kept.shape[2]] for kept in past], device=mask.device)
        length = max(kept.shape[2] for kept in past)
        filled = torch.arange(length, device=mask.device) >= length - sizes  # (B, P)
        past = torch.stack([F.pad(kept, (0, 0, length - kept.shape[2], 0))
                            for kept in past], 1)  # (2 * layers, B, heads, P, d)
        return model(
            attention_mask=torch.cat([filled.to(mask), mask], 1),
            position_ids=positions + sizes,
            past_key_values=transformers.DynamicCache(batched(past, 2)), **inputs)

    def read_policies(self, controls: Sequence[Tensor], turn: Sequence[int]) -> None:
        """Read control tokens (R, D), a policy each, once for all rows under it.

        The next rows, len(turn) in all, go on from policy turn[i]: with a gradient, as
        if each had read it for itself.
        """
        x = torch.stack([*controls]).to(self.model.get_input_embeddings().weight)
        mask = torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
        read = self.after(  # no answer is in it, so it goes through no output head
            self.model.base_model, [*self.kept] * len(x), mask, mask.cumsum(1) - 1,
            inputs_embeds=x, use_cache=True)
        policies = self.halves(read)
        self.turn = [policies[i] for i in turn]

    def read_words(self, words: Sequence[tuple[int, ...]]) -> None:
        """Read what comes before control tokens, once and for all.

        It does not see them, so its keys and values are the bare backbone's. The next
        rows go on from words[i].
        """
        new = [ids for ids in dict.fromkeys(words) if ids not in self.words]
        read = self.kept.shape[3]
        for some in batched(new, 32):
            ids = [torch.tensor(one, device=self.model.device) for one in some]
            ids = pad_sequence(ids, True, mosaic.PAD)  # (B, L)
            mask = (ids != mosaic.PAD).long()
            with torch.no_grad():
                out = self.after(
                    self.model.base_model, [*self.kept] * len(some), mask,
                    mask.cumsum(1) - 1, input_ids=ids.clamp(min=0), use_cache=True)
            for one, kept in zip(some, self.halves(out)):
                self.words[one] = kept[:, :, read : read + len(one)].clone()
        self.turn = [torch.cat([self.kept[0], self.words[ids]], 2) for ids in words]

    def __call__(self, attention_mask: Tensor, position_ids: Tensor, **inputs):
        b = len(attention_mask)
        past, self.turn = self.turn[:b] or [*self.kept] * b, self.turn[b:]
        return self.after(self.model, past, attention_mask, position_ids, **inputs)


class Teacher:
    """mosaic.answer_logits that keeps what the bare backbone gives, for --keep_teacher.

    Kept are the states that go into the output head, D numbers for each token of an
    answer, of which it makes V anew: right where nothing scales its logits.
    """

    def __init__(self, model: mosaic.Model):
        self.plain, self.kept = mosaic.answer_logits, {}
        self.head = model.get_output_embeddings()

    def __call__(self, model: Prefixed, rows: Sequence[Row]):
        if rows[0].control is not None or getattr(model, "turn", None):  # a policy
            return self.plain(model, rows)
        keys = [(tuple(row.prompt), tuple(row.answer)) for row in rows]
        new = {key: row for key, row in zip(keys, rows) if key not in self.kept}
        if new:
            states = []
            with self.head.register_forward_hook(
                    lambda head, args, logits: states.append(args[0])):
                logits, _ = self.plain(model, [*new.values()])
            states = torch.cat(states)
            assert torch.allclose(self.head(states).float(), logits, 0.02, 0.1)
            each = states.split([len(answer) for _, answer in new])
            self.kept.update(zip(new, each))
        labels = [torch.tensor(answer) for _, answer in keys]
        states = torch.cat([self.kept[key] for key in keys])
        return self.head(states).float(), torch.cat(labels)


# --- Parameters that the categories share ---------------------------------------------


class Reparametrised(nn.Module):
    """A table's vectors as functions of more parameters, to train through.

    z_c = own_c + unit * f(own_c / unit): f is one set of vectors ("shared"), or a
    two-layer network over the vectors ("mlp", after arXiv 2305.03937). The table always
    holds the vectors themselves, so nothing has to be folded back at the end.
    """

    def __init__(self, tokens: ControlTokens, kind: str, unit: float):
        super().__init__()
        self.tokens, self.unit = tokens, unit
        m, d = tokens.vectors[0].shape
        self.own = nn.ParameterList(v.detach().clone() for v in tokens.vectors)
        self.added = nn.Parameter(torch.zeros(m, d, device=tokens.vectors[0].device))
        self.mlp = None
        if kind == "mlp":
            down, up = nn.Linear(d, 512), nn.Linear(512, d)
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)
            self.mlp = nn.Sequential(down, nn.GELU(), up).to(self.added.device)

    def values(self) -> list[Tensor]:
        added = [self.mlp(v / self.unit) if self.mlp else self.added for v in self.own]
        return [v + self.unit * more for v, more in zip(self.own, added)]

    def write(self) -> None:
        """The values of now, into the table."""
        self.now = self.values()
        for vector, value in zip(self.tokens.vectors, self.now):
            vector.data.copy_(value.detach())
            vector.grad = None

    def collect(self) -> None:
        """The table's gradients, handed on to the parameters behind it."""
        grads = [v.grad for v in self.tokens.vectors]
        used = [(v, g) for v, g in zip(self.now, grads) if g is not None]
        torch.autograd.backward([v for v, _ in used], [g for _, g in used])

    def groups(self, rate: float, mlp_rate: float) -> list[dict]:
        groups = [{"params": [*self.own], "rate": rate * self.unit}]
        if self.mlp:
            return [*groups, {"params": [*self.mlp.parameters()], "rate": mlp_rate}]
        return [*groups, {"params": [self.added], "rate": rate}]


# --- One training ---------------------------------------------------------------------


class Job:
    """A backbone, its requests with its own answers, what is trained, what is found."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.tokenizer, name = load_backbone(args.model, device)
        if args.bf16:
            self.model = self.model.to(torch.bfloat16)
        self.model.eval().requires_grad_(False)
        if device == "cpu":  # given a mask, its other kernels' backward takes longer
            self.model.set_attn_implementation("eager")
        self.big = 256 if device == "cuda" else 32  # rows at once where none is trained
        self.config = TrainConfig(**{knob: getattr(args, knob) for knob in KNOBS})
        if saved := args.tokens or args.go_on:
            self.tokens = ControlTokens.load(saved, self.model)
            args.refusal = self.tokens.made_for["refusal"]
            place = self.tokens.made_for["place"]
            if args.place not in (None, place):
                raise SystemExit(f"{saved} was trained with --place {place}")
            args.place = place
        embedded = Path(name).resolve() == EMBEDDED
        args.place = args.place or ("before" if embedded else "after")
        if args.read_once and args.later_turns and args.place == "before":
            raise SystemExit("--read_once with --place before is for --later_turns 0")
        self.summaries = read_summaries(args.summaries) if args.summaries else {}
        requests = read_requests(args.data)
        if args.more:
            requests += listed_requests(args.more, args.seed)
        every = dict.fromkeys(q.category for q in requests if q.category != NEUTRAL)
        self.categories = args.categories or [*every]
        requests = [q for q in requests if q.category in (*self.categories, NEUTRAL)]
        self.orders = args.orders or [*range(1, min(len(self.categories), 4) + 1)]
        self.refusal = mosaic.refusal_ids(self.model, self.tokenizer, args.refusal)
        began = time.time()
        self.learn, self.held = self.references(requests)
        self.reader, self.cut = self.model, 0
        if args.prefix:
            read = [*self.learn, *itertools.chain(*self.held.values())]
            shared = os.path.commonprefix([*(q.placed for q in read),
                                           *(q.bare for q in read)])
            self.reader, self.cut = Prefixed(self.model, shared), len(shared)
            self.learn = [dataclasses.replace(
                q, bare=q.bare[self.cut:], placed=q.placed[self.cut:])
                for q in self.learn]
        if args.keep_teacher:
            mosaic.answer_logits = Teacher(self.model)
        self.curve = {"train": few(self.held["train"], args.most or 15),
                      "validation": few(self.held.get("validation", []), args.most)}
        self.start(requests)
        self.result = {
            "command": f"python tests/benchmarks/real.py {shlex.join(sys.argv[1:])}",
            "model": name, "hardware": hardware(), "torch": torch.__version__,
            "transformers": transformers.__version__, "settings": vars(args),
            "learned_from": len(self.learn), "curve": [],
            "reference_seconds": round(time.time() - began)}

    def references(self, requests: list) -> tuple[list, dict[str, list]]:
        """What is learned from, and what is measured on: answered by the backbone."""
        kept = Path(self.args.references or os.devnull)
        splits = ["validation"] + ["test"] * self.args.test
        trained = self.args.steps and not self.args.tokens
        config, args = self.config, self.args
        asked = [mosaic.fingerprint(self.model), zlib.crc32(repr(requests).encode()),
                 splits, bool(trained), args.sample, args.place, args.refusal,
                 config.answer_tokens, config.later_turns, config.seed]
        if self.args.references and kept.exists():
            stored = torch.load(kept, weights_only=False)  # our own file
            if stored["asked"] != asked:
                raise SystemExit(f"{kept} keeps answers of another backbone, data or "
                                 "settings: take another --references")
            return stored["learn"], stored["held"]
        learn = []
        if not trained:
            splits = splits[-1:]
        else:
            learn = mosaic.training_references(
                self.model, self.tokenizer, requests, config, args.refusal, args.place)
        held = {"train": [q for q in learn if isinstance(q.prompt, str)]}
        for split in splits:
            some = few([q for q in requests if q.split == split], self.args.sample)
            found = mosaic.reference_answers(
                self.model, self.tokenizer, some, 24, self.big, args.place)
            held[split] = [q for q in found if not self.refused(q.text)]
            held["declined"] = [q for q in found if self.refused(q.text)]
            print(f"{split}: the backbone answers {len(held[split])} of {len(found)}")
        if self.args.test:  # the same, each after a harmless request and its answer
            rng = random.Random(0)
            calm = [q for q in held["test"] if q.category == NEUTRAL and not q.near]
            chats = [mosaic.later_turn(rng.choice(calm), q) for q in held["test"]]
            found = mosaic.reference_answers(
                self.model, self.tokenizer, chats, 24, self.big, args.place)
            held["second turn"] = [q for q in found if not self.refused(q.text)]
        if self.args.references:
            torch.save({"asked": asked, "learn": learn, "held": held}, kept)
        return learn, held

    def refused(self, text: str) -> bool:
        return mosaic.is_refusal(text, self.args.refusal)

    def start(self, requests: list) -> None:
        """What is trained: what `self.optimizer` has, in groups with a rate."""
        args, model = self.args, self.model
        unit = mosaic.embedding_std(model, self.tokenizer)
        rate = self.config.learning_rate
        self.behind = None
        if args.tokens:
            args.steps = 0
        elif not args.go_on:
            told = requests if args.start == "words" else ()
            self.tokens = ControlTokens.for_model(
                model, self.tokenizer, self.categories, args.tokens_per_category, told,
                refusal=args.refusal, place=args.place, seed=args.seed)
            if args.start == "normal":
                torch.manual_seed(args.seed)
                size = mosaic.stream_size(model, self.tokenizer)
                for vectors in self.tokens.vectors:
                    vectors.data.normal_(0, size)
            for vectors in self.tokens.vectors:
                vectors.data.mul_(args.start_scale)
        self.optimizer = mosaic.make_optimizer(self.tokens, self.config, unit)
        if args.method in ("shared", "mlp"):
            self.behind = Reparametrised(self.tokens, args.method, unit)
            groups = self.behind.groups(rate, args.mlp_rate)
            self.optimizer = torch.optim.Adam(groups)
        elif args.method == "layers":
            layers = peers.Layers(model, self.tokens)
            self.optimizer = torch.optim.Adam([
                {"params": [*self.tokens.parameters()], "rate": rate * unit},
                {"params": [layers.steps], "rate": rate / 5}])
        elif args.method == "lora":
            added = peers.add_lora(model, 8, 16, args.seed).values()
            numbers = [p for one in added for p in (one.a, one.b)]
            self.optimizer = torch.optim.Adam([{"params": numbers, "rate": rate}])

    def row(self, task: Task, rng: random.Random | None = None) -> Row:
        """What is read for a task: control tokens or, for LoRA, the written policy."""
        if self.args.method == "lora":
            return peers.ruled_row(self.tokenizer, task, rng, self.summaries)
        placed = task.request.placed[self.cut:]
        return Row(placed, self.tokens.compose(task.policy, rng))

    def read_before(
        self, tasks: list[Task], rows: list[Row], rng: random.Random | None = None
    ) -> list[Row]:
        """With --read_once: have read what comes first, and the rows without it."""
        if not self.args.read_once:
            return rows
        if self.args.place == "after":
            cuts = [row.prompt.index(mosaic.SLOT) for row in rows]
            self.reader.read_words([row.prompt[:i] for i, row in zip(cuts, rows)])
            return [row._replace(prompt=row.prompt[i:]) for i, row in zip(cuts, rows)]
        policies = [*dict.fromkeys(task.policy for task in tasks)]
        controls = [self.tokens.compose(policy, rng) for policy in policies]
        turn = [policies.index(task.policy) for task in tasks]
        self.reader.read_policies(controls, turn)
        assert all(row.prompt.index(mosaic.SLOT) == 0 for row in rows)
        return [row._replace(prompt=row.prompt[1:], control=None) for row in rows]

    @torch.no_grad()
    def auc(self, references: list, orders: list[int]) -> dict[int, float]:
        """AUC of the refusal's log-probability: requests to decline against others."""
        found = {}
        for order in orders:
            policies = mosaic.subsets(
                self.categories, order, self.args.policies, random.Random(0))
            sides = {True: [], False: []}
            for policy in policies:
                tasks = [Task(q, policy) for q in references]
                rows = [self.row(task)._replace(answer=self.refusal) for task in tasks]
                # One place each, or answer_log_probabilities' order would not be ours.
                assert not self.args.read_once or all(
                    row.prompt.count(mosaic.SLOT) == 1 for row in rows)
                rows = self.read_before(tasks, rows)
                scores = answer_log_probabilities(self.reader, rows, self.big)
                for task, score in zip(tasks, scores):
                    sides[task.refuse].append(score)
            found[order] = round(auc(sides[True], sides[False]), 4)
        return found

    def note(self, step: int, seconds: float, recent: list) -> None:
        """A point of the curve, into the file at once, and the table."""
        orders = self.args.measure_orders or self.orders
        aucs = {split: self.auc(held, orders) for split, held in self.curve.items()}
        point = {"step": step, "seconds": round(seconds), **means(recent), "auc": aucs}
        self.result["curve"].append(point)
        print(json.dumps(point), flush=True)
        write(self.args.output, self.result)
        self.save()

    def save(self) -> None:
        """Write the table as it is now beside the result: a run may be killed."""
        if self.args.method in ("tokens", "shared", "mlp"):
            used = dataclasses.asdict(self.config) | {"orders": self.orders}
            self.tokens.made_for["training"] = used
            self.tokens.save(str(Path(self.args.output).with_suffix(".safetensors")))

    def batches(self):
        """Batches of tasks with their rng, epoch after epoch without an end."""
        for epoch in itertools.count():
            rng = random.Random(f"{self.args.seed}, epoch {epoch}")
            config, every = self.config, self.categories
            sampler = OrderSampler(
                self.learn, every, every, config.positives_per_subset,
                config.negatives_per_positive, rng)
            early = self.progress < self.args.first_order_until
            orders = [1] if early else self.orders
            for tasks in sampler.epoch(orders, config.batch_size):
                tasks = sorted(tasks, key=lambda task: len(task.request.placed))
                yield tasks, rng

    def losses(self, tasks: list[Task], rng: random.Random) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and what is logged of it."""
        if self.args.method == "lora":
            wanted = [self.row(task, rng)._replace(
                answer=self.refusal if task.refuse else task.request.answer)
                for task in tasks]
            return peers.sft_loss(self.model, wanted, []), torch.empty(0)
        refusal = self.refusal
        if self.progress < self.args.decide_until:
            refusal = refusal[:3]
            tasks = [Task(dataclasses.replace(q, answer=q.answer[:3]), policy)
                     for q, policy in tasks]
        rows = mosaic.task_rows(self.tokens, tasks, refusal, rng)
        rows = self.read_before(tasks, rows, rng)
        weights = mosaic.answer_weights(rows, self.config, self.progress)
        logged = mosaic.batch_losses(self.reader, tasks, rows, weights, refusal)
        loss = logged[0] + logged[1] + self.config.kd_weight * logged[2]
        return loss, logged.detach()

    def train(self) -> None:
        """The loop of mosaic.train, measured along the way."""
        args, spent, recent = self.args, 0.0, []
        optimizer = self.optimizer
        self.progress = 0.0
        for step, (tasks, rng) in enumerate(self.batches()):
            self.progress = spent / args.minutes / 60 if args.minutes else (
                step / args.steps)
            if step % args.measure_every == 0 or self.progress >= 1:
                self.note(step, spent, recent)
                recent = []
            if self.progress >= 1:
                break
            then = time.time()
            cosine = (1 + math.cos(math.pi * self.progress)) / 2
            for group in optimizer.param_groups:
                own = group.get("rate", optimizer.defaults["lr"])
                group["lr"] = own * cosine
            optimizer.zero_grad()
            if self.behind:
                self.behind.write()
            loss, logged = self.losses(tasks, rng)
            loss.backward()
            if self.behind:
                self.behind.collect()
            optimizer.step()
            recent.append(logged)
            if self.model.device.type == "cuda":
                torch.cuda.synchronize()
            spent += time.time() - then
        if self.behind:
            self.behind.write()
        self.save()

    def respond(self, prompts: list, policies: list) -> list[str]:
        tokens, options = self.tokens, {"batch_size": self.big}
        if self.args.method == "lora":
            tokens, ruled = None, zip(prompts, policies)
            prompts = [instruct(p, s, self.summaries, self.tokenizer)
                       for p, s in ruled]
            policies = None
        return mosaic.generate(self.model, self.tokenizer, tokens, prompts, policies,
                               JUDGED_TOKENS, **options)

    def shares(self, split: str, orders: list[int], policies: int) -> list[dict]:
        found = mosaic.evaluate(
            self.respond, self.held[split], self.categories, orders, policies,
            judge=lambda prompt, answer: self.refused(answer))
        for cell in found:
            rates = {k: round(100 * cell[k]["rate"], 1)
                     for k in ("dsr", "over_refusal", "near_miss")}
            print(f"{split}, order {cell['order']}: {rates}", flush=True)
        return found

    def declined(self, prompts: list, policies: list) -> dict[str, float]:
        answers = self.respond(prompts, policies)
        return mosaic.share([*map(self.refused, answers)])

    def kept(self, own: list) -> dict[str, float]:
        """Of what the backbone declines by itself, declined under another's policy."""
        rng, prompts, policies = random.Random(0), [], []
        for q in own:
            if others := [name for name in self.categories if name != q.category]:
                prompts.append(q.prompt)
                policies.append([rng.choice(others)])
        return self.declined(prompts, policies)

    def evaluate(self) -> None:
        """AUC, DSR, OR and near-miss OR on validation or, with --test, on test."""
        split = "test" if self.args.test else "validation"
        brief = self.args.measure_orders if self.args.no_answers else []
        self.result[f"{split}_auc"] = self.auc(self.held[split], brief or self.orders)
        print(split, self.result[f"{split}_auc"], flush=True)
        if self.args.no_answers:
            return
        orders = self.args.final_orders or [*range(1, len(self.categories) + 1)]
        self.result[split] = self.shares(split, orders, self.args.policies)
        write(self.args.output, self.result)
        if self.args.test:
            odd = [order for order in orders if order % 2]
            self.result["second_turn"] = self.shares(
                "second turn", odd, self.args.policies)
            write(self.args.output, self.result)  # a lease may end
            self.result["own_refusals_kept"] = self.kept(self.held["declined"])
            self.result["border"] = {
                kind: self.declined(*asked)
                for kind, asked in border_cases(self.categories).items()}
        if self.args.xstest:
            safe = safe_prompts(self.args.xstest)
            single = [[name] for name in self.categories]
            self.result["xstest"] = {
                "+".join(policy): self.declined(safe, [policy] * len(safe))
                for policy in [*single, self.categories]}
            write(self.args.output, self.result)
        if self.args.method != "lora":
            single = [(name,) for name in self.categories]
            self.result["drift"] = drift(
                self.model, self.tokenizer, self.tokens, self.held[split], single)


def means(recent: list) -> dict:
    """Mean losses and first-token shares since the last measurement."""
    if not recent or not len(recent[0]):
        return {}
    names = "refusal", "reference", "kd", "declines_active", "declines_others"
    values = torch.stack(recent).nanmean(0).tolist()
    return {name: round(value, 4) for name, value in zip(names, values)}


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def write(path: str, result: dict) -> None:
    write_whole(Path(path), json.dumps(result, indent=1) + "\n")


def tasks_and_aucs(files: list[str]) -> list[tuple[int, dict[str, float]]]:
    """(tasks so far, validation AUC by order) of a run, and of those that went on."""
    points, before = [], 0
    for file in files:
        run = json.loads(Path(file).read_text())
        size = run["settings"]["batch_size"]
        points += [(before + p["step"] * size, p["auc"]["validation"])
                   for p in run["curve"]]
        before = points[-1][0]
    return points


def picture(path: str, *runs: str) -> None:
    """Validation AUC over tasks, an order a panel; needs matplotlib."""
    import matplotlib.figure

    matplotlib.rcParams.update({"svg.hashsalt": "mosaic", "svg.fonttype": "none"})
    parts = [run.rpartition("=") for run in runs]
    found = {label or Path(files).stem: tasks_and_aucs(files.split(","))
             for label, _, files in parts}
    orders = [*next(iter(found.values()))[0][1]]
    figure = matplotlib.figure.Figure(figsize=(4 * len(orders), 3.2), layout="tight")
    panels = figure.subplots(1, len(orders), sharey=True, squeeze=False)[0]
    for order, panel in zip(orders, panels):
        for label, points in found.items():
            drawn = [(tasks / 1000, auc[order]) for tasks, auc in points]
            panel.plot(*zip(*drawn), label=label)
        panel.set(title=f"order {order}", xlabel="thousands of tasks")
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="AUC, validation requests")
    panels[-1].legend(frameon=False, fontsize="small")
    figure.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")


def main() -> None:
    args = flags()
    if args.picture:
        return picture(*args.picture)
    os.makedirs(Path(args.output).parent, exist_ok=True)
    if not args.sweep:
        job = Job(args)
        if args.steps:
            job.train()
        job.evaluate()
        return write(args.output, job.result)
    lines = Path(args.sweep).read_text(encoding="utf-8").splitlines()
    jobs = [subprocess.Popen([sys.executable, __file__, *shlex.split(line)])
            for line in lines if line.strip() and not line.startswith("#")]
    raise SystemExit(max(job.wait() for job in jobs))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
