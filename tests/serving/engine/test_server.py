"""`vllm serve` and a client of its HTTP interface, which is OpenAI's."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny_models

from .checkpoints import CONTEXT
from .running import NEW_TOKENS, prompts, reference

START = 200
"""Seconds that a server may take to start."""


@pytest.fixture(scope="module")
def served(
    checkpoint: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    """Start `vllm serve` on a checkpoint, and return its address and the folder."""
    folder = checkpoint("Llama", "mixed, quantized")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [Path(sys.executable).with_name("vllm"), "serve", folder, "--served-model-name", "tiny"]
    options = ["--dtype", "float32", "--max-model-len", str(CONTEXT), "--enforce-eager", "--host", "127.0.0.1"]
    with log.open("wb") as output:
        process = subprocess.Popen([*command, *options, "--port", str(port)], stdout=output, stderr=output)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, process, log)
        yield address, folder
    finally:
        process.terminate()
        process.wait(60)


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
        else:
            return
    raise AssertionError(f"the server did not start: {log.read_text()[-3000:]}")


def post(address: str, path: str, **body: Any) -> bytes:
    data = json.dumps({"model": "tiny", "temperature": 0, "max_tokens": NEW_TOKENS, **body}).encode()
    request = urllib.request.Request(f"{address}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


def test_completions_are_those_of_transformers(served: tuple[str, Path]) -> None:
    address, folder = served
    texts = prompts()
    answer = json.loads(post(address, "/v1/completions", prompt=texts, ignore_eos=True, return_token_ids=True))
    found = [choice["token_ids"] for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]
    assert found == [tokens for tokens, _ in reference(folder, texts)]


def test_a_streamed_completion_is_the_same_text(served: tuple[str, Path]) -> None:
    address, _ = served
    asked: dict[str, Any] = {"prompt": prompts()[0], "ignore_eos": True}
    whole = json.loads(post(address, "/v1/completions", **asked))["choices"][0]["text"]
    lines = post(address, "/v1/completions", stream=True, **asked).decode().splitlines()
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: {")]
    assert whole and "".join(json.loads(event)["choices"][0]["text"] for event in events) == whole


def test_a_chat_uses_the_template_of_the_checkpoint(served: tuple[str, Path]) -> None:
    address, folder = served
    messages = [{"role": "user", "content": "the cat sat"}]
    answer = json.loads(post(address, "/v1/chat/completions", messages=messages, ignore_eos=True))
    prompt = tiny_models.tokenizer().apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    ((tokens, _),) = reference(folder, [prompt])
    text = tiny_models.tokenizer().decode(tokens, skip_special_tokens=True)
    assert answer["choices"][0]["message"]["content"] == text
    assert answer["usage"]["prompt_tokens"] == len(prompt)
