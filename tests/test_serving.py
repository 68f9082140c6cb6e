"""A running Serve application over real HTTP: the official OpenAI client, and bad input."""

import json
import socket
import threading
from typing import Any

import openai
import pytest

from orthrus.engine import Engine
from orthrus.request import SamplingParams
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


def test_dropped_unstreamed_calls_free_their_pages(ports: tuple[int, int]) -> None:
    body = json.dumps({"model": MODEL, "prompt": ["a", "b"], "n": 2, "max_tokens": 1500, "ignore_eos": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
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


def test_the_other_routes(client: openai.OpenAI, url: str) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    assert http(f"{url}/health") == (200, {"status": "ok"})
    status, missing = http(f"{url}/v1/nothing")
    assert status == 404 and "not served" in missing["error"]["message"]
