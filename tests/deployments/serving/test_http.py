"""HTTP manners and other servers' fields, through a running server."""

import http.client
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from orthrus.deployments.ingress.docs import BODIES
from orthrus.deployments.proto import orthrus_pb2 as pb
from orthrus.requests.request import SamplingParams

if TYPE_CHECKING:
    from orthrus.deployments.proto.orthrus_pb2_grpc import OrthrusStub
    from orthrus.engine import Engine

MODEL = "orthrus-tiny"
PROMPT = "def parse(self, line):\n"


def ask(
    url: str, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    if body is not None:
        headers["Content-Type"] = "application/json"
    try:
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def complete(url: str, path: str = "/v1/completions", **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, **fields}
    status, _, raw = ask(url, "POST", path, body)
    assert status == 200, raw
    return dict(json.loads(raw))


def test_methods_and_paths(url: str) -> None:
    status, headers, raw = ask(url, "GET", "/v1/chat/completions")
    assert (status, headers["allow"]) == (405, "POST") and "use POST" in json.loads(raw)["error"]["message"]
    assert complete(url, "/v1/completions/")["choices"]
    for path in ("/v1/models", "/v1/models/", "/health", "/version", "/ping", "/docs", "/openapi.json"):
        status, _, raw = ask(url, "HEAD", path)
        assert (status, raw) == (200, b""), path
        # The connection behind the proxy stays of use.
        assert ask(url, "GET", path)[0] == 200, path
    status, _, raw = ask(url, "GET", "/openapi.json")
    posts = {path for path, operations in json.loads(raw)["paths"].items() if "post" in operations}
    assert posts == {*BODIES, "/ping"}
    status, headers, raw = ask(url, "OPTIONS", "/v1/completions", Origin="https://x.example")
    assert (status, headers["allow"]) == (204, "POST") and "access-control-allow-origin" not in headers


def test_bad_words_and_allowed_tokens_reach_the_engine(url: str, ar: "Engine") -> None:
    prompt = ar.tokenizer.encode(PROMPT)
    [[free]] = ar.generate([prompt], SamplingParams(temperature=0.0, max_tokens=12))
    word = ar.tokenizer.decode(free.token_ids[:6]).split()[0]
    params = SamplingParams(temperature=0.0, max_tokens=12, bad_words=(word,))
    [[expected]] = ar.generate([prompt], params)
    answer = complete(url, bad_words=[word], return_token_ids=True, priority=-3, cache_salt="mine")
    [choice] = answer["choices"]
    assert tuple(choice["token_ids"]) == expected.token_ids != free.token_ids
    assert choice["prompt_token_ids"] == prompt
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0
    only = complete(url, allowed_token_ids=[40, 41], return_token_ids=True)["choices"][0]["token_ids"]
    assert set(only) <= {40, 41}


def test_requests_with_different_salts_share_no_prefix(url: str) -> None:
    prompt = list(range(100, 200))
    cached = [
        complete(url, prompt=prompt, cache_salt=salt)["usage"]["prompt_tokens_details"]["cached_tokens"]
        for salt in ("one", "one", "two")
    ]
    assert cached[0] == cached[2] == 0 < cached[1]


def test_prompts_are_truncated(url: str) -> None:
    answer = complete(url, prompt=list(range(100, 150)), truncate_prompt_tokens=7, return_token_ids=True)
    assert answer["choices"][0]["prompt_token_ids"] == list(range(143, 150))


def test_constraints(url: str, stub: "OrthrusStub") -> None:
    wanted = {"choice": ["alpha", "beta"]}
    text = complete(url, structured_outputs=wanted, max_tokens=40)["choices"][0]["text"]
    assert text in wanted["choice"]
    answer = stub.Generate(
        pb.GenerateRequest(
            model=MODEL,
            prompt=PROMPT,
            sampling=pb.SamplingParams(temperature=0, max_tokens=40),
            structured_outputs=pb.StructuredOutputs(choice=pb.Choices(values=wanted["choice"])),
            return_token_ids=True,
        )
    )
    assert answer.choices[0].text == text and answer.choices[0].prompt_token_ids
    status, _, raw = ask(url, "POST", "/v1/completions", {"model": MODEL, "prompt": "x", "guided_regex": "("})
    assert (status, json.loads(raw)["error"]["param"]) == (400, "guided_regex")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"messages": [{"role": "user", "content": "x " * 5000}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ],
)
def test_errors_name_the_field_that_was_sent(url: str, fields: dict[str, Any], param: str) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "x"}],
        "max_completion_tokens": 2,
        **fields,
    }
    status, _, raw = ask(url, "POST", "/v1/chat/completions", body)
    assert (status, json.loads(raw)["error"]["param"]) == (400, param)
