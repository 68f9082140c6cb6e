"""The engine's loop: requests in, chunks of committed tokens out, one forward pass a step."""

import time
from collections import deque
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from orthrus.cache.page_hash import PageHash
from orthrus.cache.page_pool import PagePool
from orthrus.engine.admission import Admission
from orthrus.engine.config import EngineConfig
from orthrus.engine.in_flight import InFlight, advance, tell_time
from orthrus.engine.observer import Observer, PassRecord, TurnRecord
from orthrus.engine.output import (
    NO_NUMBERS,
    append_tokens,
    final_chunk,
    pick_rows,
    score_prompt,
    tokens_chunk,
)
from orthrus.engine.pass_limits import SCORE_ROWS, PassLimits
from orthrus.engine.passes import LoadedModel, time_pass
from orthrus.engine.planned_turn import PlannedTurn
from orthrus.engine.scheduler import Scheduler
from orthrus.engine.stats import EngineStats
from orthrus.errors import RequestError
from orthrus.kernels.ranks import ONE_RANK, Ranks
from orthrus.kernels.rows.types import NO_TOKEN
from orthrus.models.checkpoint import with_own_head
from orthrus.models.config import ModelConfig
from orthrus.plan import RowGroup
from orthrus.requests.request import Chunk, Request
from orthrus.requests.sequence import SequenceState
from orthrus.runner.protocol import ModelRunner
from orthrus.runner.sampler import PickRows, follow_masks
from orthrus.schedules.pass_cost import PassTimer
from orthrus.schedules.protocol import Commit, PassTime, Schedule, ScheduleContext, load_schedule
from orthrus.schedules.registry import SCHEDULES
from orthrus.text.token_mask import TokenMask


class EngineCore:
    """Serves one model: `submit` requests, and call `step` while `has_work`.

    It belongs to one thread. Other threads may call `check`, `prepare`, `live_requests` and `recent_prefixes`, and read `stats`,
    which is replaced as a whole. None of these waits for a pass.
    """

    stats: EngineStats
    """As of the last step, submission or cancellation."""
    observer: Observer | None = None
    """Called with the record of every pass, if there is one."""

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        weights: MutableMapping[str, Tensor],
        tokenizer: Any = None,
        grammar_masks: Callable[[str], TokenMask] | None = None,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        """weights: a checkpoint's tensors by Hugging Face name, on the device; all are taken out. ranks: those that share the
        model, if there are several. This process is then rank 0, and `weights` is its part of the tensors (`open_weights`).

        tokenizer: a Hugging Face one, needed for stop strings and bad words only. grammar_masks: makes the token mask of a
        sequence from `SamplingParams.grammar`, or raises RequestError. Raises ConfigError for settings that do not fit the model
        or the device.
        """
        model_config = config.with_settings(with_own_head(model_config, weights))
        config.check_model(model_config)
        self.config = config
        self.model_config = model_config
        self.tokenizer = tokenizer
        schedule = load_schedule(SCHEDULES[self.schedule_name])
        self._max_groups = schedule.max_groups  # The runner has room for this many groups of a turn.
        loaded = LoadedModel.build(config, model_config, weights, ranks, self._max_groups)
        self.ranks, self.forward, self.cache = ranks, loaded.forward, loaded.cache
        self.runner: ModelRunner = loaded.runner
        self.max_model_len = loaded.max_model_len
        self.device, self.page_size = self.forward.device, self.cache.page_size
        self.use_device()
        self.limits = PassLimits.of(config)
        self._watchers: list[Callable[[PassTime], None]] = []
        self._pool = PagePool(loaded.num_pages + 1, config.prefix_caching)
        self._scheduler = Scheduler(
            schedule.build(self.schedule_context()),
            self._pool,
            page_size=self.page_size,
            max_num_seqs=config.max_num_seqs,
            prefill_chunk=config.prefill_chunk,
            decode_rows=self.limits.decode_rows,
            score_rows=SCORE_ROWS,
            mixes_views=self.forward.draft is None,
        )
        self._admission = Admission(
            model_config, self.max_model_len, tokenizer, grammar_masks, config.request_schedules(model_config)
        )
        self._by_request: dict[str, list[SequenceState]] = {}
        self._in_flight: deque[InFlight] = deque()
        self._passes = self._cycles = self._committed = self._prompt_tokens = self._prefix_hits = 0
        self._row_use_seconds = self._last_end = 0.0
        self._publish()

    # --- requests

    def submit(self, request: Request, masks: Sequence[TokenMask | None] | None = None) -> None:
        """Queue a request. Raises RequestError for one that can never be served. masks: what `prepare` gave for it."""
        self._check(request)
        if masks is None:
            masks = self._admission.masks(request.params)
        choices = self._admission.sequences(request, masks)
        self._by_request[request.request_id] = choices
        for sequence in choices:
            self._scheduler.add(sequence)
        self._publish()

    def check(self, request: Request) -> None:
        """Raise RequestError, naming the field, if `submit` would refuse the request. Any thread may call it."""
        self.prepare(replace(request, params=replace(request.params, n=1)))

    def prepare(self, request: Request) -> list[TokenMask | None]:
        """The token mask of each choice. Raises RequestError, naming the field, if `submit` would refuse the request.

        Any thread may call it, so that a new grammar, which takes up to a second to compile, holds up no pass.
        """
        self._check(request)
        return self._admission.masks(request.params)

    def _check(self, request: Request) -> None:
        # A single dict lookup, which is safe on any thread.
        if request.request_id in self._by_request:
            raise RequestError(f"a request with id {request.request_id!r} is already running", "request_id")
        self._admission.check(request)

    def cancel(self, request_id: str) -> None:
        """Drop a request's unfinished choices and free their pages; unknown and finished ids are ignored."""
        for sequence in self._by_request.pop(request_id, ()):
            if sequence.finish_reason is None:
                sequence.finish_reason = "cancelled"
                self._scheduler.remove(sequence)
        self._publish()

    # --- the loop

    def step(self) -> list[Chunk]:
        """Plan and launch a pass, and return the chunks of the passes that are over.

        A pass stays in flight if the next one can be planned before its picks are known, and if the runner feeds tokens. The
        next step then launches another pass before it reads these picks.
        """
        begin = time.perf_counter()
        chunks: list[Chunk] = []
        if not self._scheduler.promise_pages() and self._in_flight:
            # A preempted sequence is computed again from its committed tokens, so none of its tokens may be in flight.
            chunks += self._collect(keep=0)
        planned = self._scheduler.plan()
        if planned:
            self._launch(planned)
        ahead = bool(planned) and self._in_flight[-1].ahead
        chunks += self._collect(keep=int(ahead))
        if ahead:
            advance(self._in_flight[-1], self._scheduler)
        self._row_use_seconds += self._scheduler.row_use * (time.perf_counter() - begin)
        self._publish()
        return chunks

    def _launch(self, planned: list[PlannedTurn]) -> None:
        """Start a pass."""
        groups: list[RowGroup] = []
        rows: list[PickRows] = []
        ahead = self.runner.feeds_tokens
        for part in planned:
            groups += part.turn.groups
            rows += pick_rows(part)
            if part.num_logits and not (part.turn.can_advance and part.sequence.takes_placeholders):
                ahead = False
        begin = time.perf_counter()
        launched = self.runner.launch(groups, rows)
        self._passes += 1
        self._in_flight.append(InFlight(planned, rows, launched, ahead, begin))
        for part in planned:
            if not part.decoding:
                self._scheduler.mark_computed(part.sequence, part.num_rows)

    def _collect(self, keep: int) -> list[Chunk]:
        """Wait for all passes in flight except the last `keep`, and commit their picks."""
        chunks: list[Chunk] = []
        while len(self._in_flight) > keep:
            done = self._in_flight.popleft()
            # Wait for a pass without picks, too: the runner has room for one pass that has not been waited for.
            picks = iter(follow_masks(done.launched.logits, done.rows, done.launched.picks()))
            records: list[TurnRecord] | None = [] if self.observer is not None else None
            row = 0
            for part in done.planned:
                if not part.num_logits:
                    continue
                first, row = row, row + part.num_logits
                scored = first + part.num_scoring
                scores = next(picks) if part.num_scoring else []
                # In the order of pick_rows: one list for the scoring rows, then one for each group with further logits.
                picked = [
                    next(picks) if group.num_logits > part.num_scoring else [] for group in part.turn.groups
                ]
                sequence = part.sequence
                if sequence.finish_reason is not None:
                    continue  # It ended, or was cancelled, while this pass was in flight.
                if NO_TOKEN in scores:
                    chunks.append(self._fail(sequence, NO_NUMBERS))
                    continue
                if part.num_scoring:
                    score_prompt(part, done.launched.logits[first:scored])
                if part.num_logits > part.num_scoring:
                    chunk = self._commit(part, picked, done.launched.logits, scored, records)
                    if chunk is not None:
                        chunks.append(chunk)
            self._tell(done, records)
        return chunks

    def _commit(
        self,
        part: PlannedTurn,
        picks: list[list[int]],
        logits: Tensor,
        first_row: int,
        records: list[TurnRecord] | None,
    ) -> Chunk | None:
        """Turn a part's picks into tokens, and append these to the sequence. Returns their chunk, or None if there is none.

        picks: a list for each group. logits, first_row: see `tokens_chunk`. records: gets the record of the turn.
        """
        sequence, turn = part.sequence, part.turn
        commit = Commit(picks[0])
        if part.decoding:
            commit = self._scheduler.schedule_of(sequence).commit(sequence, turn, picks)
        before = sequence.num_generated
        first = before == 0
        sequence.passes += not first
        tokens, error = commit.tokens, None
        del sequence.placeholders[: part.num_advanced]
        if sequence.params.max_tokens == 0 and NO_TOKEN not in tokens:
            sequence.finish_reason = "length"
        elif tokens:
            error = append_tokens(sequence, tokens)
        taken = sequence.tokens[sequence.num_prompt + before :]
        if records is not None:
            records.append(
                TurnRecord(sequence.request_id, sequence.index, turn, tuple(picks), commit.num_accepted)
            )
        if not tokens and sequence.finish_reason is None:
            return None
        if sequence.mask is not None and sequence.mask.error is not None:
            return self._fail(sequence, sequence.mask.error, sequence.mask.param)
        if first:
            self._prompt_tokens += sequence.num_prompt
            self._prefix_hits += sequence.num_cached
        else:
            ends_cycle = turn.ends_cycle or sequence.finish_reason is not None
            sequence.cycles += ends_cycle
            self._cycles += ends_cycle
            self._committed += len(taken)
        # The keys and values of x_n and of the accepted drafts are final.
        if part.decoding and not part.num_advanced:
            self._scheduler.mark_computed(sequence, len(taken))
        else:
            self._scheduler.name_pages(sequence)
        if sequence.finish_reason is not None:
            self._finish(sequence)
        return tokens_chunk(sequence, turn, commit, taken, logits, first_row, first, error)

    def _fail(self, sequence: SequenceState, error: str, param: str | None = None) -> Chunk:
        """End a sequence that cannot go on, with an error chunk. param: the request's field that is at fault, if any."""
        sequence.finish_reason = "error"
        self._finish(sequence)
        return final_chunk(sequence, error, param)

    def _finish(self, sequence: SequenceState) -> None:
        self._scheduler.remove(sequence)
        choices = self._by_request[sequence.request_id]
        if all(choice.finish_reason is not None for choice in choices):
            del self._by_request[sequence.request_id]

    # --- state

    @property
    def schedule_name(self) -> str:
        """The name of the schedule that the settings choose for this model."""
        return self.config.schedule_for(self.model_config)

    @property
    def takes_grammars(self) -> bool:
        """Whether requests may have a grammar: that takes a tokenizer and a token that ends a text."""
        return self._admission.takes_grammars

    @property
    def has_work(self) -> bool:
        return bool(self._by_request)

    def is_live(self, request_id: str) -> bool:
        """Whether some choice of the request is unfinished."""
        return request_id in self._by_request

    def live_requests(self) -> list[str]:
        """Ids of the requests that have an unfinished choice. Any thread may call it: copying the keys is one call into C."""
        return list(self._by_request)

    def recent_prefixes(self, limit: int) -> list[PageHash]:
        """Hashes of the `limit` cached pages used last, newest first, as `page_hashes` computes them from prompts.

        Any thread may call it.
        """
        return self._pool.recent(limit)

    def _publish(self) -> None:
        """Replace `stats`, the snapshot that other threads read."""
        scheduler = self._scheduler
        self.stats = EngineStats(
            passes=self._passes,
            cycles=self._cycles,
            committed=self._committed,
            preemptions=scheduler.num_preempted,
            prompt_tokens=self._prompt_tokens,
            prefix_hit_tokens=self._prefix_hits,
            admitted=scheduler.num_admitted,
            queue_wait_seconds=scheduler.queue_wait_seconds,
            row_use_seconds=self._row_use_seconds,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            rows_to_prefill=scheduler.rows_to_prefill,
            oldest_queued_at=scheduler.oldest_queued_at,
            kv_pages_used=self._pool.used,
            kv_pages_total=self._pool.capacity,
        )

    def _tell(self, done: InFlight, records: list[TurnRecord] | None) -> None:
        """Report a pass to the observer, and its time to the schedule. records: of its turns, if there is an observer."""
        end, last_end = time.perf_counter(), self._last_end
        seconds = end - max(done.begin, last_end)
        self._last_end = end
        if self.observer is not None and records is not None:
            num_rows = sum(part.num_rows for part in done.planned)
            self.observer(PassRecord(tuple(records), num_rows, seconds, done.ahead))
        # Left out: a pass that was launched after the last one had ended, because the device waited for the host.
        if self._watchers and (done.begin < last_end or not self.runner.feeds_tokens):
            tell_time(self._watchers, done.planned, seconds)

    # --- set-up

    def use_device(self) -> None:
        """Make the engine's GPU, if it has one, the current device of this thread."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def schedule_context(self) -> ScheduleContext:
        """What a schedule for this engine is built from. Use its timer only while nothing runs: it overwrites the cache."""
        timer = PassTimer(
            partial(time_pass, self.runner),
            context=self.max_model_len,
            page_size=self.page_size,
            num_pages=self._pool.capacity + 1,
            max_batch=self.config.max_num_seqs,
            max_rows=self.limits.decode_rows,
            filled_to=self.runner.row_sizes,
        )
        return ScheduleContext(
            config=self.config,
            model=self.model_config,
            max_model_len=self.max_model_len,
            max_pass_rows=self.limits.decode_rows,
            mixes_views=self.forward.draft is None,
            pool=self._pool,
            page_size=self.page_size,
            picks_ranks=self.runner.picks_ranks,
            medusa_heads=self.forward.num_medusa_heads,
            watch=self._watchers.append,
            timer=timer,
        )

    def use_schedule(self, schedule: Schedule) -> None:
        """Decode with another schedule, while no request runs. Raises ValueError if its turns have too many groups."""
        assert not self.has_work, "a sequence's state belongs to its schedule"
        if (groups := schedule.max_groups) > self._max_groups:
            raise ValueError(
                f"the schedule's turns have up to {groups} groups, and the engine has room for {self._max_groups}, as many as "
                f"{self.schedule_name!r} needs: choose the schedule in the engine's settings instead"
            )
        self._collect(keep=0)
        self._scheduler.schedule = schedule

    def use_runner(self, runner: ModelRunner) -> None:
        """Run passes with another runner from now on. No request may be running."""
        assert not self.has_work, "passes in flight belong to their runner"
        self._collect(keep=0)
        self.runner = runner
