"""The price of a policy on a running OpenAI-compatible server.

    python train_demo.py --tokens runs/demo/tokens.safetensors --export runs/served
    vllm serve runs/served --dtype float32 --max-model-len 256
    python tests/benchmarks/serving.py --model runs/served

64 requests at once without a policy, with one category and with five, in paired rounds;
every answer is cut at the same number of tokens and goes on past its end, so that all
ways decode equally much. Requests a second and the time to the first token: medians of
the rounds, and as ratios to the same round without a policy.
"""

import argparse
import json
import statistics
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CATEGORIES = ["addiction", "alcohol", "betting", "horror", "sex"]
WAYS = {"no policy": [], "one category": ["alcohol"], "five": CATEGORIES}


def ask(flags, prompt, policy):
    """Seconds to the first token and to the end of one streamed answer."""
    body = {
        "model": flags.model,
        "messages": [{"role": "user", "content": prompt}],
        "chat_template_kwargs": {"policy": policy},
        "temperature": 0,
        "max_tokens": flags.tokens,
        "ignore_eos": True,  # known to vLLM
        "stream": True,
    }
    request = urllib.request.Request(
        f"{flags.url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    began, first = time.perf_counter(), None
    with urllib.request.urlopen(request, timeout=600) as lines:
        for line in lines:
            if line.startswith(b"data: {"):
                delta = json.loads(line[6:])["choices"][0]["delta"]
                if first is None and delta.get("content"):
                    first = time.perf_counter() - began
    return first, time.perf_counter() - began


def volley(flags, prompts, policy):
    """(requests a second, median seconds to the first token) of all prompts at once."""
    began = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as at_once:
        found = list(at_once.map(lambda prompt: ask(flags, prompt, policy), prompts))
    rate = len(prompts) / (time.perf_counter() - began)
    return rate, statistics.median(first for first, _ in found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="as the server calls it")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", default="", help="where to write all figures")
    flags = parser.parse_args()
    rows = (ROOT / "data_sample/requests.jsonl").read_text(encoding="utf-8")
    prompts = [json.loads(row)["request"] for row in rows.splitlines()]
    found = {name: [] for name in WAYS}
    for turn in range(flags.rounds + 1):  # the first warms up
        for name, policy in WAYS.items():
            # Other prompts each time: a server may keep the states of a prefix.
            start = (turn * len(WAYS) + list(WAYS).index(name)) * flags.requests
            asked = [prompts[(start + i) % 1000] for i in range(flags.requests)]
            if turn:
                found[name].append(volley(flags, asked, policy))
            else:
                volley(flags, asked, policy)
    table = {}
    print("| policy | requests/s | ratio | first token, ms | ratio |")
    print("|---|---|---|---|---|")
    for name, rounds in found.items():
        pairs = list(zip(rounds, found["no policy"]))
        row = table[name] = {
            "requests_per_second": statistics.median(rate for rate, _ in rounds),
            "rate_ratio": statistics.median(a[0] / b[0] for a, b in pairs),
            "first_token_ms": 1000 * statistics.median(first for _, first in rounds),
            "first_token_ratio": statistics.median(a[1] / b[1] for a, b in pairs),
        }
        print(
            f"| {name} | {row['requests_per_second']:.1f} | {row['rate_ratio']:.2f} "
            f"| {row['first_token_ms']:.0f} | {row['first_token_ratio']:.2f} |"
        )
    if flags.json:
        Path(flags.json).write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
