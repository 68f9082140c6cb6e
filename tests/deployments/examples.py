"""Bodies, chunks and scores that several tests make."""

import json
import math
from typing import Any

import numpy as np

from orthrus.deployments.bodies.completion_body import CompletionBody
from orthrus.deployments.chat.body import ChatBody
from orthrus.requests.request import Chunk, PromptLogprobs, RequestStats, TokenLogprob

STATS = RequestStats(prompt_tokens=5, cached_tokens=2, completion_tokens=3, cycles=1, passes=2, seed=7)


def completion(**fields: Any) -> CompletionBody:
    return CompletionBody.model_validate_json(json.dumps({"model": "m", "prompt": "p", **fields}))


def chat(**fields: Any) -> ChatBody:
    asked = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return ChatBody.model_validate_json(json.dumps(asked))


def chunk(index: int, tokens: tuple[int, ...], last: bool, logprobs: bool) -> Chunk:
    scored = tuple(TokenLogprob(t, -0.5, ((t, -0.5), (1, -math.inf))) for t in tokens)
    return Chunk(
        request_id="r",
        index=index,
        token_ids=tokens,
        logprobs=scored if logprobs else None,
        finish_reason="length" if last else None,
        stats=STATS if last else None,
    )


def prompt_scores() -> PromptLogprobs:
    """Scores of the second and third token of a prompt."""
    return PromptLogprobs(
        token_ids=np.array([66, 67]),
        logprobs=np.array([-0.5, -2.0], np.float32),
        ranks=np.array([1, 9]),
        top_ids=np.array([[66, 2], [1, 67]]),
        top_logprobs=np.array([[-0.5, -1.0], [-0.25, -2.0]], np.float32),
    )
