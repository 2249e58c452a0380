"""Existing servers, unmodified, serve an exported checkpoint, a policy per request.

Each runs where its packages are installed: `transformers serve` (fastapi, uvicorn,
openai and accelerate) in this environment, `vllm` in any whose folder of commands is on
the PATH.
"""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import CATEGORIES, README, read

import mosaic
from mosaic import ControlTokens, TrainConfig

CURL = re.search(r"^curl .*?}'$", README, re.S | re.M)[0]  # README's request
POLICIES = [
    [],
    ["alcohol"],
    ["betting"],
    ["horror", "alcohol"],
    ["sex", "addiction"],
    ["betting", "horror", "sex"],
    CATEGORIES[1:],
    CATEGORIES,
]


@pytest.fixture(scope="module")
def served(backbone, tokenizer, requests, tmp_path_factory):
    """(folder of the exported backbone, 40 jobs, mosaic.generate's answers to them).

    The last job is the README's.
    """
    torch.manual_seed(0)
    tokens = ControlTokens.for_model(
        backbone, tokenizer, CATEGORIES, requests=requests, place="before"
    )
    config = TrainConfig(epochs=1, positives_per_subset=30, later_turns=0)
    mosaic.train(backbone, tokenizer, tokens, requests, config)
    folder = tmp_path_factory.mktemp("served") / "backbone"
    mosaic.export_checkpoint(backbone, tokenizer, tokens, folder)
    asked = [row["request"] for row in read("requests")[::83]]
    jobs = [(prompt, POLICIES[i % 8]) for i, prompt in enumerate(asked)]
    asked = json.loads(re.search(r"-d '(.*)'$", CURL, re.S)[1])
    policy = asked["chat_template_kwargs"]["policy"]
    jobs[-1] = asked["messages"][0]["content"], policy
    ours = mosaic.generate(backbone, tokenizer, tokens, *zip(*jobs), 40)
    assert len(jobs) == 40 and 5 < sum(map(mosaic.is_refusal, ours)) < 35
    return folder, jobs, ours


def vllm():
    command = shutil.which("vllm")
    if not command:
        pytest.skip("no vllm on the PATH")
    flags = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    return [command, "serve", "{folder}", *flags, "--port", "{port}"]


def transformers_serve():
    for name in ("fastapi", "uvicorn", "openai", "accelerate"):
        if not importlib.util.find_spec(name):
            pytest.skip(f"{name} is not installed")
    start = "from transformers.cli.transformers import main; main()"
    flags = ["--dtype", "float32", "--device", "cpu", "--port", "{port}"]
    return [sys.executable, "-c", start, "serve", "{folder}", *flags]


@pytest.mark.slow
@pytest.mark.parametrize("server", [vllm, transformers_serve])
def test_a_server_answers_each_request_under_its_policy_as_generate_does(
    server, request, tmp_path
):
    command = server()  # or the test is skipped
    folder, jobs, ours = request.getfixturevalue("served")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [word.format(folder=folder, port=port) for word in command]
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_TARGET_DEVICE": "cpu",
    }
    quiet |= {"NO_PROXY": "127.0.0.1"}
    with open(tmp_path / "log", "w") as log:
        running = subprocess.Popen(
            command, env=os.environ | quiet, stdout=log, stderr=log, cwd=tmp_path
        )
    try:
        wait_for(port, running, tmp_path / "log")
        with ThreadPoolExecutor(len(jobs)) as at_once:
            theirs = list(at_once.map(lambda job: ask(port, folder, *job), jobs))
        curl = CURL.replace(":8000", f":{port}").replace("runs/served", str(folder))
        said = subprocess.check_output(["bash", "-c", f"{curl} --no-progress-meter"])
    finally:
        running.terminate()
        running.wait(60)
    assert theirs == ours
    said = json.loads(said)["choices"][0]["message"]["content"]
    assert said.strip().startswith(ours[-1])  # there is no max_tokens


def wait_for(port, running, log):
    for _ in range(180):
        assert running.poll() is None, Path(log).read_text()[-2000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(Path(log).read_text()[-2000:])


def ask(port, folder, prompt, policy):
    body = {
        "model": str(folder),
        "messages": [{"role": "user", "content": prompt}],
        "chat_template_kwargs": {"policy": policy},
        "temperature": 0,
        "max_tokens": 40,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)["choices"][0]["message"]["content"].strip()
