"""The state of one choice of one request while the engine works on it."""

from dataclasses import dataclass, field

from orthrus.cache.page_hash import PageHash
from orthrus.requests.request import FinishReason, PromptLogprobs, RequestStats, SamplingParams
from orthrus.requests.token_mask import TokenMask
from orthrus.text.stream import TextStream


@dataclass(frozen=True)
class Draft:
    """Drafted `tokens`, waiting to be verified. lead: whether they follow a token that came with them, exact.

    led: whether the block's own first pick was that token.
    """

    tokens: list[int]
    lead: bool = False
    led: bool = False


@dataclass(eq=False)
class Sequence:
    """One choice. `tokens` holds prompt and committed tokens; the cache holds AR keys and values of positions < `computed`.

    In the design's terms the newest committed token x_n is tokens[-1] at position n. `max_length` bounds len(tokens). `ends`:
    those of `stop_ids` that may not be picked before `params.min_tokens`. `foreseen`: tokens behind tokens[-1] that passes on
    their way will commit, as `RowGroup.tokens` refers to them; `computed` counts on those passes. `draft`: tokens drafted
    for the positions after n, waiting to be verified. `leader`: the first choice of the same request, whose prefill this
    one waits for, to share its pages. `unscored`: positions whose logits score the prompt token after them, and that are still to
    be computed for it; `scores`: of the tokens that have been scored. `queued_at`: since when it waits, monotonic
    seconds; `queue_seconds`: how long it has waited before.
    `arrival`: its number in order of arrival. `priority` and `cache_salt`: the request's.
    """

    request_id: str
    index: int
    params: SamplingParams
    seed: int
    tokens: list[int]
    num_prompt: int
    max_length: int
    stop_ids: frozenset[int]
    ends: tuple[int, ...] = ()
    text: TextStream | None = None
    mask: TokenMask | None = None
    leader: "Sequence | None" = None
    pages: list[int] = field(default_factory=list)
    hashes: list[PageHash] = field(default_factory=list)
    computed: int = 0
    foreseen: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    draft: Draft | None = None
    unscored: range = range(0)
    scores: list[PromptLogprobs] = field(default_factory=list)
    cycles: int = 0
    passes: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    queued_at: float = 0.0
    queue_seconds: float = 0.0
    arrival: int = 0
    priority: int = 0
    cache_salt: str = ""

    @property
    def turn(self) -> tuple[int, int]:
        """What sequences are ordered by: the lowest goes first, and the highest gives way first."""
        return self.priority, self.arrival

    @property
    def newest(self) -> int:
        """Position n of the newest token."""
        return len(self.tokens) + len(self.foreseen) - 1

    @property
    def newest_token(self) -> int:
        """x_n, or what stands for it while no pass has picked it."""
        return self.foreseen[-1] if self.foreseen else self.tokens[-1]

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def foreseeable(self) -> bool:
        """Whether what a pass does for this sequence depends on earlier picks through its input tokens alone.

        Where its logits are read afterwards, the next pass must not have taken their place.
        """
        read = self.params.logprobs is not None or bool(self.unscored)
        return self.mask is None and not self.params.has_penalties and not read

    @property
    def complete(self) -> bool:
        """Whether it will have its full length when the passes on their way are over."""
        return self.newest + 1 >= self.max_length

    @property
    def decoding(self) -> bool:
        """Whether only the newest token lacks its key and value, so that the schedule decides what comes next."""
        return self.newest >= self.num_prompt and self.computed == self.newest

    @property
    def rows_to_prefill(self) -> int:
        """Prompt rows (a preempted sequence's tokens included) to compute before the next token comes."""
        return 0 if self.decoding else len(self.tokens) - self.computed

    def stats(self) -> RequestStats:
        return RequestStats(
            prompt_tokens=self.num_prompt,
            cached_tokens=self.cached_tokens,
            completion_tokens=self.num_generated,
            cycles=self.cycles,
            passes=self.passes,
            seed=self.seed,
            queue_seconds=self.queue_seconds,
        )

    def append(self, token: int) -> None:
        """Commit one token, and decide from it alone whether the sequence ends: pass boundaries must not matter."""
        self.tokens.append(token)
        if self.mask is not None:
            self.mask.commit(token)
            if self.mask.error is not None:
                self.finish_reason = "error"
                return
        if self.text is not None:
            self.text.push(token)
            if self.text.stopped is not None:
                self.finish_reason, self.stop_reason = "stop", self.text.stopped
                return
        if token in self.stop_ids:
            self.finish_reason = "stop"
            self.stop_reason = token if token in self.params.stop_token_ids else None
        elif len(self.tokens) >= self.max_length:
            self.finish_reason = "length"
