"""Log-probabilities in OpenAI's and vLLM's JSON: a chat's, a completion's with places in its text, a prompt's.

A completion's alternatives are keys of an object, so each token needs a different spelling there. Bytes that are no whole
characters are `bytes:\\xe6`, as OpenAI spells them. A token whose spelling is taken is `token_id:123`, as in vLLM.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from orthrus.requests.request import PromptLogprobs, TokenLogprob
from orthrus.text.stream import TextStream, token_bytes


def spell(tokenizer: Any, token_id: int) -> str:
    """A token as text; bytes that are no whole character become U+FFFD."""
    return token_bytes(tokenizer)[token_id].decode(errors="replace")


def chat_logprobs(tokenizer: Any, items: Sequence[TokenLogprob], *, by_id: bool = False) -> dict[str, Any]:
    """`logprobs` of a chat. Its alternatives are the best tokens, whether or not the one that was picked is among them.

    by_id: tokens are spelled by their ids.
    """

    def scored(token_id: int, logprob: float) -> dict[str, Any]:
        raw = list(token_bytes(tokenizer)[token_id])
        token = _by_id(token_id) if by_id else spell(tokenizer, token_id)
        return {"token": token, "logprob": _finite(logprob), "bytes": raw}

    content = [
        {
            **scored(item.token_id, item.logprob),
            "top_logprobs": [scored(*alternative) for alternative in item.top],
        }
        for item in items
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(tokenizer: Any, scores: PromptLogprobs, top: int) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: for each token of a prompt, it and the `top` best by their ids; null for the first."""

    def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": _finite(logprob), "rank": rank, "decoded_token": spell(tokenizer, token_id)}

    rendered: list[dict[str, Any] | None] = [None]
    for item, rank in zip(scores.tokens(), scores.ranks.tolist(), strict=True):
        entries = {str(item.token_id): entry(item.token_id, item.logprob, rank)}
        for place, (token_id, logprob) in enumerate(item.top[:top], 1):
            entries.setdefault(str(token_id), entry(token_id, logprob, place))
        rendered.append(entries)
    return rendered


@dataclass(frozen=True)
class Echo:
    """A prompt, as its choices repeat it before their own text."""

    text: str
    tokens: Sequence[int] = ()
    """Its token ids."""
    offsets: Sequence[int] = ()
    """Where in the text each token begins, in characters."""

    @staticmethod
    def of(tokenizer: Any, prompt: str | Sequence[int], tokens: Sequence[int], placed: bool = True) -> "Echo":
        """prompt: as the client sent it, a text or its token ids. tokens: what the model gets of it.

        placed: whether to find out where the tokens begin.
        """
        if not placed:
            return Echo(prompt if isinstance(prompt, str) else tokenizer.decode(prompt))
        if not isinstance(prompt, str):
            stream = TextStream(tokenizer, skip_special_tokens=False)
            text, offsets = "", []
            for token in tokens:
                offsets.append(len(text))
                text += stream.push(token)
            return Echo(text + stream.finish(), tokens, offsets)
        # The text as the client sent it. The tokenizer may normalise it, but its offsets are places in the original.
        offsets, before = [], 0
        for start, end in tokenizer.backend_tokenizer.encode(prompt).offsets:
            # Some tokenizers leave a token's leading blank out of its span.
            offsets.append(start if prompt[before:start].strip() else min(start, before))
            before = end
        # The model may have been given only the end of the prompt.
        return Echo(prompt, tokens, offsets[-len(tokens) :])


@dataclass
class TextLogprobs:
    """`logprobs` of one choice of a completion, from one event to the next.

    `text_offset` counts characters of the text that is returned. A token that begins within a character has the offset of that
    character. A token that is not part of the text has the offset that the text has reached. Text is held back while it may be
    the beginning of a stop string, and so are its tokens. If the stop string then appears, their offset is the end of the text.
    """

    tokenizer: Any
    top: int
    """Alternatives of each token."""
    skip_special_tokens: bool = True
    by_id: bool = False
    """Whether tokens are spelled by their ids."""
    _stream: TextStream = field(init=False)
    # Characters of the tokens so far, and of the text that has been returned.
    _spelt: int = 0
    _returned: int = 0
    _held: deque[tuple[TokenLogprob, int]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._stream = TextStream(self.tokenizer, skip_special_tokens=self.skip_special_tokens)

    def event(
        self,
        text: str,
        items: Iterable[TokenLogprob],
        last: bool,
        echo: Echo | None = None,
        prompt: PromptLogprobs | None = None,
    ) -> dict[str, Any]:
        """The `logprobs` that come with `text`, the next text of the answer. last: whether it is the last one.

        echo: a prompt that goes before it. prompt: log-probabilities of that prompt, from its second token on.
        """
        columns = _Columns()
        if echo is not None:
            self._spelt = self._returned = len(echo.text)
            if prompt is not None:
                columns.add(self._spell(echo.tokens[0]), None, None, echo.offsets[0])
                for item, offset in zip(prompt.tokens(), echo.offsets[1:], strict=True):
                    self._add(columns, item, offset)
        self._returned += len(text)
        for item in items:
            self._held.append((item, self._spelt))
            self._spelt += len(self._stream.push(item.token_id))
        while self._held and (last or self._held[0][1] <= self._returned):
            item, offset = self._held.popleft()
            self._add(columns, item, min(offset, self._returned))
        return vars(columns)

    def _add(self, columns: "_Columns", item: TokenLogprob, offset: int) -> None:
        """Add a token. Its alternatives always include the token itself, so they may be one more than was asked for."""
        spelling = self._spell(item.token_id)
        taken = {spelling: item.token_id}
        top: dict[str, float] = {}
        for token_id, logprob in (*item.top[: self.top], (item.token_id, item.logprob)):
            key = self._spell(token_id)
            if taken.setdefault(key, token_id) != token_id:
                key = _by_id(token_id)
            top[key] = _finite(logprob)
        columns.add(spelling, _finite(item.logprob), top, offset)

    def _spell(self, token_id: int) -> str:
        if self.by_id:
            return _by_id(token_id)
        raw = token_bytes(self.tokenizer)[token_id]
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return f"bytes:{raw.decode(errors='backslashreplace')}"


@dataclass
class _Columns:
    """OpenAI's object, which has a list for each property of the tokens."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, token: str, logprob: float | None, top: dict[str, float] | None, offset: int) -> None:
        self.tokens.append(token)
        self.token_logprobs.append(logprob)
        self.top_logprobs.append(top)
        self.text_offset.append(offset)


def _by_id(token_id: int) -> str:
    return f"token_id:{token_id}"


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for it."""
    return max(logprob, -9999.0)
