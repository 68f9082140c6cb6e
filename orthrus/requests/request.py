"""What goes into the engine and what comes out: sampling parameters, requests, chunks, completions."""

import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import numpy as np

from orthrus.errors import RequestError

FinishReason = Literal["stop", "length", "cancelled", "error"]

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 1024
MAX_BAD_WORDS = 1024
MAX_PRIORITY = 1 << 31
MAX_SALT_CHARACTERS = 1024
MAX_BAD_CHARACTERS = 1 << 14
SEED_BITS = 63
DRAWN_SEED_BITS = 53
"""Of seeds that we choose: a JSON number of JavaScript's holds them exactly, so that they come back as they were told."""
_CHOICE_STEP = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class SamplingParams:
    """How to pick tokens. Names and defaults are OpenAI's and vLLM's; every combination is exact under every schedule.

    temperature: 0 is greedy. top_k: 0 keeps all. top_p: 0 keeps the best token. seed: None draws one, reported in
    `RequestStats.seed`. max_tokens: None means up to the context limit; 0 only scores the prompt. logprobs: number of top
    alternatives per token (0: the chosen token's only), None for none. prompt_logprobs: the same for the prompt's tokens,
    which choice 0 brings; such a prompt takes nothing from the prefix cache. Log-probabilities are of the model's own
    distribution at temperature 1, before masks, penalties and biases. min_tokens: before so many, neither the end of
    sequence nor a stop token is picked, and within them a stop string does not end the text.
    skip_special_tokens: leave them out of the text, and of where stop strings are looked for.
    include_stop_str_in_output: let the text end with the stop string that ended it. grammar: text of the grammar
    (`orthrus.text.grammar`) that the answer must follow. bad_words: texts that are not generated: of each one's tokens the
    last is forbidden where the others come before it. allowed_token_ids: no others are picked, ends included; None
    allows all.
    Raises RequestError naming the field for a value out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    min_tokens: int = 0
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    grammar: str | None = None
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
            ("repetition_penalty", 0.01, 100.0),
        ):
            value = getattr(self, name)
            if not math.isfinite(value) or not low <= value <= high:
                raise RequestError(f"{name} must be between {low:g} and {high:g}, got {value}", name)
        if 0 < self.temperature < 1e-3:
            raise RequestError(
                f"temperature must be 0 (greedy) or at least 0.001, got {self.temperature}", "temperature"
            )
        if self.top_k < 0:
            raise RequestError(f"top_k must be 0 (all tokens) or positive, got {self.top_k}", "top_k")
        if self.seed is not None and not 0 <= self.seed < 1 << SEED_BITS:
            raise RequestError(f"seed must be between 0 and 2**{SEED_BITS} - 1, got {self.seed}", "seed")
        if self.max_tokens is not None and self.max_tokens < (self.prompt_logprobs is None):
            raise RequestError(
                f"max_tokens must be at least 1, got {self.max_tokens}: 0 needs echo or prompt_logprobs, and scores the prompt",
                "max_tokens",
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_LOGPROBS:
                raise RequestError(f"{name} must be between 0 and {MAX_LOGPROBS}, got {value}", name)
        if not 1 <= self.n <= 128:
            raise RequestError(f"n must be between 1 and 128, got {self.n}", "n")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(
                f"at most {MAX_STOP_STRINGS} stop strings are allowed, got {len(self.stop)}", "stop"
            )
        if any(not s for s in self.stop):
            raise RequestError("a stop string must not be empty", "stop")
        if len(self.bad_words) > MAX_BAD_WORDS or sum(map(len, self.bad_words)) > MAX_BAD_CHARACTERS:
            raise RequestError(
                f"at most {MAX_BAD_WORDS} bad words with {MAX_BAD_CHARACTERS} characters in all are allowed",
                "bad_words",
            )
        if any(not word.strip() for word in self.bad_words):
            raise RequestError("a bad word must not be empty or blank", "bad_words")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids must name a token", "allowed_token_ids")
        if self.min_tokens < 0 or (self.max_tokens is not None and self.min_tokens > self.max_tokens):
            raise RequestError(
                f"min_tokens must be between 0 and max_tokens, got {self.min_tokens}", "min_tokens"
            )
        for name in ("ignore_eos", "min_tokens"):
            if self.grammar is not None and getattr(self, name):
                raise RequestError(
                    f"{name} can't be combined with a grammar, whose end must end the text", name
                )
        for token, bias in self.logit_bias.items():
            if not -100.0 <= bias <= 100.0:
                raise RequestError(
                    f"logit_bias[{token}] must be between -100 and 100, got {bias}", "logit_bias"
                )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_word_rules(self) -> bool:
        """Whether some tokens are forbidden by name."""
        return bool(self.bad_words) or self.allowed_token_ids is not None

    @property
    def has_penalties(self) -> bool:
        """Whether the distribution at a position depends on which tokens came before it, beyond the model's logits."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    def with_seed(self) -> "SamplingParams":
        """These parameters with a seed: the given one, or a fresh random one below 2**53."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(DRAWN_SEED_BITS))

    def choice_seed(self, index: int) -> int:
        """The seed of choice `index`: choice 0 is what n = 1 gives, the others have seeds of their own below 2**53."""
        assert self.seed is not None, "with_seed comes first"
        return self.seed if index == 0 else (self.seed + index * _CHOICE_STEP) % (1 << DRAWN_SEED_BITS)


@dataclass(frozen=True)
class Request:
    """One prompt (token ids) to complete `params.n` times. `request_id` is the caller's, unique among live requests.

    priority: of requests that wait the lowest comes first, of those that run the highest is the first to give way. It
    changes no text. cache_salt: only requests with the same one share cached prefixes. Raises RequestError.
    """

    request_id: str
    prompt: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    cache_salt: str = ""

    def __post_init__(self) -> None:
        if not -MAX_PRIORITY <= self.priority <= MAX_PRIORITY:
            raise RequestError(
                f"priority must be between -{MAX_PRIORITY} and {MAX_PRIORITY}, got {self.priority}",
                "priority",
            )
        if len(self.cache_salt) > MAX_SALT_CHARACTERS:
            raise RequestError(
                f"cache_salt may have {MAX_SALT_CHARACTERS} characters, got {len(self.cache_salt)}",
                "cache_salt",
            )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability (nats) of a generated token and of the `top` alternatives, best first, as (token id, logprob)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class PromptLogprobs:
    """Log-probabilities (nats) of consecutive prompt tokens, as arrays: a long prompt has many of them.

    token_ids int32 [tokens]; logprobs float32 (float64 for a float64 model) [tokens]; ranks int32 [tokens], 1 for a token
    that none is likelier than; top_ids, top_logprobs [tokens, top]: the best alternatives, best first.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    ranks: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray

    def __len__(self) -> int:
        return len(self.token_ids)

    @staticmethod
    def joined(parts: Sequence["PromptLogprobs"]) -> "PromptLogprobs":
        """Parts, at least one, that followed one another, as one."""
        each = (np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(PromptLogprobs))
        return PromptLogprobs(*each)

    def tokens(self) -> Iterator[TokenLogprob]:
        """As generated tokens have them."""
        top = zip(self.top_ids.tolist(), self.top_logprobs.tolist(), strict=True)
        for token, logprob, (ids, values) in zip(
            self.token_ids.tolist(), self.logprobs.tolist(), top, strict=True
        ):
            yield TokenLogprob(token, logprob, tuple(zip(ids, values, strict=True)))


@dataclass(frozen=True, slots=True)
class RequestStats:
    """What one sequence cost. Sent with its last chunk.

    cycles: committing steps after the first token (a draft + verify pair, or one AR pass).
    passes: forward passes the sequence had decode rows in, drafts included. Both are what tokens per cycle
    and TPF (tokens per forward pass) are made of; see `tokens_per_cycle`. queue_seconds: time that it waited for room.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cycles: int
    passes: int
    seed: int
    queue_seconds: float = field(default=0.0, compare=False)  # Of the moment, unlike the rest.

    @property
    def tokens_per_cycle(self) -> float:
        """Tokens committed per cycle; the first token comes from the prefill and is not counted. 1.0 before any cycle."""
        return (self.completion_tokens - 1) / self.cycles if self.cycles else 1.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens that one pass committed for choice `index` of a request.

    The last chunk of a choice has `finish_reason` and `stats`; it may hold no tokens. `stop_reason` is the stop
    string or stop token id that ended it, None for end of sequence. `error` is set for finish_reason "error", and with it
    `error_param` where a field of the request is at fault. The first chunk of choice 0 has `prompt_logprobs` where the request
    wants them: of the prompt's tokens from the second on, for nothing predicts the first.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    stats: RequestStats | None = None
    error: str | None = None
    error_param: str | None = None
    prompt_logprobs: PromptLogprobs | None = None


def joined_chunks(chunks: Sequence[Chunk]) -> Chunk:
    """Chunks of one choice that followed one another, as one."""
    last = chunks[-1]
    scored = [chunk.logprobs for chunk in chunks if chunk.logprobs is not None]
    return replace(
        last,
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        logprobs=tuple(item for part in scored for item in part) if scored else None,
        prompt_logprobs=chunks[0].prompt_logprobs,
    )


@dataclass(frozen=True, slots=True)
class Completion:
    """All of one choice: what its chunks add up to."""

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    stats: RequestStats
    prompt_logprobs: PromptLogprobs | None = None
