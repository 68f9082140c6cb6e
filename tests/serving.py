"""Helpers of the tests that talk to the running Serve application (fixtures: conftest.py)."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from ray import serve

from orthrus.engine import Engine
from orthrus.requests.request import SamplingParams

MODEL = "orthrus-tiny"
PROMPT = "def add(a, b):\n    "


def http(url: str, body: bytes | None = None) -> tuple[int, Any]:
    """Status and JSON of a GET, or of a POST where there is a body."""
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def plain(ar: Engine, prompt: str, params: SamplingParams) -> str:
    [[completion]] = ar.generate([ar.tokenizer.encode(prompt)], params)
    return str(ar.tokenizer.decode(completion.token_ids, skip_special_tokens=True))


def wait_until_busy() -> None:
    wait_for(lambda stats: stats["running"] > 0)


def wait_until_free() -> None:
    wait_for(lambda stats: not stats["running"] and not stats["waiting"] and not stats["kv_pages_used"])


def wait_for(condition: Callable[[dict[str, int]], bool]) -> None:
    """Poll the replica's own counters until they are as they should be."""
    handle = serve.get_deployment_handle("OrthrusReplica", "orthrus")
    deadline = time.monotonic() + 20
    while not condition(stats := handle.stats.remote().result()):
        assert time.monotonic() < deadline, stats
        time.sleep(0.02)
