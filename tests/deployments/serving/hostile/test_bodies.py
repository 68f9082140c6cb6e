"""JSON bodies: what is no request, what cannot be served, and what is odd but right."""

import json
import urllib.error
import urllib.request

import pytest

from tests.deployments.serving.hostile.bodies import chat, completion, nested, schema, with_raw
from tests.serving import http

CONTEXT = 2048
DEEP_SCHEMA = json.loads('{"properties": {"a": ' * 80 + "{}" + "}}" * 80)

NO_REQUEST = {
    "empty": b"",
    "cut": completion()[:-1],
    "two": completion() * 2,
    "more after it": completion() + b"\x00",
    "not utf-8": b'{"model": "\xff"}',
    "utf-16": completion().decode().encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + completion(),
    "raw control character": b'{"model": "a\nb"}',
    "lone surrogate": b'{"model": "orthrus-tiny", "prompt": "\\ud800", "messages": "\\ud800"}',
    "surrogates the wrong way round": b'{"model": "\\ude00\\ud83d"}',
    "single quotes": b"{'model': 1}",
    "array": b"[]",
    "null": b"null",
    "number": b"1e5",
    "deep arrays": nested(100_000).encode(),
    "deep objects": nested(100_000, '{"a":', "}").encode(),
    "deep arrays in a field": with_raw(f'"metadata": {{"a": {nested(100_000)}}}'),
    "integer of 5000 digits": with_raw(f'"top_k": {"9" * 5000}'),
    "string without end": b'"' + b"a" * 3_000_000,
}


@pytest.mark.parametrize("case", NO_REQUEST, ids=str)
def test_what_is_no_request_is_refused(url: str, case: str) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        status, answer = http(url + path, NO_REQUEST[case])
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error"), path


# The body, the field that the error names, and a status other than 400.
REFUSED: dict[str, tuple[bytes, str | None, int]] = {
    "nan": (with_raw('"temperature": NaN'), "temperature", 400),
    "infinity": (with_raw('"top_p": Infinity'), "top_p", 400),
    "overflow": (with_raw('"presence_penalty": -1e999'), "presence_penalty", 400),
    "nan in a map": (with_raw('"logit_bias": {"1": NaN}'), "logit_bias", 400),
    "penalty that overflows": (completion(repetition_penalty=1e-300), "repetition_penalty", 400),
    "true for a number": (completion(max_tokens=True), "max_tokens", 400),
    "float for an integer": (completion(n=1.0), "n", 400),
    "number for text": (completion(prompt=5), "prompt", 400),
    "too many choices": (completion(n=10**30), "n", 400),
    "too many alternatives": (completion(logprobs=10**30), "logprobs", 400),
    "fewer than no tokens": (completion(max_tokens=-(10**30)), "max_tokens", 400),
    "seed of 100 bits": (completion(seed=10**30), "seed", 400),
    "token id of 100 bits": (completion(prompt=[10**30]), "prompt", 400),
    "a page of token ids of 100 bits": (completion(prompt=[10**30] * 40), "prompt", 400),
    "negative token id": (completion(prompt=[-1]), "prompt", 400),
    "ids and text": (completion(prompt=[1, "a"]), "prompt[0]", 400),
    "lists in lists in lists": (completion(prompt=[[[1]]]), "prompt[0][0]", 400),
    "empty prompt": (completion(prompt=""), "prompt", 400),
    "empty prompt among others": (completion(prompt=["a", ""]), "prompt", 400),
    "no token ids": (completion(prompt=[[]]), "prompt", 400),
    "too many prompts": (completion(prompt=["a"] * 2000), "prompt", 400),
    "a token over the context": (completion(prompt=[1] * CONTEXT), "prompt", 400),
    "bias of no token": (completion(logit_bias={"-1": 1}), "logit_bias", 400),
    "bias of a token of 5000 digits": (completion(logit_bias={"9" * 5000: 1}), "logit_bias", 400),
    "bias without bounds": (completion(logit_bias={"1": 1e30}), "logit_bias", 400),
    "empty stop string": (completion(stop=["a", ""]), "stop", 400),
    "too many stop strings": (completion(stop=["a"] * 2000), "stop", 400),
    "stop strings too long": (completion(stop=["a" * 70_000]), "stop", 400),
    "field with a line break": (completion(**{"a\r\nb": 1}), "a\r\nb", 400),
    "model of 100,000 letters": (completion(model="😀" * 100_000), "model", 404),
    "model with a null": (completion(model="a\x00b"), "model", 404),
    "no messages": (chat(messages=[]), "messages", 400),
    "unknown role": (chat(messages=[{"role": "king", "content": "x"}]), "messages[0].role", 400),
    "picture": (chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "messages[0].content[0].type", 400),
    "template's own names": (chat(chat_template_kwargs={"messages": []}), "chat_template_kwargs", 400),
    "another template": (chat(chat_template_kwargs={"chat_template": "x"}), "chat_template_kwargs", 400),
    "tool name with a quote": (chat(tools=[{"type": "function", "function": {"name": 'a"'}}]), "tools[0].function.name", 400),
    "pattern that looks ahead": (schema({"type": "string", "pattern": "(?=a)"}), "response_format", 400),
    "schema elsewhere": (schema({"$ref": "file:///etc/passwd"}), "response_format", 400),
    "schema too deep": (schema(DEEP_SCHEMA), "response_format", 400),
    "options that are none": (schema({"x-guidance": 5}), "response_format", 400),
    "body over 4 MiB": (completion(prompt="x" * (5 << 20)), None, 413),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_cannot_be_served_is_refused_by_name(url: str, case: str) -> None:
    body, param, status = REFUSED[case]
    path = "/v1/chat/completions" if b'"messages"' in body else "/v1/completions"
    for sent in (body, body[:-1] + b', "stream": true}'):
        got, answer = http(url + path, sent)
        assert (got, answer["error"]["param"]) == (status, param), answer
        assert 0 < len(answer["error"]["message"]) < 600


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_turns_out_to_be_impossible_is_the_clients_fault(url: str, stream: bool) -> None:
    """This one is itself, so no value is valid under it."""
    body = schema({"$ref": "#"}, max_tokens=50, stream=stream)
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            events = answer.read().decode().split("\n\n")
    except urllib.error.HTTPError as error:
        events = [f"data: {error.read().decode()}", "data: [DONE]", ""]
    assert events[-2:] == ["data: [DONE]", ""]
    told = json.loads(events[-3].removeprefix("data: "))["error"]
    assert (told["type"], told["param"]) == ("invalid_request_error", "response_format")


def test_odd_but_right_requests_are_answered(url: str) -> None:
    vocabulary = {str(token): -100 for token in range(8192)}
    for body in (
        with_raw('"temperature": -0.0'),
        with_raw(
            '"model": "gpt-9", "model": "orthrus-tiny"'
        ),  # As JSON parsers have it, the last one counts.
        with_raw('"temperature": 1, "top_p": 1e-300, "min_p": 1.0, "top_k": 1'),
        with_raw('"top_k": 99999999999999999999999999'),
        with_raw('"max_tokens": 99999999999999999999999, "stop": ["e", "a"]'),
        with_raw('"seed": -9223372036854775808'),
        completion(logit_bias=vocabulary),
        completion(stop=[f"{i}{'x' * 50}" for i in range(1000)]),
        completion(stop_token_ids=[-1, 10**30]),
        completion(metadata=json.loads(f'{{"a": {nested(100)}}}')),
        completion(prompt=[8191]),  # A reserved token.
        completion(n=128, max_tokens=1),
        chat(messages=[{"role": "user", "content": None}]),
        chat(messages=[{"role": "assistant", "content": "x", "extra": json.loads(nested(100))}]),
        chat(chat_template_kwargs={"raise_exception": 1, "range": 2, "namespace": 3}),
        schema({"title": '\n start: "x"\n%json {', "type": "boolean"}, max_tokens=20),
    ):
        status, answer = http(
            url + ("/v1/chat/completions" if b'"messages"' in body else "/v1/completions"), body
        )
        assert status == 200, (body[:200], answer)
        assert answer["choices"]
