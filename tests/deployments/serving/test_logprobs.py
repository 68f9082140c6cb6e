"""Log-probabilities of answers and prompts through the running application."""

import itertools
import json
from typing import Any

import openai
import pytest

from orthrus.deployments.proto import orthrus_pb2 as pb
from orthrus.deployments.proto.orthrus_pb2_grpc import OrthrusStub
from orthrus.engine import Engine
from orthrus.requests.request import SamplingParams
from tests.serving import MODEL, PROMPT, http

SCORE = {"max_tokens": 0, "temperature": 0, "logprobs": 2, "echo": True}


def post(url: str, path: str, **fields: Any) -> tuple[int, Any]:
    return http(f"{url}{path}", json.dumps(fields).encode())


def complete(url: str, **fields: Any) -> list[dict[str, Any]]:
    status, answer = post(url, "/v1/completions", model=MODEL, **fields)
    assert status == 200, answer
    return answer["choices"]


def test_scores_of_a_prompt_are_those_of_decoding_it(url: str, ar: Engine) -> None:
    """Scored as a prompt, an answer has the log-probabilities that it came with, and a batch those of each prompt alone."""
    prompt = ar.tokenizer.encode(PROMPT)
    params = SamplingParams(temperature=0.0, max_tokens=40, logprobs=2, ignore_eos=True)
    [[plain]] = ar.generate([prompt], params)
    assert plain.logprobs is not None
    text = [*prompt, *plain.token_ids]
    batch = [text, prompt, text[:1], text]
    told = complete(url, prompt=batch, **SCORE)
    assert [choice["index"] for choice in told] == [0, 1, 2, 3]
    for choice, tokens in zip(told, batch, strict=True):
        assert choice["text"] == ar.tokenizer.decode(tokens) and choice["finish_reason"] == "length"
        logprobs = choice["logprobs"]
        assert {len(column) for column in logprobs.values()} == {len(tokens)}
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        starts = [*logprobs["text_offset"], len(choice["text"])]
        pieces = [choice["text"][a:b] for a, b in itertools.pairwise(starts)]
        assert pieces == logprobs["tokens"]
    ours = told[0]["logprobs"]["token_logprobs"][len(prompt) :]
    assert ours == pytest.approx([item.logprob for item in plain.logprobs], abs=1e-5)
    # How lm-eval finds out whether a continuation is greedy.
    best = [max(top.values()) for top in told[0]["logprobs"]["top_logprobs"][len(prompt) :]]
    assert best == ours
    assert told[3]["logprobs"] == told[0]["logprobs"]


def test_usage_counts_what_was_scored_and_nothing_generated(url: str, ar: Engine) -> None:
    tokens = ar.tokenizer.encode(PROMPT)
    status, answer = post(url, "/v1/completions", model=MODEL, prompt=[PROMPT] * 2, n=2, **SCORE)
    assert status == 200 and len(answer["choices"]) == 4
    assert [choice["logprobs"]["tokens"] for choice in answer["choices"]] == [
        answer["choices"][0]["logprobs"]["tokens"]
    ] * 4
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (2 * len(tokens), 0)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert [choice["orthrus"]["cycles"] for choice in answer["choices"]] == [0] * 4


def test_a_stream_has_them_in_its_first_event(url: str, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "logprobs": 2, "echo": True}
    whole = client.completions.create(**asked, max_tokens=12).choices[0]
    events = [event.choices[0] for event in client.completions.create(**asked, max_tokens=12, stream=True)]
    assert events[0].text.startswith(PROMPT) and events[0].logprobs is not None
    assert events[0].logprobs.token_logprobs is not None and events[0].logprobs.token_logprobs[0] is None
    assert "".join(event.text for event in events) == whole.text
    assert whole.logprobs is not None
    for column in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        parts = [getattr(event.logprobs, column) or [] for event in events]
        assert [value for part in parts for value in part] == getattr(whole.logprobs, column)
    [scored] = client.completions.create(
        **asked, max_tokens=0, stream=True, stream_options={"include_usage": False}
    )
    assert scored.choices[0].text == PROMPT and scored.choices[0].finish_reason == "length"


def test_prompt_logprobs_as_vllm_has_them(url: str, stub: OrthrusStub, ar: Engine) -> None:
    messages = [{"role": "user", "content": "hi"}]
    status, chat = post(
        url, "/v1/chat/completions", model=MODEL, messages=messages, max_tokens=0, prompt_logprobs=1
    )
    assert status == 200, chat
    assert chat["choices"][0]["message"]["content"] == "" and chat["choices"][0]["finish_reason"] == "length"
    _, tokenized = post(url, "/tokenize", messages=messages)
    assert chat["usage"]["prompt_tokens"] == len(chat["prompt_logprobs"]) == tokenized["count"]
    tokens = tokenized["tokens"]
    [choice] = complete(url, prompt=tokens, max_tokens=1, prompt_logprobs=1)
    assert choice["prompt_logprobs"] == chat["prompt_logprobs"] and choice["logprobs"] is None
    assert chat["prompt_logprobs"][0] is None
    for token, entries in zip(tokens[1:], chat["prompt_logprobs"][1:], strict=True):
        ours = entries[str(token)]
        assert ours["rank"] >= 1 and len(entries) == (1 if ours["rank"] == 1 else 2)
        assert set(ours) == {"logprob", "rank", "decoded_token"}
    sampling = pb.SamplingParams(max_tokens=0, prompt_logprobs=1)
    request = pb.GenerateRequest(model=MODEL, prompt_token_ids=pb.TokenIds(ids=tokens), sampling=sampling)
    [over_grpc] = stub.Generate(request).choices
    assert [item.token_id for item in over_grpc.prompt_logprobs] == tokens[1:]
    expected = [
        entries[str(token)]["logprob"]
        for token, entries in zip(tokens[1:], chat["prompt_logprobs"][1:], strict=True)
    ]
    assert [item.logprob for item in over_grpc.prompt_logprobs] == expected
    assert (over_grpc.finish_reason, over_grpc.stats.completion_tokens) == ("length", 0)
    [first] = stub.GenerateStream(request)
    assert list(first.prompt_logprobs) == list(over_grpc.prompt_logprobs)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt": [[1] * 2000] * 32, "prompt_logprobs": 20, "max_tokens": 0}, "prompt_logprobs"),
        ({"prompt": [10**30], "echo": True, "logprobs": 1}, "prompt"),
        ({"prompt": [8192], "echo": True}, "prompt"),
        ({"prompt": [1] * 2049, "max_tokens": 0, "echo": True}, "prompt"),
    ],
)
def test_what_cannot_be_scored_says_why(url: str, fields: dict[str, Any], param: str) -> None:
    status, answer = post(url, "/v1/completions", **{"model": MODEL, "prompt": PROMPT} | fields)
    assert (status, answer["error"]["param"]) == (400, param), answer


def test_a_remote_tokenizer_gets_all_that_it_needs(url: str, ar: Engine) -> None:
    """What lm-eval's asks for, in its words: it sends no model."""
    status, info = http(f"{url}/tokenizer_info")
    assert status == 200 and info["eos_token"] == ar.tokenizer.eos_token
    assert info["chat_template"] == ar.tokenizer.chat_template
    _, tokenized = post(url, "/tokenize", prompt=PROMPT, add_special_tokens=False)
    assert tokenized["tokens"] == ar.tokenizer.encode(PROMPT, add_special_tokens=False)
    assert post(url, "/detokenize", tokens=tokenized["tokens"]) == (200, {"prompt": PROMPT})
    _, end = post(url, "/tokenize", prompt=info["eos_token"], add_special_tokens=False)
    assert end["tokens"] == [ar.tokenizer.eos_token_id]


def integers(value: Any) -> list[int]:
    match value:
        case bool():
            return []
        case int():
            return [value]
        case dict():
            return [number for item in value.values() for number in integers(item)]
        case list():
            return [number for item in value for number in integers(item)]
    return []


def test_javascript_reads_every_integer_as_it_is(url: str) -> None:
    """Its numbers are doubles: beyond 2**53 it would read another one, and send that back."""
    messages = [{"role": "user", "content": "hi"}]
    sampled: dict[str, Any] = {"max_tokens": 4, "temperature": 1, "n": 4}
    answers = [
        post(url, "/v1/completions", model=MODEL, prompt=PROMPT, logprobs=1, prompt_logprobs=1, **sampled),
        post(url, "/v1/completions", model=MODEL, prompt=PROMPT, seed=-1, **sampled),
        post(url, "/v1/completions", model=MODEL, prompt=PROMPT, seed=2**53 - 1, **sampled),
        post(
            url,
            "/v1/chat/completions",
            model=MODEL,
            messages=messages,
            logprobs=True,
            top_logprobs=1,
            **sampled,
        ),
        post(url, "/tokenize", prompt=PROMPT, return_token_strs=True),
        http(f"{url}/tokenizer_info"),
        http(f"{url}/v1/models"),
    ]
    for status, answer in answers:
        assert status == 200, answer
        found = integers(answer)
        assert found and all(abs(number) < 2**53 for number in found)
    seeds = [choice["orthrus"]["seed"] for choice in answers[0][1]["choices"]]
    assert len(set(seeds)) == 4
    for choice, seed in zip(answers[0][1]["choices"], seeds, strict=True):
        [again] = complete(url, prompt=PROMPT, max_tokens=4, temperature=1, seed=seed)
        assert again["text"] == choice["text"]
