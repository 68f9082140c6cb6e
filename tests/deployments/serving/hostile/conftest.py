"""Clients that send wrong or odd requests must get the right answer or error, and the streams of others must go on.

All tests of this folder run beside two clients that stream. The texts of those must stay those of plain decoding.
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from orthrus.engine import Engine
from orthrus.requests.request import SamplingParams
from tests.serving import MODEL, PROMPT, plain, wait_until_free


@pytest.fixture(scope="package", autouse=True)
def bystanders(client: openai.OpenAI, ar: Engine, serve_logs: Path) -> Iterator[None]:
    """Two clients that stream the same answer over and over.

    At the end, no page is in use, and ingress and replica have logged no stack trace. A client that can cause stack traces has
    found a bug, or a way to fill the disk.
    """
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 100, "temperature": 0}
    expected = plain(ar, PROMPT, SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True))
    over = threading.Event()
    texts: list[str] = []
    errors: list[Exception] = []

    def stream() -> None:
        try:
            while not over.is_set():
                events = client.completions.create(**asked, stream=True, extra_body={"ignore_eos": True})
                texts.append("".join(event.choices[0].text for event in events))
        except Exception as error:
            errors.append(error)

    logged = stacks_in(serve_logs)
    threads = [threading.Thread(target=stream) for _ in range(2)]
    for thread in threads:
        thread.start()
    yield
    over.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(texts) >= len(threads) and set(texts) == {expected}
    wait_until_free()
    assert stacks_in(serve_logs) == logged


def stacks_in(folder: Path) -> int:
    return sum(file.read_text().count("Traceback") for file in folder.iterdir())
