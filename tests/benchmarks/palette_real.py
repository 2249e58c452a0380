"""Palette on a real backbone: domains of harmless requests that it declines by itself.

    python tests/benchmarks/palette_real.py --model FILE.gguf --bf16 \\
        --allow horror sex --json runs/palette_real.json

palette.py's directions, one-layer LoRA, hard negatives and merging, on what an ordinary
model overdoes. A domain is what the backbone declines of one category of the sample
dataset; the other refused requests are those of the other categories and, from the
recipe's lists, unsafe ones; harmless is what it answers. Which answers are refusals
`is_refusal` says. Each domain of --allow gets an adapter, and all of them are merged.

Differs from palette.py: no licence and no LoRA-SFT (nothing shows a wanted answer),
candidates on every second layer of the middle half and the last prompt position only,
and updates are added beside the weights, for bf16 would round them off.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch
import transformers
from torch import Tensor, nn

import mosaic
import palette
from data_sample.reading import read_requests
from measure import is_degenerate, write_whole
from mosaic import NEUTRAL
from real import few, hardware
from train_demo import REQUESTS, load_backbone

SPLITS = ("train", "validation", "test")
SETTINGS = palette.Settings(
    epochs=5, learning_rate=3e-4, positions=1, pool=160, hard=32, harmless=96,
    scored=32, answer_tokens=12)


class Real(palette.Bench):
    """Any backbone, with the requests that it declines, by category, for domains."""

    def __init__(self, args: argparse.Namespace):
        self.settings = replace(SETTINGS, seed=args.seed)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.tokenizer, self.name = load_backbone(args.model, device)
        if args.bf16:
            self.model.to(torch.bfloat16)
        self.model.eval().requires_grad_(False)
        self.layers = self.model.get_decoder().layers
        self.words = {}  # no licences
        refusal = mosaic.refusal_ids(self.model, self.tokenizer, mosaic.REFUSAL)
        self.declines = refusal[0]
        rows = read_requests(str(REQUESTS))
        splits = [[q for q in rows if q.split == split] for split in SPLITS]
        asked = [q for some in splits for q in few(some, args.most, args.seed)]
        said = self.said([q.prompt for q in asked])
        declined = [*map(mosaic.is_refusal, said)]
        self.domains = [*dict.fromkeys(q.category for q in asked)]
        self.domains.remove(NEUTRAL)
        found = {name: {split: [] for split in SPLITS} for name in self.domains}
        harmless = {split: [] for split in SPLITS}
        for q, no in zip(asked, declined):
            if q.category != NEUTRAL and no:
                found[q.category][q.split].append(q.prompt)
            elif not no:
                harmless[q.split].append(q.prompt)
        self.counts = {name: [len(some[split]) for split in SPLITS]
                       for name, some in found.items()}
        first = [ids[:1] == [self.declines] for ids in self.ids]
        self.first = {"declined": share_of(first, declined, True),
                      "answered": share_of(first, declined, False)}
        # Groups that are too small to learn or to measure on are none.
        self.domains = [name for name in self.domains if min(self.counts[name]) >= 3]
        self.asked = {name: found[name] for name in self.domains}
        self.asked |= {"harmless": harmless, "unsafe": self.unsafe()}
        plain = harmless["test"][: self.settings.tested]
        self.neutral = self.answered(plain, plain)
        with torch.no_grad():
            self.base = mosaic.answer_logits(self.model, self.neutral)[0]  # (N, V)

    def said(self, prompts: list[str]) -> list[str]:
        """The backbone's answers; their ids are kept for a look at the first one."""
        rows = [mosaic.Row(mosaic.prompt_ids(self.tokenizer, q)) for q in prompts]
        size = self.settings.answer_tokens
        self.ids = mosaic.generate_ids(
            self.model, self.tokenizer, rows, size, title="what it declines")
        return [self.tokenizer.decode(ids, skip_special_tokens=True).strip()
                for ids in self.ids]

    def in_words(self, domain: str, answer: str) -> bool:
        """No refusal, and no nonsense either."""
        return not mosaic.is_refusal(answer) and not is_degenerate(answer)

    @contextlib.contextmanager
    def updated(self, updates: palette.Updates) -> Iterator[None]:
        """Updates beside the weights, in fp32."""
        with contextlib.ExitStack() as hooks:
            for name, update in updates.items():
                def add(module: nn.Module, x: tuple, out: Tensor, u=update) -> Tensor:
                    return out + (x[0].float() @ u.T).to(out)
                linear = self.layers.get_submodule(name)
                hooks.callback(linear.register_forward_hook(add).remove)
            yield

    def read(self, layer: int | None, prompts, edit=None) -> tuple[Tensor, Tensor]:
        """As palette's, 32 prompts at once; states in fp32."""
        parts = mosaic.batched([*prompts], 32)
        states, logits = zip(*(super(Real, self).read(layer, p, edit) for p in parts))
        return torch.cat(states).float(), torch.cat(logits).float()


def share_of(first: list[bool], declined: list[bool], which: bool) -> dict:
    return mosaic.share([f for f, no in zip(first, declined) if no == which])


def cell(bench: Real, allow: list[str]) -> dict:
    """Choice, adapters and figures: untouched, each domain alone, all of them."""
    depth = len(bench.layers)
    tried = range(depth // 4, 3 * depth // 4, 2)
    choice, updates = {}, {}
    for domain in allow:
        found = palette.candidates(bench, domain)
        found = {place: pair for place, pair in found.items() if place[1] in tried}
        scores = palette.objectives(bench, domain, found)
        front = palette.pareto(scores)
        best = palette.choose(front)
        choice[domain] = {"best": best, "pareto": front, "of": len(scores)}
        print(domain, json.dumps(best), flush=True)
        unit, _ = found[best["source"], best["layer"], best["position"]]
        updates[domain] = palette.palette_lora(bench, domain, best["layer"], unit)
    rows, before = [], palette.measure(bench, {})
    sets = [[domain] for domain in allow] + [allow] * (len(allow) > 1)
    for allowed in sets:
        update = palette.summed([updates[domain] for domain in allowed])
        row = palette.measure(bench, update, allowed, before)
        rows.append({"method": "Palette"} | row)
        print(json.dumps({k: v for k, v in row.items() if k != "declined"}), flush=True)
    return {"choice": {"Palette": choice}, "rows": rows,
            "untouched": {"method": "untouched"} | before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="", help="folder, GGUF file or hub name; empty: embedded")
    add("--bf16", action="store_true")
    add("--allow", nargs="+", default=["horror"], help="the domains to be allowed")
    add("--most", type=int, default=0, help="requests of a kind and split; 0: all")
    add("--seed", type=int, default=0)
    add("--json", default="runs/palette_real.json")
    args = parser.parse_args()
    began = time.time()
    torch.backends.cuda.enable_cudnn_sdp(False)  # NaN: see mosaic.padded_logits
    bench = Real(args)
    print(json.dumps({"declined": bench.counts, "first": bench.first}), flush=True)
    if missing := [name for name in args.allow if name not in bench.domains]:
        parser.error(f"too few refusals of {missing[0]}: {bench.counts}")
    result = cell(bench, args.allow)
    result |= {
        "command": "python tests/benchmarks/palette_real.py " + " ".join(sys.argv[1:]),
        "model": bench.name, "hardware": hardware(), "torch": torch.__version__,
        "settings": asdict(bench.settings), "declined": bench.counts,
        "first_token": bench.first, "seconds": round(time.time() - began)}
    Path(args.json).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(args.json), json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
