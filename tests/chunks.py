"""Chunks of a chat's answer as the ingress makes them, without a model."""

import itertools
import random
from collections.abc import Sequence
from typing import Any

from orthrus.deployments.chat.output import ChatSplitter
from orthrus.deployments.generation.text_chunk import TextChunk
from orthrus.requests.request import Chunk, RequestStats, TokenLogprob

STATS = RequestStats(prompt_tokens=50, cached_tokens=32, completion_tokens=40, cycles=10, passes=20, seed=7)
ANSWER = (
    "<think>\nTwo cities.\n</think>\n\nLet me see.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Łódź"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
)
"""Everything that an answer may have."""


def cut(text: str, seed: int) -> list[str]:
    places = sorted(random.Random(seed).sample(range(1, len(text)), 12))
    return [text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])]


def chunks(
    tokens: Sequence[str],
    reason: Any = "stop",
    stop_reason: str | None = None,
    *,
    tokenizer: Any = None,
    sizes: Sequence[int] = (),
) -> list[TextChunk]:
    """The chunks of an answer of these tokens: one each, or of `sizes`. tokenizer: knows their ids, for log-probabilities."""
    splitter = ChatSplitter(thinks=True, calls=True)
    items, left = [], list(tokens)
    for size in sizes or [1] * len(tokens):
        pieces, left = left[:size], left[size:]
        last = not left
        ids = tuple(tokenizer.encode(piece)[0] for piece in pieces) if tokenizer is not None else (1,) * size
        scores = tuple(TokenLogprob(id, -0.5, ((id, -0.5),)) for id in ids) if tokenizer is not None else None
        chunk = Chunk(
            "r",
            0,
            ids,
            scores,
            reason if last else None,
            stop_reason if last else None,
            STATS if last else None,
        )
        span = splitter.reasoning_span(pieces)
        delta = splitter.push("".join(pieces), final=last)
        done = "tool_calls" if reason == "stop" and splitter.called else reason
        items.append(TextChunk(0, "".join(pieces), chunk, delta, done if last else None, span))
    return items
