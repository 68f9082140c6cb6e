"""A running Serve application over real HTTP: the official OpenAI client, and bad input."""

import json
import socket
import threading
import time
import urllib.request
from typing import Any

import grpc
import jsonschema
import openai
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from orthrus.deployments.access.request_metrics import HISTOGRAMS
from orthrus.deployments.proto import orthrus_pb2 as pb
from orthrus.deployments.proto.orthrus_pb2_grpc import OrthrusStub
from orthrus.deployments.replica.stages import read_stages
from orthrus.engine import Engine
from orthrus.requests.request import SamplingParams
from tests.serving import MODEL, PROMPT, http, plain, wait_until_busy, wait_until_free


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


def test_a_request_chooses_its_schedule(client: openai.OpenAI, stub: OrthrusStub, url: str) -> None:
    """Over every API. The text stays the same."""
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 32, "temperature": 0}
    texts = {}
    for name in ("orthrus", "ngram", "ar"):
        answer = client.completions.create(**asked, prompt=PROMPT, extra_body={"schedule": name})
        cost = (answer.choices[0].model_extra or {})["orthrus"]
        if name != "ngram":  # Its lookups may find nothing.
            assert (cost["tokens_per_cycle"] == 1.0) is (name == "ar")
        texts[name] = answer.choices[0].text
    assert texts["ar"] == texts["orthrus"] == texts["ngram"]
    sampling = pb.SamplingParams(max_tokens=32, temperature=0.0, schedule="ar")
    reply = stub.Generate(pb.GenerateRequest(model=MODEL, prompt=PROMPT, sampling=sampling))
    assert reply.choices[0].text == texts["ar"]
    sampling.schedule = "medusa"
    with pytest.raises(grpc.RpcError, match="schedule must be one of auto, orthrus, ngram, ar") as failed:
        stub.Generate(pb.GenerateRequest(model=MODEL, prompt=PROMPT, sampling=sampling))
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    talk = {**asked, "messages": [{"role": "user", "content": "hi"}]}
    for path, body in (
        ("/v1/completions", {**asked, "prompt": PROMPT}),
        ("/v1/chat/completions", talk),
        ("/v1/messages", talk),
        ("/v1/responses", {"model": MODEL, "input": "hi", "max_output_tokens": 8}),
    ):
        assert http(f"{url}{path}", json.dumps({**body, "schedule": "ar"}).encode())[0] == 200
        status, answer = http(f"{url}{path}", json.dumps({**body, "schedule": "medusa"}).encode())
        assert status == 400 and "schedule must be one of auto, orthrus, ngram, ar" in json.dumps(answer)


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
    shown = client.completions.create(
        model=MODEL,
        prompt=prompts[1],
        max_tokens=24,
        temperature=0,
        stop=[stop],
        extra_body={"include_stop_str_in_output": True},
    )
    assert shown.choices[0].text == text[: text.index(stop)] + stop


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
def test_bad_input_gets_errors_in_openais_shape(url: str, case: str, stream: bool) -> None:
    body, status, param = BAD[case]
    raw = body if isinstance(body, bytes) else json.dumps({"model": MODEL, "stream": stream, **body}).encode()
    got, answer = http(f"{url}/v1/completions", raw)
    assert got == status
    error = answer["error"]
    assert error["message"] and error["type"] == "invalid_request_error" and error["param"] == param


def test_bad_input_does_not_disturb_running_streams(client: openai.OpenAI, url: str, ar: Engine) -> None:
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


def test_dropped_unstreamed_calls_free_their_pages(ports: tuple[int, int]) -> None:
    body = json.dumps({"model": MODEL, "prompt": ["a", "b"], "n": 2, "max_tokens": 1500, "ignore_eos": True})
    kind = "Content-Type: application/json\r\n"
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{kind}Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", ports[0])) as unstreamed:
        unstreamed.sendall((head + body).encode())
        wait_until_busy()
    wait_until_free()


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


def test_echo(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "prompt": ["é = 1\n", "class "],
        "max_tokens": 6,
        "temperature": 0,
    }
    plain_texts = [choice.text for choice in client.completions.create(**asked).choices]
    expected = ["é = 1\n" + plain_texts[0], "class " + plain_texts[1]]
    assert [c.text for c in client.completions.create(**asked, echo=True).choices] == expected
    streamed = ["", ""]
    for event in client.completions.create(**asked, echo=True, stream=True):
        streamed[event.choices[0].index] += event.choices[0].text
    assert streamed == expected


def test_usage_counts_cached_tokens(client: openai.OpenAI) -> None:
    prompt = "# " + "shared prefix " * 40
    client.completions.create(model=MODEL, prompt=prompt, max_tokens=1)
    usage = client.completions.create(model=MODEL, prompt=prompt, max_tokens=1).usage
    assert usage is not None and usage.prompt_tokens_details is not None
    # All but the last tokens, in whole pages.
    cached = usage.prompt_tokens_details.cached_tokens
    assert cached is not None and usage.prompt_tokens - 32 <= cached < usage.prompt_tokens


def test_tokenize_and_back(url: str, client: openai.OpenAI, ar: Engine) -> None:
    def post(path: str, **body: Any) -> Any:
        status, answer = http(f"{url}{path}", json.dumps({"model": MODEL, **body}).encode())
        assert status == 200, answer
        return answer

    text = "größe = '👩‍👩‍👧‍👦'\n"
    told = post("/tokenize", prompt=text, return_token_strs=True)
    assert told["tokens"] == ar.tokenizer.encode(text)
    assert (told["count"], told["max_model_len"]) == (len(told["tokens"]), 2048)
    assert len(told["token_strs"]) == told["count"]
    assert post("/detokenize", tokens=told["tokens"]) == {"prompt": text}
    messages: Any = [{"role": "user", "content": "hi"}]
    chat = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=1)
    assert chat.usage is not None
    assert post("/tokenize", messages=messages)["count"] == chat.usage.prompt_tokens


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {"prompt": "x", "messages": []}, 400, "prompt"),
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "x", "model": "gpt-9"}, 404, "model"),
        ("/detokenize", {"tokens": [10**9]}, 400, "tokens"),
        ("/detokenize", {"tokens": "abc"}, 400, "tokens"),
    ],
)
def test_tokenize_errors(url: str, path: str, body: dict[str, Any], status: int, param: str) -> None:
    got, answer = http(f"{url}{path}", json.dumps({"model": MODEL, **body}).encode())
    assert (got, answer["error"]["param"]) == (status, param)


def test_the_start_says_what_it_waits_for(url: str, told: list[str]) -> None:
    """From Serve's status and from the replica itself, whose stages are gone when it is loaded."""
    for what in ("Reading ", "Checking the model", "Starting Ray", "Starting Ray Serve", "orthrus: "):
        assert any(line.startswith(what) for line in told), what
    assert any("OrthrusReplica: starting" in line for line in told)
    assert any("loading the weights of orthrus-tiny" in line for line in told)
    assert read_stages("orthrus") == []


def scraped(url: str, parse: Any, accept: str) -> tuple[dict[str, list[Any]], int]:
    """The samples of each family in a scrape, read by a strict parser, and the size of the scrape in bytes."""
    request = urllib.request.Request(f"{url}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.headers["Content-Type"].startswith(accept)
        text = answer.read()
    return {family.name: family.samples for family in parse(text.decode())}, len(text)


def test_metrics_measure_both_protocols_by_model(url: str, client: openai.OpenAI, stub: OrthrusStub) -> None:
    """Ray's processes report every few seconds."""
    with client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=32, stream=True) as events:
        list(events)
    params = pb.SamplingParams(max_tokens=32, temperature=0)
    list(stub.GenerateStream(pb.GenerateRequest(model=MODEL, prompt=PROMPT, sampling=params)))
    deadline = time.monotonic() + 60
    done: set[str] = set()
    while not {"completions", "GenerateStream"} <= done:
        assert time.monotonic() < deadline, f"requests of {done} only are in the metrics"
        time.sleep(0.5)
        families, size = scraped(url, text_string_to_metric_families, "text/plain")
        samples = families.get("ray_orthrus_requests", [])
        done = {s.labels["endpoint"] for s in samples if s.labels["outcome"] == "ok"}
    assert size < 200_000
    opened, _ = scraped(url, openmetrics_families, "application/openmetrics-text")
    assert set(opened) == set(families)
    for name in HISTOGRAMS:
        family = families[f"ray_orthrus_{name}"]
        assert {s.labels["model"] for s in family} == {MODEL}
        counts = [s.value for s in family if s.name.endswith("_count")]
        buckets = [s.value for s in family if s.labels.get("le") == "+Inf"]
        assert sum(counts) == sum(buckets) >= 2
    assert "ray_serve_num_http_requests" in families or "ray_serve_deployment_status" in families


def test_the_other_routes(client: openai.OpenAI, url: str) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    assert http(f"{url}/health") == http(f"{url}/ready") == (200, {"status": "ok"})
    status, missing = http(f"{url}/v1/nothing")
    assert status == 404 and "not served" in missing["error"]["message"]


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_answers_under_a_schema_are_valid_and_drafted(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "# a person as JSON"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}},
        "max_tokens": 200,
        "temperature": 0,
    }
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.message.content is not None and choice.finish_reason == "stop"
    jsonschema.validate(json.loads(choice.message.content), PERSON)
    extra = choice.model_extra
    assert extra is not None and extra["orthrus"]["tokens_per_cycle"] > 1.2
    events = client.chat.completions.create(**asked, stream=True)
    assert "".join(event.choices[0].delta.content or "" for event in events) == choice.message.content


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "p", "schema": {"type": "strin"}}},
        {"type": "yaml"},
    ],
)
def test_schemas_that_cannot_be_used_are_refused(url: str, wanted: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "x"}]
    body = {"model": MODEL, "messages": messages, "response_format": wanted, "max_tokens": 5}
    status, answer = http(f"{url}/v1/chat/completions", json.dumps(body).encode())
    assert (status, answer["error"]["param"].partition(".")[0]) == (400, "response_format")
