"""`return_drafts`: the cycles in a stream's events, and requests for which they are refused."""

from typing import Any

from orthrus.deployments.generation.text_chunk import TextChunk
from orthrus.deployments.openai.logprobs import spell
from orthrus.requests.request import Chunk, CycleReport
from tests.deployments.bodies.test_fields import chat, completion, refused, response, streamed


def test_drafts_are_returned(tokenizer: Any) -> None:
    text = completion(return_drafts=True, stream=True)
    assert text.sampling().return_drafts and not completion().sampling().return_drafts
    chunks = [
        Chunk("r", 0, (11,)),
        Chunk("r", 0, (12,)),
        Chunk("r", 0, (13, 14), cycles=(CycleReport(3, (13, 15, 16), 1),)),
    ]
    items = [TextChunk(0, "x", chunk) for chunk in chunks]
    told = [event["choices"][0]["cycles"] for event in streamed(response(text, tokenizer), items)]
    drafts = [spell(tokenizer, token) for token in (13, 15, 16)]
    assert told == [[], [], [{"tokens": 3, "drafts": drafts, "accepted": 1}]]
    assert "cycles" not in streamed(response(completion(stream=True), tokenizer), items)[-1]["choices"][0]


def test_return_drafts_is_refused_without_stream_or_drafts() -> None:
    for make in (completion, chat):
        assert refused(make, return_drafts=True).param == "return_drafts"
        assert refused(make, return_drafts=True, stream=True, schedule="ar").param == "return_drafts"
