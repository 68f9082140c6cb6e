"""A running Serve application over real HTTP and gRPC: the official OpenAI client, the shipped stubs, and bad input."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import grpc
import openai
import pytest
from ray import serve

from deployments.proto import orthrus_pb2 as pb
from deployments.proto import orthrus_pb2_grpc
from orthrus.engine import Engine
from orthrus.request import SamplingParams

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


def test_completion_is_plain_ar_text_in_fewer_passes(client: openai.OpenAI, ar: Engine) -> None:
    expected = plain(ar, PROMPT, SamplingParams(temperature=0.0, max_tokens=64))
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=64, temperature=0)
    assert answer.choices[0].text == expected
    assert answer.usage is not None and answer.usage.prompt_tokens == len(ar.tokenizer.encode(PROMPT))
    extra = answer.choices[0].model_extra
    assert extra is not None and extra["orthrus"]["tokens_per_cycle"] > 1.5
    events = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=64, temperature=0, stream=True)
    parts = [event.choices[0].text for event in events]
    assert "".join(parts) == expected
    assert len(parts) < 64, "a pass's tokens travel as one chunk"


def test_sampled_answers_repeat_with_their_seed(client: openai.OpenAI, ar: Engine) -> None:
    first = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=40, temperature=0.9, top_p=0.95)
    extra = first.choices[0].model_extra
    assert extra is not None
    seed = extra["orthrus"]["seed"]
    params = SamplingParams(temperature=0.9, top_p=0.95, max_tokens=40, seed=seed)
    assert first.choices[0].text == plain(ar, PROMPT, params)


def test_chat_streams_what_it_answers(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "# sort a list of words by length"}],
    }
    whole = client.chat.completions.create(**asked, max_tokens=40, n=2, seed=5, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.content != whole.choices[1].message.content
    assert whole.choices[0].logprobs is not None and whole.choices[0].logprobs.content is not None
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    texts, usage = ["", ""], None
    for event in client.chat.completions.create(
        **asked, max_tokens=40, n=2, seed=5, stream=True, stream_options={"include_usage": True}
    ):
        usage = event.usage or usage
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert usage is not None and whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_many_prompts_and_stop_strings(client: openai.OpenAI) -> None:
    prompts = [PROMPT, "class Stack:\n", "import os\n"]
    together = client.completions.create(model=MODEL, prompt=prompts, max_tokens=24, temperature=0)
    for prompt, choice in zip(prompts, together.choices, strict=True):
        alone = client.completions.create(model=MODEL, prompt=prompt, max_tokens=24, temperature=0).choices[0]
        assert choice.text == alone.text
    streamed = [""] * 3
    for event in client.completions.create(
        model=MODEL, prompt=prompts, max_tokens=24, temperature=0, stream=True
    ):
        streamed[event.choices[0].index] += event.choices[0].text
    assert streamed == [choice.text for choice in together.choices]
    text = together.choices[1].text
    stop = text[len(text) // 2 :][:3]
    stopped = client.completions.create(
        model=MODEL, prompt=prompts[1], max_tokens=24, temperature=0, stop=[stop]
    )
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_grpc_gives_the_same_text(stub: orthrus_pb2_grpc.OrthrusStub, ar: Engine) -> None:
    expected = plain(ar, PROMPT, SamplingParams(temperature=0.0, max_tokens=48))
    request = pb.GenerateRequest(
        model=MODEL, prompt=PROMPT, sampling=pb.SamplingParams(temperature=0, max_tokens=48, logprobs=1)
    )
    [choice] = stub.Generate(request).choices
    assert choice.text == expected
    assert choice.stats.tokens_per_cycle > 1.5 and len(choice.logprobs) == choice.stats.completion_tokens
    chunks = list(stub.GenerateStream(request))
    assert "".join(chunk.text for chunk in chunks) == expected
    assert [c.finish_reason for c in chunks if c.finish_reason] == ["length"]


@pytest.mark.parametrize(
    ("request_", "code", "said"),
    [
        (pb.GenerateRequest(model="gpt-9", prompt="x"), grpc.StatusCode.NOT_FOUND, "gpt-9"),
        (pb.GenerateRequest(model=MODEL), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        (
            pb.GenerateRequest(model=MODEL, prompt="x", sampling=pb.SamplingParams(temperature=-1)),
            grpc.StatusCode.INVALID_ARGUMENT,
            "temperature",
        ),
        (
            pb.GenerateRequest(model=MODEL, prompt="x " * 9000),
            grpc.StatusCode.INVALID_ARGUMENT,
            "context limit",
        ),
    ],
)
def test_grpc_errors_have_a_status_and_say_why(
    stub: orthrus_pb2_grpc.OrthrusStub, request_: pb.GenerateRequest, code: grpc.StatusCode, said: str
) -> None:
    for call in (stub.Generate, lambda r: list(stub.GenerateStream(r))):
        with pytest.raises(grpc.RpcError) as caught:
            call(request_)
        assert caught.value.code() is code
        assert said in (caught.value.details() or "")


BAD: dict[str, tuple[Any, int, str | None]] = {
    "malformed": (b'{"model": ', 400, None),
    "nested": (b"[" * 100_000, 400, None),
    "not utf-8": (b"\xff\xfe", 400, None),
    "no model": (b'{"prompt": "x"}', 400, "model"),
    "unknown model": ({"model": "gpt-9", "prompt": "x"}, 404, "model"),
    "negative temperature": ({"prompt": "x", "temperature": -1}, 400, "temperature"),
    "wrong type": ({"prompt": "x", "temperature": "warm"}, 400, "temperature"),
    "unknown field": ({"prompt": "x", "temprature": 1}, 400, "temprature"),
    "no prompt": ({"prompt": []}, 400, "prompt"),
    "token out of range": ({"prompt": [10**9]}, 400, "prompt"),
    "over the context": ({"prompt": "x " * 9000}, 400, "prompt"),
    "10 MB": ({"prompt": "x" * 10_000_000}, 413, None),
}


@pytest.mark.parametrize("case", BAD, ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_is_told_in_openais_shape(url: str, case: str, stream: bool) -> None:
    body, status, param = BAD[case]
    raw = body if isinstance(body, bytes) else json.dumps({"model": MODEL, "stream": stream, **body}).encode()
    got, answer = http(f"{url}/v1/completions", raw)
    assert got == status
    error = answer["error"]
    assert error["message"] and error["type"] == "invalid_request_error" and error["param"] == param


def test_bad_input_costs_running_streams_nothing(client: openai.OpenAI, url: str, ar: Engine) -> None:
    expected = plain(ar, PROMPT, SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True))
    texts: list[str] = []

    def stream() -> None:
        events = client.completions.create(
            model=MODEL,
            prompt=PROMPT,
            max_tokens=200,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        texts.append("".join(event.choices[0].text for event in events))

    threads = [threading.Thread(target=stream) for _ in range(4)]
    for thread in threads:
        thread.start()
    for body, status, _ in BAD.values():
        raw = body if isinstance(body, bytes) else json.dumps({"model": MODEL, **body}).encode()
        assert http(f"{url}/v1/completions", raw)[0] == status
    for thread in threads:
        thread.join()
    assert texts == [expected] * 4


def test_dropped_clients_free_their_pages(client: openai.OpenAI) -> None:
    for _ in range(8):
        events = client.completions.create(
            model=MODEL,
            prompt=PROMPT,
            max_tokens=1500,
            temperature=1,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(events))
        events.close()
    wait_until_free()


def test_dropped_calls_of_every_kind_free_their_pages(
    ports: tuple[int, int], stub: orthrus_pb2_grpc.OrthrusStub
) -> None:
    body = json.dumps({"model": MODEL, "prompt": ["a", "b"], "n": 2, "max_tokens": 1500, "ignore_eos": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", ports[0])) as unstreamed:
        unstreamed.sendall((head + body).encode())
        wait_until_busy()
    wait_until_free()
    sampling = pb.SamplingParams(max_tokens=1500, ignore_eos=True)
    request = pb.GenerateRequest(model=MODEL, prompt="a", sampling=sampling)
    unary = stub.Generate.future(request)
    wait_until_busy()
    unary.cancel()
    wait_until_free()
    stream = stub.GenerateStream(request)
    next(iter(stream))
    stream.cancel()
    wait_until_free()


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


def test_a_stop_token_is_no_part_of_the_text(client: openai.OpenAI, ar: Engine) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=40)
    [[whole]] = ar.generate([ar.tokenizer.encode(PROMPT)], params)
    stop = whole.token_ids[20]
    expected = ar.tokenizer.decode(whole.token_ids[: whole.token_ids.index(stop)])
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=40, temperature=0, extra_body={"stop_token_ids": [stop]}
    )
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "stop")


def test_template_options_reach_the_template_only(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    extra = {"chat_template_kwargs": {"enable_thinking": False}, "tools": None}
    client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2, extra_body=extra)
    extra = {"chat_template_kwargs": {"tokenize": True}}
    with pytest.raises(openai.BadRequestError, match="tokenize") as caught:
        client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2, extra_body=extra)
    assert caught.value.param == "chat_template_kwargs"


def test_the_other_routes(client: openai.OpenAI, url: str) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    assert http(f"{url}/health") == (200, {"status": "ok"})
    status, missing = http(f"{url}/v1/nothing")
    assert status == 404 and "not served" in missing["error"]["message"]
