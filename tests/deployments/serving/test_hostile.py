"""Clients that send anything but what they should: the right answer or the right error, and the streams of others go on.

All of it runs beside two clients that stream, and whose texts must stay those of plain decoding.
"""

import json
import random
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest

from orthrus.deployments.proto import orthrus_pb2 as pb
from orthrus.deployments.proto.orthrus_pb2_grpc import OrthrusStub
from orthrus.engine import Engine
from orthrus.requests.request import SamplingParams
from tests.serving import MODEL, PROMPT, http, plain, wait_until_free

CONTEXT = 2048
TEXTS = [
    "👩‍👩‍👧‍👦🏳️‍🌈👍🏽",  # Characters of several code points.
    "e\u0301 \u1112\u1161\u11ab \ufb01 Ａ",  # In no normal form.
    "مرحبا \u202e evil \u202c עולם",  # Right to left, and an override of it.
    "\x00\x01\x1b[31m\x7f\x85\u2028\ufeff\uffff\U0010ffff",  # Controls, and code points that are no characters.
    "<think></think><tool_call>{{ messages }}{% raw %}",
    "\r\n\t \u3000\u200b" * 50,
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 漢字かな ไทย हिन्दी",
]


@pytest.fixture(scope="module", autouse=True)
def bystanders(client: openai.OpenAI, ar: Engine, serve_logs: Path) -> Iterator[None]:
    """Two clients that stream the same answer over and over.

    When all is over, no page is left in use, and ingress and replica have logged no stack: a client that could make them do
    that has found a bug, or a way to fill the disk.
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


def completion(**fields: Any) -> bytes:
    return json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 2, **fields}).encode()


def chat(**fields: Any) -> bytes:
    messages = [{"role": "user", "content": "x"}]
    return json.dumps({"model": MODEL, "messages": messages, "max_tokens": 2, **fields}).encode()


def with_raw(raw: str) -> bytes:
    """A completion with a field spelled out."""
    return completion(it=0).replace(b'"it": 0', raw.encode())


def schema(given: Any, **fields: Any) -> bytes:
    wanted = {"type": "json_schema", "json_schema": {"schema": given}}
    return chat(response_format=wanted, **fields)


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


DEEP_SCHEMA = json.loads('{"properties": {"a": ' * 80 + "{}" + "}}" * 80)

# --- bodies

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
    "almost greedy": (completion(temperature=1e-30), "temperature", 400),
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


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_any_text_goes_through_unchanged(
    url: str, stub: OrthrusStub, client: openai.OpenAI, text: str
) -> None:
    def post(path: str, **body: Any) -> Any:
        return http(url + path, json.dumps({"model": MODEL, **body}, ensure_ascii=False).encode())[1]

    tokens = post("/tokenize", prompt=text)["tokens"]
    assert post("/detokenize", tokens=tokens)["prompt"] == text
    answer = client.completions.create(
        model=MODEL, prompt=text, max_tokens=8, echo=True, seed=1, stop=["\x00"]
    )
    assert answer.choices[0].text.startswith(text)
    same = stub.Generate(
        pb.GenerateRequest(
            model=MODEL, prompt=text, sampling=pb.SamplingParams(max_tokens=8, seed=1, stop=["\x00"])
        )
    )
    assert text + same.choices[0].text == answer.choices[0].text
    chatted = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": text, "name": text}], max_tokens=2
    )
    assert chatted.usage is not None and chatted.usage.prompt_tokens >= len(tokens)


def test_prompts_of_one_token_and_of_the_whole_context(client: openai.OpenAI, ar: Engine) -> None:
    rng = random.Random(0)
    full = [rng.randrange(8000) for _ in range(CONTEXT - 1)]
    for prompt in ([17], full[:-2], full):
        room = min(20, CONTEXT - len(prompt))
        [[expected]] = ar.generate(
            [prompt], SamplingParams(temperature=0.0, max_tokens=room, ignore_eos=True)
        )
        answer = client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=20, temperature=0, extra_body={"ignore_eos": True}
        )
        assert answer.choices[0].text == ar.tokenizer.decode(expected.token_ids, skip_special_tokens=True)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None and answer.usage.completion_tokens == room


def test_a_thousand_stop_strings_find_the_first(client: openai.OpenAI, ar: Engine) -> None:
    whole = plain(ar, PROMPT, SamplingParams(temperature=0.0, max_tokens=60))
    wanted = whole[30:33]
    stop = [f"\u2603{i}" for i in range(999)]
    stop.insert(500, wanted)
    asked: dict[str, Any] = {
        "model": MODEL,
        "prompt": PROMPT,
        "max_tokens": 60,
        "temperature": 0,
        "stop": stop,
    }
    assert client.completions.create(**asked).choices[0].text == whole[: whole.index(wanted)]
    events = client.completions.create(**asked, stream=True)
    assert "".join(event.choices[0].text for event in events) == whole[: whole.index(wanted)]


# --- HTTP itself


def exchange(port: int, sent: bytes, seconds: float = 30) -> bytes:
    """What comes back for raw bytes until the server closes or has sent a whole answer."""
    got = b""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        try:
            connection.sendall(sent)
            while not _whole(got) and (more := connection.recv(1 << 16)):
                got += more
        except ConnectionError:
            pass
    return got


def _whole(answer: bytes) -> bool:
    head, found, body = answer.partition(b"\r\n\r\n")
    length = head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]
    return bool(found and length) and len(body) >= int(length)


def post(path: str = "/v1/completions", body: bytes | None = None, *headers: str) -> bytes:
    content = completion() if body is None else body
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(content)}", *headers]
    if not any(line.lower().startswith("content-type") for line in headers):
        lines.append("Content-Type: application/json")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + content


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
RAW: dict[str, tuple[bytes, bytes]] = {
    "text": (post("/v1/completions", None, "Content-Type: text/plain"), b" 415 "),
    "form": (post("/v1/completions", None, "Content-Type: application/x-www-form-urlencoded"), b" 415 "),
    "no type": (post("/v1/completions", None, "Content-Type:"), b" 415 "),
    "type with a charset": (
        post("/v1/completions", None, "Content-Type: Application/JSON; charset=x"),
        b" 200 ",
    ),
    "compressed": (post("/v1/completions", None, "Content-Encoding: gzip"), b" 415 "),
    "not compressed": (post("/v1/completions", None, "Content-Encoding: identity"), b" 200 "),
    "no body": (HEAD + b"\r\n", b" 400 "),
    "empty path": (post("/v1/nothing"), b" 404 "),
    "path upwards": (post("/v1/../../completions"), b" 404 "),
    "model upwards": (b"GET /v1/models/%2e%2e%2f%00%ff HTTP/1.1\r\nHost: x\r\n\r\n", b" 404 "),
    "wrong method": (b"DELETE /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n", b" 405 "),
    "websocket": (
        b"GET /v1/completions HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
        b" 403 ",
    ),
    "two lengths": (HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}", b" 400 "),
    "smuggled request": (
        HEAD + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
        b" 400 ",
    ),
    "negative length": (HEAD + b"Content-Length: -1\r\n\r\n", b" 400 "),
    "bad chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n", b" 400 "),
    "header with a null": (post("/v1/completions", None, "X-Request-Id: a\x00b"), b" 400 "),
    "header of 1 MB": (post("/v1/completions", None, f"X-Long: {'a' * 1_000_000}"), b""),
    "request id with spaces": (post("/v1/completions", None, "X-Request-Id: a INFO b"), b" 400 "),
    "request id not utf-8": (post("/v1/completions", None, "X-Request-Id: \xff"), b" 500 "),
    "tls": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b" 400 "),
    "http/1.0": (post().replace(b"HTTP/1.1", b"HTTP/1.0"), b" 200 "),
}


@pytest.mark.parametrize("case", RAW, ids=str)
def test_http_oddities(ports: tuple[int, int], case: str) -> None:
    sent, status = RAW[case]
    assert status in exchange(ports[0], sent).split(b"\r\n")[0]


def test_a_connection_is_good_for_the_next_request_after_a_refusal(ports: tuple[int, int]) -> None:
    refused = post("/v1/completions", completion(prompt="x" * 1_000_000), "Content-Type: text/plain")
    with socket.create_connection(("127.0.0.1", ports[0]), timeout=30) as connection:
        connection.sendall(refused)
        got = b""
        while not _whole(got):
            got += connection.recv(1 << 16)
        assert b" 415 " in got.split(b"\r\n")[0]
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        got = b""
        while more := connection.recv(1 << 16):
            got += more
    assert b" 200 " in got.split(b"\r\n")[0]


def test_a_body_without_end_is_cut_off(ports: tuple[int, int]) -> None:
    """A client that never stops sending is told so as soon as it has sent too much."""
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with socket.create_connection(("127.0.0.1", ports[0]), timeout=30) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        got = b""

        def listen() -> None:
            nonlocal got
            while not _whole(got) and (more := connection.recv(1 << 16)):
                got += more

        listener = threading.Thread(target=listen)
        listener.start()
        sent = 0
        while listener.is_alive():
            assert sent < 1 << 30, "nobody stops it"
            connection.sendall(chunk)
            sent += 0x10000
        listener.join()
    assert b" 413 " in got.split(b"\r\n")[0]


def test_slow_clients_hold_nothing_up_and_are_let_go(ports: tuple[int, int], url: str) -> None:
    """Half a header, half a body, a whole request whose answer nobody reads: 300 of them, and the service answers."""
    half_body = HEAD + b"Content-Length: 1000\r\n\r\n{"
    unread = post(body=completion(max_tokens=400, ignore_eos=True, stream=True, temperature=0))
    with ExitStack() as stack:
        connections = []
        for sent in (HEAD, half_body, unread):
            for _ in range(100 if sent is not unread else 4):
                connection = stack.enter_context(
                    socket.create_connection(("127.0.0.1", ports[0]), timeout=30)
                )
                connection.sendall(sent)
                connections.append(connection)
        assert http(url + "/v1/completions", completion())[0] == 200
        slow = connections[150]
        got = b""
        while not _whole(got):
            got += slow.recv(1 << 16)
        assert b" 408 " in got.split(b"\r\n")[0] and b"did not come within" in got
        assert http(url + "/v1/completions", completion())[0] == 200


def test_clients_that_leave_while_they_send_are_no_errors(ports: tuple[int, int], url: str) -> None:
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", ports[0]), timeout=30) as connection:
            connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
    assert http(url + "/v1/completions", completion())[0] == 200


# --- gRPC


def generate(**fields: Any) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(**{"max_tokens": 2, **fields.pop("sampling", {})})
    return pb.GenerateRequest(**{"model": MODEL, "prompt": "x", **fields}, sampling=sampling)


MESSAGES = [pb.ChatMessage(role="user", content="x")]
REFUSED_CALLS: dict[str, tuple[Any, grpc.StatusCode]] = {
    "nan": (generate(sampling={"temperature": float("nan")}), grpc.StatusCode.INVALID_ARGUMENT),
    "infinity": (generate(sampling={"top_p": float("inf")}), grpc.StatusCode.INVALID_ARGUMENT),
    "top_k": (generate(sampling={"top_k": -(2**63)}), grpc.StatusCode.INVALID_ARGUMENT),
    "n": (generate(sampling={"n": 2**62}), grpc.StatusCode.INVALID_ARGUMENT),
    "bias": (generate(sampling={"logit_bias": {-1: 1.0}}), grpc.StatusCode.INVALID_ARGUMENT),
    "stop": (generate(sampling={"stop": [""]}), grpc.StatusCode.INVALID_ARGUMENT),
    "token id": (
        pb.GenerateRequest(model=MODEL, prompt_token_ids=pb.TokenIds(ids=[2**62])), grpc.StatusCode.INVALID_ARGUMENT
    ),
    "no prompt": (pb.GenerateRequest(model=MODEL), grpc.StatusCode.INVALID_ARGUMENT),
    "nothing": (pb.GenerateRequest(), grpc.StatusCode.NOT_FOUND),
    "model of 100,000 letters": (generate(model="😀" * 100_000), grpc.StatusCode.NOT_FOUND),
    "model with a null": (generate(model="a\x00\r\nb"), grpc.StatusCode.NOT_FOUND),
    "5 MiB": (generate(prompt="x" * (5 << 20)), grpc.StatusCode.INVALID_ARGUMENT),
    "10 MiB": (generate(prompt="x" * (10 << 20)), grpc.StatusCode.RESOURCE_EXHAUSTED),
    "deep JSON": (
        pb.ChatRequest(model=MODEL, messages=MESSAGES, json_schema=nested(10**5)), grpc.StatusCode.INVALID_ARGUMENT
    ),
    "JSON that is none": (
        pb.ChatRequest(model=MODEL, messages=MESSAGES, json_schema="{'a'}"), grpc.StatusCode.INVALID_ARGUMENT
    ),
    "no object": (
        pb.ChatRequest(model=MODEL, messages=MESSAGES, json_schema="5"), grpc.StatusCode.INVALID_ARGUMENT
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_CALLS, ids=str)
def test_calls_that_cannot_be_served_have_the_right_status(stub: OrthrusStub, case: str) -> None:
    request, code = REFUSED_CALLS[case]
    chatting = isinstance(request, pb.ChatRequest)
    unary, stream = (stub.Chat, stub.ChatStream) if chatting else (stub.Generate, stub.GenerateStream)
    for call in (unary, lambda r: list(stream(r))):
        with pytest.raises(grpc.RpcError) as caught:
            call(request)
        assert caught.value.code() is code, caught.value.details()
        assert caught.value.details()


def test_bytes_that_are_no_message(ports: tuple[int, int]) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{ports[1]}") as channel:
        for method in ("Generate", "Chat"):
            call = channel.unary_unary(f"/orthrus.Orthrus/{method}", lambda raw: raw, lambda raw: raw)
            for sent in (b"\xff" * 10, b"\x0a\x02\xff\xfe", b"\x0a\xff\xff\xff\xff\x0f"):
                with pytest.raises(grpc.RpcError) as caught:
                    call(sent, timeout=30)
                # gRPC itself says so, before anything of ours sees them.
                assert caught.value.code() is grpc.StatusCode.UNKNOWN
                assert "Error parsing message" in (caught.value.details() or "")
        for method in ("/orthrus.Orthrus/Nothing", "/other.Service/Generate"):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(method, lambda raw: raw, lambda raw: raw)(b"", timeout=30)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_small_message_that_unpacks_to_a_large_one(stub: OrthrusStub) -> None:
    """64 KB on the wire, 64 MB in memory if it were unpacked."""
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(generate(prompt="x" * (64 << 20)), compression=grpc.Compression.Gzip)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    answer = stub.Generate(generate(prompt="x" * 1000), compression=grpc.Compression.Gzip)
    assert answer.choices[0].stats.completion_tokens == 2


@pytest.mark.parametrize(
    ("metadata", "codes"),
    [
        ([("request_id", "a b")], (grpc.StatusCode.INVALID_ARGUMENT,)),
        ([("request_id", "x" * 5000)], (grpc.StatusCode.INVALID_ARGUMENT,)),
        # Refused by gRPC, or by HAProxy, which ends the connection.
        ([("request_id", "x" * 50_000)], (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)),
    ],
)
def test_metadata_that_is_refused(
    stub: OrthrusStub, metadata: Any, codes: tuple[grpc.StatusCode, ...]
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(generate(), metadata=metadata)
    assert caught.value.code() in codes


@pytest.mark.parametrize(
    "metadata",
    [
        [("request_id-bin", b"\x00\xff"), ("request_id", "")],
        [("authorization", "Basic x"), ("multiplexed_model_id", "x"), ("session_id", "y")],
        [("traceparent", "not-one"), ("tracestate", "=,=")],
    ],
)
def test_metadata_that_says_nothing(stub: OrthrusStub, metadata: Any) -> None:
    assert stub.Generate(generate(), metadata=metadata).choices
