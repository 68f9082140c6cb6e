"""The engine's chunks with the text that their tokens stand for."""

from dataclasses import dataclass

from orthrus.deployments.chat.output import ChatDelta, ChatSplitter
from orthrus.requests.request import Chunk, SamplingParams
from orthrus.text.stream import TextStream


@dataclass(frozen=True)
class TextChunk:
    """A chunk of one choice, with the text that it adds."""

    index: int
    """Which choice of its prompt it belongs to."""
    text: str
    """Text that this chunk made certain. Parts of characters, and text that may be a stop string, are held back."""
    chunk: Chunk
    """The engine's chunk: tokens, log-probabilities, and at the end the statistics."""
    delta: ChatDelta | None = None
    """In a chat, `text` split into reasoning, content and calls."""
    finish_reason: str | None = None
    """In a choice's last chunk "stop", "length" or "tool_calls", else None."""
    reasoning: range = range(0)
    """Which of the chunk's tokens are a chat's reasoning."""

    @property
    def says_nothing(self) -> bool:
        """Whether there is nothing to send to a client: no text is certain, and nothing else has happened."""
        said = self.text if self.delta is None else self.delta
        return not (said or self.chunk.logprobs or self.finish_reason)


def text_chunk(
    chunk: Chunk, params: SamplingParams, text: TextStream, splitter: ChatSplitter | None
) -> TextChunk:
    """A chunk of a choice with the text that is certain now.

    text, splitter: those of the chunk's choice. They hold the text that is not certain yet.
    """
    tokens = chunk.token_ids
    # Unless it is asked for, a stop token ends the text and is no part of it, even if it is an ordinary word.
    ended_by_token = chunk.finish_reason == "stop" and not isinstance(chunk.stop_reason, str)
    if ended_by_token and not params.include_stop_str_in_output:
        tokens = tokens[:-1]
    last = chunk.finish_reason is not None
    pieces = [text.push(token) for token in tokens]
    certain = "".join(pieces)
    if last:
        certain += text.finish()
        if params.include_stop_str_in_output:
            certain += text.stopped or ""
    if splitter is None:
        return TextChunk(chunk.index, certain, chunk, finish_reason=chunk.finish_reason)
    reasoning = splitter.reasoning_span(pieces)
    delta = splitter.push(certain, final=last)
    reason = "tool_calls" if chunk.finish_reason == "stop" and splitter.called else chunk.finish_reason
    return TextChunk(chunk.index, certain, chunk, delta, reason, reasoning)
