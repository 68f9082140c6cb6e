"""Texts, prompts and stop strings at the limits of what is served."""

import json
import random
from typing import Any

import openai
import pytest

from orthrus.deployments.proto import orthrus_pb2 as pb
from orthrus.deployments.proto.orthrus_pb2_grpc import OrthrusStub
from orthrus.engine import Engine
from orthrus.requests.request import SamplingParams
from tests.serving import MODEL, PROMPT, http, plain

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
