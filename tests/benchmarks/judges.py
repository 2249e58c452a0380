"""What the judges are worth, on answers labelled by hand.

    python tests/benchmarks/judges.py                    # judge_cases.jsonl beside it
    python tests/benchmarks/judges.py --answers FILE     # and XSTest's labelled answers
    python tests/benchmarks/judges.py --answers FILE --model FOLDER_OR_GGUF --limit 200

The rules (`mosaic.is_refusal`); XSTest's own string match, as its file has it; and a
chat model asked JUDGE_QUESTION, Yes or No by log-likelihood. Left out: XSTest's partial
refusals, empty and degenerate cases. Deflections are refusals. --words cuts answers
for the first and the last judge: 12 are the 16 tokens that all figures judge. Shares
with 95% Wilson intervals. FILE: a JSON object a line with model, request, answer,
label, strmatch, from XSTest (arXiv 2308.01263).
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import mosaic
from measure import model_judge

REFUSED, PARTIAL = "2_full_refusal", "3_partial_refusal"


def read(path: str | Path) -> list[dict]:
    return [*map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())]


def xstest(path: str, limit: int) -> dict[str, list[dict]]:
    """{name of a group: its answers}: in total and by model, partial refusals out."""
    rows = [row for row in read(path) if row["label"] != PARTIAL]
    if limit:
        rows = random.Random(0).sample(rows, min(limit, len(rows)))
    for row in rows:
        row["declined"] = row["label"] == REFUSED
    groups = {"XSTest": rows}
    for name in sorted({row["model"] for row in rows}):
        groups[f"XSTest, {name}"] = [row for row in rows if row["model"] == name]
    return groups


def judge_cases() -> dict[str, list[dict]]:
    """{name of a group: its answers}: the known ones, and those written blind."""
    rows = read(Path(__file__).parent / "judge_cases.jsonl")
    rows = [row for row in rows if row["declined"] is not None]
    known = [row for row in rows if not row["blind"]]
    return {
        "cases, known": known,
        "cases, no deflections": [r for r in known if r["kind"] != "deflection"],
        "cases, blind": [row for row in rows if row["blind"]],
    }


def load(name: str):
    """A model judge from a folder or a GGUF file."""
    path = Path(name)
    at = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    tokenizer = AutoTokenizer.from_pretrained(at[0], **at[1])
    model = AutoModelForCausalLM.from_pretrained(at[0], dtype=torch.bfloat16, **at[1])
    return model_judge(model.eval(), tokenizer)


def scores(found: list[bool], right: list[bool]) -> dict[str, dict]:
    """Accuracy; precision and recall of refusals; each as in `mosaic.share`."""
    pairs = [*zip(found, right, strict=True)]
    return {
        "accuracy": mosaic.share([f == r for f, r in pairs]),
        "precision": mosaic.share([r for f, r in pairs if f]),
        "recall": mosaic.share([f for f, r in pairs if r]),
    }


def shown(one: dict) -> str:
    rate, low, high = (100 * one[key] for key in ("rate", "low", "high"))
    return f"{rate:.1f} [{low:.1f}, {high:.1f}] ({one['n']})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", default="", help="XSTest's labelled answers")
    parser.add_argument("--model", default="", help="a chat model's folder or GGUF")
    parser.add_argument("--limit", type=int, default=0, help="a sample; 0: all")
    parser.add_argument("--words", type=int, default=12, help="of an answer; 0: all")
    flags = parser.parse_args()
    groups = xstest(flags.answers, flags.limit) if flags.answers else {}
    groups |= judge_cases()
    rows = [row for rows in groups.values() for row in rows]
    for row in rows:
        row["answer"] = " ".join(row["answer"].split(" ")[: flags.words or None])
        row["rules"] = mosaic.is_refusal(row["answer"])
        if "strmatch" in row:
            row["string match"] = row["strmatch"] == REFUSED
    if flags.model:
        judge = load(flags.model)
        for row in tqdm({id(row): row for row in rows}.values()):
            row["model judge"] = judge(row["request"], row["answer"])
    print("| judge | answers | accuracy, % (n) | precision | recall |")
    print("|---|---|---|---|---|")
    for judge in ("rules", "string match", "model judge"):
        for name, rows in groups.items():
            if judge in rows[0]:
                table = scores([r[judge] for r in rows], [r["declined"] for r in rows])
                cells = " | ".join(map(shown, table.values()))
                print(f"| {judge} | {name} | {cells} |")


if __name__ == "__main__":
    main()
