"""Text in the terminal: a streamed completion, and a conversation."""

import contextlib
import io
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from orthrus.cli.output import write
from orthrus.engine import Engine
from orthrus.errors import ConfigError, RequestError
from orthrus.requests.request import Request, RequestStats, SamplingParams
from orthrus.text.chat_limits import render_chat
from orthrus.text.stream import TextStream

HELP = "/reset forgets the conversation, /exit (or Ctrl-D) ends it, Ctrl-C stops an answer."

_request_numbers = itertools.count()


@dataclass(frozen=True)
class Answer:
    """A finished completion."""

    text: str
    stats: RequestStats | None
    """None if Ctrl-C stopped it."""
    greedy: bool
    seconds: float
    """Time of the whole completion."""
    first_token_seconds: float
    """Time until the first token."""


def tokenizer_of(engine: Engine) -> Any:
    """The engine's tokenizer. Raises ConfigError if its checkpoint has none."""
    if engine.tokenizer is None:
        raise ConfigError(f"{engine.config.model} has no tokenizer.json: text needs one")
    return engine.tokenizer


def stream_text(
    engine: Engine, prompt: Sequence[int], params: SamplingParams, write: Callable[[str], object]
) -> Answer:
    """Complete `prompt` (token ids) on an otherwise idle engine. `write` gets each piece of the text as soon as it is final.

    Ctrl-C cancels the request, and the answer so far is returned. Raises RequestError, and ConfigError if the model can't
    go on.
    """
    request = Request(f"terminal-{next(_request_numbers)}", prompt, params)
    text = TextStream(tokenizer_of(engine), params.stop)
    pieces: list[str] = []
    stats: RequestStats | None = None
    error: str | None = None

    def show(piece: str) -> None:
        if piece:
            pieces.append(piece)
            write(piece)

    started = time.perf_counter()
    first = 0.0
    engine.submit(request)
    try:
        while engine.has_work:
            for chunk in engine.step():
                first = first or time.perf_counter() - started
                for token in chunk.token_ids:
                    show(text.push(token))
                stats, error = chunk.stats or stats, chunk.error
    except KeyboardInterrupt:
        engine.cancel(request.request_id)
    show(text.finish())
    if error is not None:
        raise ConfigError(error)
    return Answer("".join(pieces), stats, params.greedy, time.perf_counter() - started, first)


def describe(answer: Answer) -> str:
    """One line on what an answer cost."""
    if (stats := answer.stats) is None:
        return "stopped"
    tokens = stats.completion_tokens
    line = (
        f"{tokens} token{'s' * (tokens != 1)} in {answer.seconds:.2f} s ({tokens / answer.seconds:.0f} tok/s), "
        f"first after {answer.first_token_seconds:.2f} s"
    )
    if stats.cycles:
        line += f", {stats.tokens_per_cycle:.2f} tokens per cycle"
    if not answer.text and tokens <= 1:
        line += ", no text: the model ended it at once"
    return line if answer.greedy else f"{line}, seed {stats.seed}"


def run_chat(engine: Engine, params: SamplingParams, *, system: str | None = None) -> None:
    """Read messages from stdin and answer them until /exit or the end of input."""
    tokenizer = tokenizer_of(engine)
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(f"{engine.config.model} has no chat template: use `orthrus generate`")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # Gives input() line editing and history, where there is one.
    if isinstance(sys.stdin, io.TextIOWrapper):
        # A strict decoder would report an unfinished character at the end of the input again and again.
        sys.stdin.reconfigure(errors="surrogateescape")
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    print(HELP, file=sys.stderr)
    while True:
        try:
            message = input("> ").strip()
            message.encode()  # See `orthrus generate`.
        except UnicodeError:
            print("that is not UTF-8 text", file=sys.stderr)
            continue
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if message == "/exit":
            return
        if message == "/reset":
            messages = list(opening)
        elif message.startswith("/"):
            print(HELP, file=sys.stderr)
        elif message:
            messages.append({"role": "user", "content": message})
            try:
                answer = stream_text(engine, _render(tokenizer, messages), params, write)
            except RequestError as error:
                print(f"{error}; /reset makes room", file=sys.stderr)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": answer.text})
            write("\n")
            print(f"[{describe(answer)}]", file=sys.stderr)


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    text = render_chat(tokenizer, messages, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))
