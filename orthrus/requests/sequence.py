"""The state of one sequence while the engine works on it: one of the `n` choices of a request."""

from array import array
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from orthrus.cache.page_hash import PageHash
from orthrus.requests.request import FinishReason, PromptLogprobs, RequestStats, SamplingParams
from orthrus.text.stream import TextStream
from orthrus.text.token_mask import TokenMask


@dataclass(eq=False)
class SequenceState:
    """One sequence. The newest token, x_n, stands at position n; the first token of the prompt at position 0."""

    # --- what was asked for

    request_id: str
    index: int
    """Which of the request's choices it is."""
    params: SamplingParams
    seed: int
    """The seed of this choice."""
    tokens: list[int]
    """Token ids of the prompt and then the committed ones."""
    num_prompt: int
    """How many of `tokens` are the prompt's."""
    max_length: int
    """Most tokens, prompt included."""
    stop_ids: frozenset[int]
    """Tokens that end the sequence, end-of-sequence tokens included."""
    withheld_stop_ids: "array[int]" = field(default_factory=partial(array, "q"))
    """Those of `stop_ids` that may not be picked before `params.min_tokens`."""
    text: TextStream | None = None
    """Looks for stop strings, if there are any."""
    mask: TokenMask | None = None
    """What a grammar or word rules allow, if there are any."""
    first_choice: "SequenceState | None" = None
    """The request's first choice. The others wait for its prefill, to share its pages."""
    priority: int = 0
    """The request's."""
    cache_salt: str = ""
    """The request's: only sequences with the same salt share pages."""

    # --- the cache

    block_table: list[int] = field(default_factory=list)
    """The pages that it owns or shares, in order of positions."""
    branches: list[list[int]] = field(default_factory=list)
    """Further pages that it owns: one list for each branch of a tree of drafts. They are given up with its block table."""
    page_hashes: list[PageHash] = field(default_factory=list)
    """Names of those of its first pages that are full of committed tokens."""
    num_computed: int = 0
    """Positions whose AR keys and values are in the cache, or will be when the passes in flight are over."""
    num_cached: int = 0
    """Prompt tokens that were found in the cache."""

    # --- decoding

    placeholders: list[int] = field(default_factory=list)
    """They stand for the tokens after tokens[-1] that passes in flight will commit, as in `RowGroup.tokens`."""
    schedule_state: Any = None
    """What the schedule keeps of this sequence between passes."""
    unscored: range = range(0)
    """Positions that are still to be computed because their logits score the prompt token after them."""
    prompt_scores: list[PromptLogprobs] = field(default_factory=list)
    """The scores of the prompt tokens so far."""
    cycles: int = 0
    """As in `RequestStats`."""
    cycle_tokens: int = 0
    """Tokens that the cycle under way has committed, counted where `SamplingParams.return_drafts` asks for it."""
    passes: int = 0
    """As in `RequestStats`."""
    finish_reason: FinishReason | None = None
    """None while it is unfinished."""
    stop_reason: int | str | None = None
    """The stop token or stop string that ended it."""

    # --- the queue

    arrival: int = 0
    """Its number in order of arrival."""
    queued_at: float = 0.0
    """Since when it has been waiting, in monotonic seconds."""
    queue_seconds: float = 0.0
    """How long it has waited in all, without a wait that still goes on."""

    @property
    def queue_key(self) -> tuple[int, int]:
        """Sequences are served in ascending order of this, and preempted in descending order."""
        return self.priority, self.arrival

    @cached_property
    def prompt_ids(self) -> "array[int]":
        """The prompt's tokens. Made once, since each pass with penalties needs them."""
        return array("q", self.tokens[: self.num_prompt])

    @property
    def newest_position(self) -> int:
        """Position n of the newest token, placeholders included."""
        return len(self.tokens) + len(self.placeholders) - 1

    @property
    def newest_token(self) -> int:
        """x_n, or its placeholder while no pass has picked it."""
        return self.placeholders[-1] if self.placeholders else self.tokens[-1]

    @property
    def num_generated(self) -> int:
        """Committed tokens after the prompt."""
        return len(self.tokens) - self.num_prompt

    @property
    def takes_placeholders(self) -> bool:
        """Whether its next pass needs nothing of the pass in flight but the picks as input tokens.

        A mask, penalties or log-probabilities need more: the host's knowledge of the picks, or logits that the next pass
        would overwrite.
        """
        reads_logits = self.params.logprobs is not None or bool(self.unscored)
        return self.mask is None and not self.params.has_penalties and not reads_logits

    @property
    def complete(self) -> bool:
        """Whether it will have its full length when the passes in flight are over."""
        return self.newest_position + 1 >= self.max_length

    @property
    def decoding(self) -> bool:
        """Whether only the newest token lacks its key and value. Then the schedule decides what comes next."""
        newest = self.newest_position
        return newest >= self.num_prompt and self.num_computed == newest

    @property
    def rows_to_prefill(self) -> int:
        """Rows of the prompt, or of a preempted sequence's tokens, to compute before the next token comes."""
        return 0 if self.decoding else len(self.tokens) - self.num_computed

    def stats(self) -> RequestStats:
        """Its costs so far."""
        return RequestStats(
            prompt_tokens=self.num_prompt,
            cached_tokens=self.num_cached,
            completion_tokens=self.num_generated,
            cycles=self.cycles,
            passes=self.passes,
            seed=self.seed,
            queue_seconds=self.queue_seconds,
        )

    def append(self, token: int) -> None:
        """Commit one token. Whether it ends the sequence must not depend on the pass that it came from."""
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
