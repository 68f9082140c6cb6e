"""A chat from its body to the chunks of its answer, the same for every API that has chats."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fastapi.responses import StreamingResponse
from ray.serve.handle import DeploymentHandle

from deployments.access.calls import Call
from deployments.chat.body import ChatBody
from deployments.chat.template import ChatPrompt, ChatTemplate
from deployments.failures.failures import Failure, describe_failure
from deployments.generation.generate import TextChunk, generate
from deployments.link.chunk_link import ChunkReceiver
from deployments.openai.format import named_sse
from orthrus.requests.request import SamplingParams


@dataclass(frozen=True)
class RunningChat:
    """prompt: its token ids. chunks: of all choices, as they come; closing it ends the request."""

    prompt: list[int]
    chunks: AsyncGenerator[TextChunk]

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt)


class Chats:
    """Starts chats on the replicas of one model."""

    def __init__(
        self, replica: DeploymentHandle, receiver: ChunkReceiver, tokenizer: Any, max_model_len: int
    ) -> None:
        """max_model_len: the model's context limit, in tokens."""
        self._replica, self._receiver, self._tokenizer = replica, receiver, tokenizer
        self._max_model_len = max_model_len
        self._template = ChatTemplate(tokenizer)

    async def prompt(self, body: ChatBody) -> ChatPrompt:
        """The prompt, made off the event loop: a long one must not hold up other streams. Raises RequestError."""
        prompt = await asyncio.to_thread(self._template.apply, body)
        return replace(prompt, tokens=body.truncated(prompt.tokens, self._max_model_len, body.new_tokens))

    async def start(self, call: Call, body: ChatBody, params: SamplingParams) -> RunningChat:
        """Raises RequestError; the chunks raise what `generate` does. An API with other names has put them into the call."""
        names = call.sent_as
        call.read(body)
        call.sent_as = {**call.sent_as, **names}
        prompt = await self.prompt(body)
        params = replace(params, grammar=prompt.grammar).with_seed()
        chunks = generate(
            self._replica, self._receiver, self._tokenizer, call, prompt.tokens, params, prompt.splitter
        )
        return RunningChat(prompt.tokens, chunks)


class EventFormat(Protocol):
    """How an API streams an answer: as events that have a `type`."""

    def opening(self) -> list[dict[str, Any]]:
        """The events before the first chunk's."""
        ...

    def events(self, item: TextChunk) -> list[dict[str, Any]]:
        """The events of one chunk; of the last one, the end of the stream too."""
        ...

    def failed(self, failure: Failure) -> list[dict[str, Any]]:
        """The events that end a stream which can't go on."""
        ...


async def stream_answer(
    call: Call,
    chunks: AsyncGenerator[TextChunk],
    out: EventFormat,
    before_end: Callable[[], Awaitable[None]] | None = None,
) -> StreamingResponse:
    """The answer of one choice as server-sent events. before_end: awaited before the client is told of the end."""
    # Awaited here, while a refusal can still be an HTTP status.
    first = await anext(chunks)

    async def events() -> AsyncIterator[str]:
        try:
            yield "".join(map(named_sse, out.opening()))
            async with aclosing(chunks):
                item: TextChunk | None = first
                while item is not None:
                    happened = out.events(item)
                    if item.finish_reason is not None and before_end is not None:
                        await before_end()
                    if happened:
                        yield "".join(map(named_sse, happened))
                    item = await anext(chunks, None)
            call.outcome = "ok"
        except Exception as error:
            call.outcome = type(error).__name__
            yield "".join(map(named_sse, out.failed(describe_failure(error, call.sent_as))))

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
