"""Runs one request: sends its token ids to a replica, and turns the chunks that come back into text."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from ray.serve.handle import DeploymentHandle

from orthrus.deployments.access.call import Call
from orthrus.deployments.chat.output import ChatSplitter
from orthrus.deployments.failures.errors import EXPECTED, GenerationFailed, unwrap
from orthrus.deployments.generation.failover import generate_on_replica
from orthrus.deployments.generation.text_chunk import TextChunk, text_chunk
from orthrus.deployments.link.receiver import ChunkReceiver
from orthrus.errors import RequestError
from orthrus.requests.request import Chunk, Request, SamplingParams, joined_chunks
from orthrus.text.stream import TextStream

MAX_STOP_CHARACTERS = 1 << 16
MAX_SCORES = 1 << 18
"""How many log-probabilities of prompts one answer may have: some 20 MB of JSON."""


def check_scores(prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
    """Raise RequestError if the log-probabilities of `prompts` would be too many for one answer."""
    if params.prompt_logprobs is None:
        return
    scores = sum(map(len, prompts)) * (params.prompt_logprobs + 1)
    if scores > MAX_SCORES:
        raise RequestError(
            f"prompt tokens times (alternatives + 1) may be at most {MAX_SCORES} in one request, got {scores}: ask for fewer "
            "log-probabilities or send fewer prompts",
            "prompt_logprobs",
        )


async def generate(
    replica: DeploymentHandle,
    receiver: ChunkReceiver,
    tokenizer: Any,
    call: Call,
    prompt: list[int],
    params: SamplingParams,
    splitter: Callable[[], ChatSplitter] | None = None,
) -> AsyncGenerator[TextChunk]:
    """Run one request on a replica. Closing the iterator cancels the request.

    call: the request belongs to it, and its tokens are counted there.
    prompt: token ids.
    splitter: makes a splitter for each choice's text. None if the answer is not a chat's.
    Raises RequestError, GenerationFailed, QueueFull and ModelUnavailable.
    """
    if sum(map(len, params.stop)) > MAX_STOP_CHARACTERS:
        raise RequestError(
            f"stop strings may have at most {MAX_STOP_CHARACTERS} characters in all: send fewer", "stop"
        )
    request = Request(uuid.uuid4().hex, prompt, params, call.priority, call.cache_salt)
    splitters = [splitter() if splitter is not None else None for _ in range(params.n)]
    texts = [
        TextStream(
            tokenizer,
            params.stop,
            params.skip_special_tokens,
            params.min_tokens,
            taken.markers if taken else (),
        )
        for taken in splitters
    ]
    stream = generate_on_replica(replica.options(session_id=call.session), receiver, request)
    unlogged, begun = call.prompts, False
    try:
        async for chunks in stream:
            for chunk in _by_choice(chunks):
                if chunk.finish_reason == "error":
                    message, param = chunk.error or "", chunk.error_param
                    raise RequestError(message, param) if param else GenerationFailed(message)
                call.add(chunk, len(prompt))
                begun = True
                if unlogged is not None:
                    # The replica has accepted the ids: only now is it certain that they are tokens.
                    unlogged.append(await asyncio.to_thread(tokenizer.decode, prompt))
                    unlogged = None
                yield text_chunk(chunk, params, texts[chunk.index], splitters[chunk.index])
    except (asyncio.CancelledError, GeneratorExit):
        if not begun:
            call.add_prompt(request.request_id, len(prompt))  # The replica may have computed some of it.
        raise
    except Exception as error:
        cause = unwrap(error)
        if isinstance(cause, EXPECTED):
            raise cause from None
        raise
    finally:
        await stream.aclose()


def _by_choice(chunks: list[Chunk]) -> list[Chunk]:
    """Chunks that came together, joined into one for each choice."""
    if len(chunks) == 1:
        return chunks
    of_choice: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        of_choice.setdefault(chunk.index, []).append(chunk)
    return [joined_chunks(parts) for parts in of_choice.values()]
