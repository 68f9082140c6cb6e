"""What goes into the engine and what comes out: sampling parameters, requests, chunks, completions."""

import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from orthrus.errors import RequestError

FinishReason = Literal["stop", "length", "cancelled", "error"]

LEAST_TEMPERATURE = 1e-3
"""Of sampled tokens: a smaller temperature over 0 counts as this one."""
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 1024
MAX_BAD_WORDS = 1024
MAX_PRIORITY = 1 << 31
MAX_SALT_CHARACTERS = 1024
MAX_BAD_CHARACTERS = 1 << 14
SEED_BITS = 63
DRAWN_SEED_BITS = 53
"""Seeds that the server draws stay below 2^53, so that JavaScript clients read them exactly."""
_CHOICE_STEP = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class SamplingParams:
    """How to pick tokens. Names and defaults are OpenAI's and vLLM's; every combination is exact under every schedule.

    Log-probabilities are of the model's own distribution at temperature 1, before masks, penalties and biases. Raises
    RequestError, naming the field, for a value out of range.
    """

    temperature: float = 1.0
    """0 is greedy. Between 0 and `LEAST_TEMPERATURE` it is that one."""
    top_p: float = 1.0
    """0 keeps the best token."""
    top_k: int = 0
    """0 keeps all tokens."""
    min_p: float = 0.0
    seed: int | None = None
    """None draws one, which `RequestStats.seed` reports."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    """For some token ids, what is added to the token's logit."""
    stop: tuple[str, ...] = ()
    """Strings that end the text."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the text."""
    ignore_eos: bool = False
    """Whether the text goes on after an end-of-sequence token."""
    max_tokens: int | None = None
    """None means up to the context limit. 0 only scores the prompt."""
    logprobs: int | None = None
    """Number of best alternatives to report per token (0: only the chosen token), None for no log-probabilities."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens. They come with choice 0. Such a prompt is computed without the prefix cache."""
    n: int = 1
    """Choices to generate."""
    min_tokens: int = 0
    """Until the text has this many tokens, no end-of-sequence or stop token is picked, and no stop string ends it."""
    skip_special_tokens: bool = True
    """Whether special tokens are left out of the text. Stop strings are then not looked for in them either."""
    include_stop_str_in_output: bool = False
    """Whether the text ends with the stop string or the stop token that ended it."""
    grammar: str | None = None
    """A grammar (`orthrus.text.grammar`) that the answer must follow."""
    bad_words: tuple[str, ...] = ()
    """Texts that are never generated. When all tokens of such a text but the last have been generated, the last is forbidden."""
    allowed_token_ids: tuple[int, ...] | None = None
    """The only token ids that may be picked, and so it must list end-of-sequence tokens too. None allows all."""
    schedule: str = "auto"
    """How to decode: "auto" for the engine's schedule, or the name of one (`Admission.schedules`). It never changes the text."""
    return_drafts: bool = False
    """Whether chunks tell what each cycle drafted (`Chunk.cycles`)."""

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
        if 0 < self.temperature < LEAST_TEMPERATURE:
            # Logits over a smaller one might not be finite. Clients that send one want the likeliest tokens.
            object.__setattr__(self, "temperature", LEAST_TEMPERATURE)
        if self.top_k < 0:
            raise RequestError(f"top_k must be 0 (all tokens) or positive, got {self.top_k}", "top_k")
        if self.seed is not None and not 0 <= self.seed < 1 << SEED_BITS:
            raise RequestError(f"seed must be between 0 and 2**{SEED_BITS} - 1, got {self.seed}", "seed")
        if self.max_tokens is not None and self.max_tokens < (self.prompt_logprobs is None):
            raise RequestError(
                f"max_tokens must be at least 1, got {self.max_tokens}: 0 only scores the prompt, with echo or prompt_logprobs",
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
            raise RequestError("allowed_token_ids must have at least one token id", "allowed_token_ids")
        if self.min_tokens < 0 or (self.max_tokens is not None and self.min_tokens > self.max_tokens):
            raise RequestError(
                f"min_tokens must be between 0 and max_tokens, got {self.min_tokens}", "min_tokens"
            )
        for name in ("ignore_eos", "min_tokens"):
            if self.grammar is not None and getattr(self, name):
                raise RequestError(
                    f"{name} can't be combined with a grammar: the text must end where the grammar ends", name
                )
        for token, bias in self.logit_bias.items():
            if not -100.0 <= bias <= 100.0:
                raise RequestError(
                    f"logit_bias[{token}] must be between -100 and 100, got {bias}", "logit_bias"
                )

    @cached_property
    def biased(self) -> tuple[np.ndarray, np.ndarray]:
        """`logit_bias` as arrays: int64 token ids, and float64 biases. Made once, since each pass needs them."""
        size = len(self.logit_bias)
        return np.fromiter(self.logit_bias, np.int64, size), np.fromiter(
            self.logit_bias.values(), np.float64, size
        )

    @cached_property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_word_rules(self) -> bool:
        """Whether some tokens are forbidden by name."""
        return bool(self.bad_words) or self.allowed_token_ids is not None

    @cached_property
    def has_penalties(self) -> bool:
        """Whether the distribution at a position depends on which tokens came before it, beyond the model's logits."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    @cached_property
    def has_filters(self) -> bool:
        """Whether top_k, top_p or min_p filters tokens."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)

    def with_seed(self) -> "SamplingParams":
        """These parameters with a seed: the given one, or a fresh random one below 2**53."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(DRAWN_SEED_BITS))

    def choice_seed(self, index: int) -> int:
        """The seed of choice `index`: choice 0 is what n = 1 gives, the others have seeds of their own below 2**53."""
        assert self.seed is not None, "with_seed comes first"
        return self.seed if index == 0 else (self.seed + index * _CHOICE_STEP) % (1 << DRAWN_SEED_BITS)


@dataclass(frozen=True)
class Request:
    """One prompt to complete `params.n` times. Raises RequestError."""

    request_id: str
    """The caller's, unique among live requests."""
    prompt: Sequence[int]
    """Token ids."""
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    """The lowest is served first, the highest is preempted first. It changes no text."""
    cache_salt: str = ""
    """Only requests with the same salt share cached prefixes."""

    def __post_init__(self) -> None:
        if not -MAX_PRIORITY <= self.priority <= MAX_PRIORITY:
            raise RequestError(
                f"priority must be between -{MAX_PRIORITY} and {MAX_PRIORITY}, got {self.priority}",
                "priority",
            )
        if len(self.cache_salt) > MAX_SALT_CHARACTERS:
            raise RequestError(
                f"cache_salt may have at most {MAX_SALT_CHARACTERS} characters, got {len(self.cache_salt)}",
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
    """Log-probabilities (nats) of consecutive prompt tokens, as arrays: a long prompt has many of them."""

    token_ids: np.ndarray
    """int32 [tokens]."""
    logprobs: np.ndarray
    """float32, or float64 for a float64 model, [tokens]."""
    ranks: np.ndarray
    """int32 [tokens], as in vLLM: 1 for the likeliest token."""
    top_ids: np.ndarray
    """int32 [tokens, top]: the best alternatives, best first."""
    top_logprobs: np.ndarray
    """As `logprobs`, [tokens, top]."""

    def __len__(self) -> int:
        return len(self.token_ids)

    @staticmethod
    def joined(parts: Sequence["PromptLogprobs"]) -> "PromptLogprobs":
        """Join consecutive parts, at least one."""
        each = (np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(PromptLogprobs))
        return PromptLogprobs(*each)

    def tokens(self) -> Iterator[TokenLogprob]:
        """The same as one `TokenLogprob` for each token, as generated tokens have them."""
        top = zip(self.top_ids.tolist(), self.top_logprobs.tolist(), strict=True)
        for token, logprob, (ids, values) in zip(
            self.token_ids.tolist(), self.logprobs.tolist(), top, strict=True
        ):
            yield TokenLogprob(token, logprob, tuple(zip(ids, values, strict=True)))


@dataclass(frozen=True, slots=True)
class RequestStats:
    """What one sequence cost. Sent with its last chunk."""

    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that were found in the prefix cache."""
    completion_tokens: int
    cycles: int
    """Cycles after the first token: a draft and verify pair, or one AR pass."""
    passes: int
    """Forward passes after the first token that the sequence had rows in, drafts included."""
    seed: int
    """The seed of this choice."""
    queue_seconds: float = field(default=0.0, compare=False)  # Differs from run to run.
    """How long it waited for room."""

    @property
    def tokens_per_cycle(self) -> float:
        """Tokens committed per cycle; the first token comes from the prefill and is not counted. 1.0 before any cycle."""
        return (self.completion_tokens - 1) / self.cycles if self.cycles else 1.0


class CycleReport(NamedTuple):
    """What one cycle drafted for a choice, and what came of it."""

    num_tokens: int
    """Tokens that the cycle committed, a lead's included."""
    drafts: tuple[int, ...]
    """The drafted token ids as one sequence; empty in an AR step. For a block, these are all drafts that were verified. For a
    tree, they are the right drafts, and then the rest of its chain, if the chain begins with the right ones."""
    num_accepted: int
    """How many of the drafts, from the front, agreed with the AR view's picks. If the text ends within them, it has fewer."""


# Not frozen: a pass makes one for every sequence, and making frozen ones takes four times as long.
@dataclass(slots=True)
class Chunk:
    """The tokens that one pass committed for one choice of a request. The last chunk of a choice may hold none."""

    request_id: str
    index: int
    """Which of the request's choices it is."""
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One for each token, if they were asked for."""
    finish_reason: FinishReason | None = None
    """Set in a choice's last chunk."""
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended the choice, None for end of sequence."""
    stats: RequestStats | None = None
    """Set in a choice's last chunk."""
    error: str | None = None
    """What went wrong, for finish_reason "error"."""
    error_param: str | None = None
    """The field of the request that is at fault, if one is."""
    engine_failed: bool = False
    """Whether the engine itself has failed, with all its requests. Another engine could run this one."""
    prompt_logprobs: PromptLogprobs | None = None
    """In the first chunk of choice 0, if the request asks for them. They begin with the prompt's second token, since nothing
    predicts the first."""
    cycles: tuple[CycleReport, ...] = ()
    """The cycles that ended with these tokens, if the request asks for them. The first token of a choice belongs to none."""


def joined_chunks(chunks: Sequence[Chunk]) -> Chunk:
    """Join consecutive chunks of one choice to one."""
    last = chunks[-1]
    scored = [chunk.logprobs for chunk in chunks if chunk.logprobs is not None]
    return replace(
        last,
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        logprobs=tuple(item for part in scored for item in part) if scored else None,
        prompt_logprobs=chunks[0].prompt_logprobs,
        cycles=tuple(cycle for chunk in chunks for cycle in chunk.cycles),
    )


@dataclass(frozen=True, slots=True)
class Completion:
    """One whole choice: all its chunks joined."""

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    stats: RequestStats
    prompt_logprobs: PromptLogprobs | None = None
