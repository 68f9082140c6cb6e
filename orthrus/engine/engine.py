"""The engine: requests in, chunks of committed tokens out, one forward pass a step. It knows nothing of threads or Ray."""

import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import NO_TOKEN
from orthrus.cache.kv_cache import KVCache
from orthrus.cache.kv_formats import kv_bytes_per_token
from orthrus.cache.page_hash import PageHash
from orthrus.cache.page_pool import PagePool
from orthrus.engine.config import EngineConfig
from orthrus.engine.logprobs import SCORED, prompt_logprobs, token_logprobs
from orthrus.engine.scheduler import Planned, Scheduler
from orthrus.errors import ConfigError, RequestError
from orthrus.loading import stages
from orthrus.malloc import keep_freed_memory
from orthrus.models.checkpoint import compute_dtype, load_weights, with_own_head
from orthrus.models.config import ModelConfig
from orthrus.models.families import load_config
from orthrus.models.files import weight_bytes
from orthrus.models.forward import LayerParallelForward
from orthrus.models.hub import resolve
from orthrus.plan import RowGroup, View
from orthrus.requests.request import (
    Chunk,
    Completion,
    PromptLogprobs,
    Request,
    SamplingParams,
    TokenLogprob,
    joined_chunks,
)
from orthrus.requests.sequence import Sequence
from orthrus.requests.token_mask import TokenMask
from orthrus.runner.eager import EagerRunner
from orthrus.runner.protocol import LaunchedPass, ModelRunner
from orthrus.runner.sampler import PickRows
from orthrus.schedules import Schedule
from orthrus.schedules.ar import ARSchedule
from orthrus.schedules.orthrus import OrthrusSchedule
from orthrus.schedules.pass_cost import measure_decode_cost
from orthrus.schedules.planner import DraftPlanner
from orthrus.text.grammar_mask import GrammarMasks
from orthrus.text.stream import TextStream
from orthrus.text.tokenizer import load_tokenizer
from orthrus.text.word_mask import JointMask, WordMask, WordRules

logger = logging.getLogger(__name__)

_DEFAULT_CPU_CACHE_BYTES = 2 << 30
_NO_NUMBERS = (
    "the model's scores for the next token are NaN or infinite: its weights are damaged, or its dtype is too small for them "
    "(load it in bfloat16 or float32)"
)
DECODE_ROWS = 512
"""Most rows of decoding sequences in a pass: beyond it, a row costs a GPU more than a draft brings. One each, at least."""
SCORE_ROWS = 64
"""Rows that score prompts while decoding sequences fill a pass: as many more logits have room."""


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start (passes to row_use_seconds) and the state now (the rest).

    cycles, committed: decode commits of all sequences and the tokens they brought; tokens per cycle is their ratio.
    prompt_tokens, prefix_hit_tokens: of sequences that got their first token, and how many of them were in the cache.
    admitted, queue_wait_seconds: sequences that left the queue, and how long they waited in all. row_use_seconds: time
    spent in passes, each weighted with how full it was (`Scheduler.row_use`); its rate is the row-budget use.
    rows_to_prefill: prompt rows to compute. oldest_wait: the longest that one in the queue has waited, in seconds.
    """

    passes: int
    cycles: int
    committed: int
    preemptions: int
    prompt_tokens: int
    prefix_hit_tokens: int
    admitted: int
    queue_wait_seconds: float
    row_use_seconds: float
    running: int
    waiting: int
    rows_to_prefill: int
    oldest_wait: float
    kv_pages_used: int
    kv_pages_total: int

    @property
    def tokens_per_cycle(self) -> float:
        return self.committed / self.cycles if self.cycles else 1.0


def choose_device(device: str) -> torch.device:
    """The device that a setting names; "auto" is CUDA where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


class Engine:
    """Serves one model. `submit` requests, call `step` while `has_work`; or `generate` for a blocking batch."""

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        weights: dict[str, Tensor],
        tokenizer: Any = None,
        masks: Callable[[str], TokenMask] | None = None,
    ) -> None:
        """`weights`: a checkpoint's tensors by Hugging Face name, on the device; the dict is emptied.

        tokenizer: a Hugging Face one, needed for stop strings only. masks: makes the token mask of a sequence from
        `SamplingParams.grammar`, or raises RequestError. Raises ConfigError.
        """
        model_config = with_own_head(model_config, weights)
        config.check_model(model_config)
        self.config = config
        self.model_config = model_config
        self.tokenizer = tokenizer
        self._masks = masks
        # A request's rules are asked for when it is checked, and again when it is submitted.
        self._word_rules = lru_cache(maxsize=32)(partial(WordRules, tokenizer, model_config.vocab_size))
        self.forward = LayerParallelForward(model_config, weights)
        self.device = self.forward.device
        self.use_device()

        self.page_size = config.page_size or (64 if self.device.type == "cuda" else 16)
        if self.device.type == "cuda" and self.page_size % 64:
            raise ConfigError(
                f"page_size {self.page_size} is too small for a GPU, which reads 64 tokens at a time: leave it out or set it "
                "to 64, 128 or 256"
            )
        num_pages = self._num_pages()
        self.max_model_len = self._context_limit(num_pages * self.page_size)
        self.forward.use_context(self.max_model_len)
        self.cache = KVCache.allocate(
            model_config, num_pages + 1, self.page_size, self.device, self.forward.dtype
        )
        self._pool = PagePool(num_pages + 1, config.prefix_caching)
        self._runner = self._make_runner()
        self._scheduler = Scheduler(
            self._make_schedule(),
            self._pool,
            page_size=self.page_size,
            max_num_seqs=config.max_num_seqs,
            prefill_chunk=config.prefill_chunk,
            decode_rows=self._decode_rows,
            score_rows=SCORE_ROWS,
        )
        self._by_request: dict[str, list[Sequence]] = {}
        self._in_flight: deque[_InFlight] = deque()
        self._passes = self._cycles = self._committed = self._prompt_tokens = self._prefix_hits = 0
        self._row_use_seconds = 0.0

    @classmethod
    def from_pretrained(cls, config: EngineConfig) -> "Engine":
        """Load the checkpoint (directory or hub id) and tokenizer that `config.model` names. Raises ConfigError."""
        path = resolve(config.model)
        model_config = load_config(path)
        device = choose_device(config.device)
        _check_memory(model_config, device, compute_dtype(config.dtype, model_config, device))
        stages.info("loading the weights of %s", model_config.name)
        weights = load_weights(path, model_config, device, config.dtype)
        has_tokenizer = any(
            (Path(path) / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")
        )
        if not has_tokenizer:
            return cls(config, model_config, weights)
        tokenizer = load_tokenizer(path)
        masks = None
        if model_config.eos_token_ids:  # Else no text under a grammar could end.
            masks = GrammarMasks(tokenizer, model_config.vocab_size, model_config.eos_token_ids)
        return cls(config, model_config, weights, tokenizer, masks)

    def use_device(self) -> None:
        """Launch what this thread launches on the engine's GPU, if it has one."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    @property
    def schedule_name(self) -> str:
        """The schedule in use: "ar" or "orthrus"."""
        if self.config.schedule != "auto":
            return self.config.schedule
        return "orthrus" if self.model_config.has_diffusion else "ar"

    @property
    def takes_grammars(self) -> bool:
        """Whether requests may have a grammar: it takes a tokenizer and a token that ends a text."""
        return self._masks is not None

    @property
    def has_work(self) -> bool:
        return bool(self._by_request)

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            passes=self._passes,
            cycles=self._cycles,
            committed=self._committed,
            preemptions=self._scheduler.preemptions,
            prompt_tokens=self._prompt_tokens,
            prefix_hit_tokens=self._prefix_hits,
            admitted=self._scheduler.admitted,
            queue_wait_seconds=self._scheduler.queue_wait_seconds,
            row_use_seconds=self._row_use_seconds,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            rows_to_prefill=self._scheduler.rows_to_prefill,
            oldest_wait=self._scheduler.oldest_wait,
            kv_pages_used=self._pool.used,
            kv_pages_total=self._pool.capacity,
        )

    def recent_prefixes(self, limit: int) -> list[PageHash]:
        """Names of the cached pages used last, newest first: what `page_hashes` gives for the prompts that they begin."""
        return self._pool.recent(limit)

    def live_requests(self) -> list[str]:
        """Ids of the requests that some choice is unfinished of. Other threads may ask too."""
        return list(self._by_request)

    def is_live(self, request_id: str) -> bool:
        """Whether some choice of the request is unfinished."""
        return request_id in self._by_request

    # --- requests

    def submit(self, request: Request, masks: Seq[TokenMask | None] | None = None) -> None:
        """Queue a request. Raises RequestError for one that can never be served. masks: what `prepare` gave for it."""
        self._check(request)
        if masks is None:
            masks = self._token_masks(request.params)
        params = request.params.with_seed()
        prompt = list(request.prompt)
        limit = self.max_model_len
        max_length = limit if params.max_tokens is None else min(limit, len(prompt) + params.max_tokens)
        # A prompt that is only scored has room for the pick of its last row, which nobody gets.
        max_length = max(max_length, len(prompt) + 1)
        stop_ids = frozenset(params.stop_token_ids) | frozenset(
            () if params.ignore_eos else self.model_config.eos_token_ids
        )
        known = range(self.model_config.vocab_size)
        ends = tuple(sorted(token for token in stop_ids if token in known)) if params.min_tokens else ()
        choices: list[Sequence] = []
        for index, mask in enumerate(masks):
            choices.append(
                Sequence(
                    request_id=request.request_id,
                    index=index,
                    params=params,
                    seed=params.choice_seed(index),
                    tokens=prompt.copy(),
                    num_prompt=len(prompt),
                    max_length=max_length,
                    stop_ids=stop_ids,
                    ends=ends,
                    text=TextStream(
                        self.tokenizer, params.stop, params.skip_special_tokens, params.min_tokens
                    )
                    if params.stop
                    else None,
                    mask=mask,
                    leader=choices[0] if choices else None,
                    priority=request.priority,
                    cache_salt=request.cache_salt,
                    unscored=range(0 if index or params.prompt_logprobs is None else len(prompt) - 1),
                )
            )
        self._by_request[request.request_id] = choices
        for sequence in choices:
            self._scheduler.add(sequence)

    def check(self, request: Request) -> None:
        """Raise RequestError, naming the field, if `submit` would refuse the request."""
        self.prepare(replace(request, params=replace(request.params, n=1)))

    def prepare(self, request: Request) -> list[TokenMask | None]:
        """The token mask of each choice. Raises RequestError, naming the field, if `submit` would refuse the request.

        Any thread may call it: a new grammar takes up to a second to compile.
        """
        self._check(request)
        return self._token_masks(request.params)

    def _check(self, request: Request) -> None:
        """`check` without the masks."""
        prompt, params, vocab = request.prompt, request.params, self.model_config.vocab_size
        if request.request_id in self._by_request:
            raise RequestError(f"a request with id {request.request_id!r} is already running", "request_id")
        if not prompt:
            raise RequestError("the prompt must have at least one token", "prompt")
        new = params.max_tokens != 0
        if len(prompt) + new > self.max_model_len:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, and the context limit of {self.max_model_len} must hold it"
                f"{' and at least one new token' if new else ''}: shorten the prompt",
                "prompt",
            )
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise RequestError(f"prompt token ids must be between 0 and {vocab - 1}", "prompt")
        if any(not 0 <= token < vocab for token in params.logit_bias):
            raise RequestError(f"logit_bias token ids must be between 0 and {vocab - 1}", "logit_bias")
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this model was loaded without one", "stop")

    def _token_masks(self, params: SamplingParams) -> list[TokenMask | None]:
        """The token mask of each choice, None if it is free. Raises RequestError."""
        if params.grammar is not None and self._masks is None:
            missing = "a tokenizer" if self.tokenizer is None else "an end-of-sequence token (eos_token_id)"
            raise RequestError(
                f"structured output and forced tool calls need {missing}, and this model has none", "grammar"
            )
        rules = (
            self._word_rules(params.bad_words, params.allowed_token_ids) if params.has_word_rules else None
        )

        def mask() -> TokenMask | None:
            words = WordMask(rules) if rules is not None else None
            if params.grammar is None:
                return words
            assert self._masks is not None
            grammar = self._masks(params.grammar)
            return grammar if words is None else JointMask(grammar, words)

        return [mask() for _ in range(params.n)]

    def cancel(self, request_id: str) -> None:
        """Drop a request's unfinished choices and free their pages; unknown and finished ids are ignored."""
        for sequence in self._by_request.pop(request_id, ()):
            if sequence.finish_reason is None:
                sequence.finish_reason = "cancelled"
                self._scheduler.remove(sequence)

    # --- passes

    def step(self) -> list[Chunk]:
        """Launch a pass over what is due, and return the chunks of passes that are over, in order of arrival.

        Where the runner feeds tokens, a pass whose picks nothing but the next one's tokens depends on stays in flight,
        and the next step launches on top of it.
        """
        begin = time.perf_counter()
        chunks: list[Chunk] = []
        if self._in_flight and self._scheduler.may_preempt():
            chunks += self._collect(keep=0)  # Only what is known is computed again.
        planned = self._scheduler.plan()
        if planned:
            self._launch(planned)
        chunks += self._collect(keep=int(bool(planned) and self._in_flight[-1].ahead))
        row_use = self._scheduler.row_use(planned)
        self._row_use_seconds += row_use * (time.perf_counter() - begin)
        return chunks

    def _launch(self, planned: list[Planned]) -> None:
        groups = [group for part in planned for group in part.groups]
        rows = [row for part in planned for group in part.groups for row in self._pick_rows(part, group)]
        launched = self._runner.launch(groups, rows)
        self._passes += 1
        schedule = self._scheduler.schedule
        ahead = self._runner.feeds_tokens and all(
            part.sequence.foreseeable and (not part.decoding or schedule.foresees(part.groups))
            for part in planned
            if part.num_logits
        )
        self._in_flight.append(_InFlight(planned, launched, ahead))
        places = itertools.count(-1 - launched.first_pick, -1)
        for part in planned:
            sequence = part.sequence
            feeds = [list(itertools.islice(places, group.num_logits)) for group in part.groups]
            if not part.decoding:
                self._scheduler.computed(sequence, len(part.groups[0].tokens))
                if ahead:
                    sequence.foreseen += feeds[0]
            elif ahead:
                before = len(sequence.foreseen)
                schedule.foresee(sequence, part.groups, feeds)
                self._scheduler.computed(sequence, len(sequence.foreseen) - before)

    def _collect(self, keep: int) -> list[Chunk]:
        """Wait for the passes in flight but for the last `keep`, and commit their picks."""
        chunks = []
        while len(self._in_flight) > keep:
            this = self._in_flight.popleft()
            # Also for a pass without picks: the runner has no room for more than one that has not been waited for.
            picks = iter(this.launched.picks())
            row = 0
            for part in this.planned:
                if not part.num_logits:
                    continue
                first, row = row, row + part.num_logits
                scored = first + part.scoring
                scoring = next(picks) if part.scoring else []
                picked = [next(picks) for group in part.groups if group.num_logits > part.scoring]
                if part.sequence.finish_reason is not None:
                    continue  # It ended, or was cancelled, while this pass was on its way.
                if NO_TOKEN in scoring:
                    chunks.append(self._fail(part.sequence, _NO_NUMBERS))
                    continue
                if part.scoring:
                    self._score_prompt(part, this.launched.logits[first:scored])
                if not picked:
                    continue
                chunk = self._commit(part, picked, this.launched.logits[scored:row], this.ahead)
                if chunk is not None:
                    chunks.append(chunk)
        return chunks

    def generate(
        self, prompts: Seq[Seq[int]], params: SamplingParams | Seq[SamplingParams] | None = None
    ) -> list[list[Completion]]:
        """Complete prompts (token ids) and wait: for each prompt, its `n` completions. Other requests go on meanwhile.

        params: one for all or one per prompt; defaults to greedy. Raises RequestError before anything runs.
        """
        each = (
            [params or SamplingParams(temperature=0.0)] * len(prompts)
            if not isinstance(params, Seq)
            else list(params)
        )
        requests = [
            Request(f"generate-{next(_request_numbers)}", prompt, p)
            for prompt, p in zip(prompts, each, strict=True)
        ]
        for request in requests:
            self.check(request)
        collected: dict[tuple[str, int], list[Chunk]] = {
            (r.request_id, i): [] for r in requests for i in range(r.params.n)
        }
        for request in requests:
            self.submit(request)
        open_choices = set(collected)
        while open_choices:
            for chunk in self.step():
                key = (chunk.request_id, chunk.index)
                if key in collected:
                    collected[key].append(chunk)
                    if chunk.finish_reason is not None:
                        open_choices.discard(key)
        return [[_completion(collected[r.request_id, i]) for i in range(r.params.n)] for r in requests]

    def score(self, tokens: Seq[int]) -> Tensor:
        """The AR view's logits after every prefix of `tokens`: [len(tokens), vocab_size].

        Raises RequestError if there are too many tokens, and while requests are running.
        """
        self.check(Request(f"score-{next(_request_numbers)}", tokens))
        pages = None if self.has_work else self._pool.allocate(-(-len(tokens) // self.page_size))
        if pages is None:
            raise RequestError("tokens can't be scored now: wait for running requests", "prompt")
        self._collect(keep=0)
        chunk = min(self.config.prefill_chunk, self._runner.max_logits)
        try:
            spans = [(start, list(tokens[start : start + chunk])) for start in range(0, len(tokens), chunk)]
            return torch.cat(
                [
                    self._runner.logits([RowGroup(View.AR, span, at, pages, 0, len(span))])
                    for at, span in spans
                ]
            )
        finally:
            self._pool.release(pages)

    def _pick_rows(self, part: Planned, group: RowGroup) -> Iterator[PickRows]:
        """How to pick from the group's rows that need logits: first from those that score the prompt, then from the others."""
        sequence, position = part.sequence, group.start + group.logits_from + 1
        if part.scoring:
            yield PickRows(SCORED, seed=0, position=position, count=part.scoring)
        if group.num_logits == part.scoring:
            return
        penalised = sequence.params.has_penalties
        yield PickRows(
            params=sequence.params,
            seed=sequence.seed,
            position=position + part.scoring,
            count=group.num_logits - part.scoring,
            prompt=sequence.tokens[: sequence.num_prompt] if penalised else (),
            generated=sequence.tokens[sequence.num_prompt :] if penalised else (),
            ahead=group.tokens[1:] if group.view is View.AR and part.decoding else (),
            mask=sequence.mask,
            drafting=group.view is View.DIFFUSION,
            ends=sequence.ends,
            may_end=sequence.num_prompt + sequence.params.min_tokens,
        )

    def _score_prompt(self, part: Planned, logits: Tensor) -> None:
        """Note the log-probabilities of the prompt tokens after the part's scoring rows, whose logits these are."""
        sequence, top = part.sequence, part.sequence.params.prompt_logprobs
        assert top is not None, "only then are there scoring rows"
        rows = sequence.unscored[: part.scoring]
        sequence.unscored = sequence.unscored[part.scoring :]
        sequence.scores.append(prompt_logprobs(logits, sequence.tokens[rows.start + 1 : rows.stop + 1], top))

    def _take_scores(self, sequence: Sequence) -> PromptLogprobs | None:
        """What the first chunk of choice 0 says of the prompt, None if nothing was asked; nothing is kept here."""
        top = sequence.params.prompt_logprobs
        if top is None or sequence.index:
            return None
        scores = sequence.scores
        sequence.scores = []
        none = torch.zeros(0, self.model_config.vocab_size)
        return PromptLogprobs.joined(scores or [prompt_logprobs(none, [], top)])

    def _commit(self, part: Planned, picks: list[list[int]], logits: Tensor, foreseen: bool) -> Chunk | None:
        """Let the schedule turn picks into tokens, append them one by one, and report them. None if nothing came of it.

        foreseen: the sequence has gone on since as if the picks were known.
        """
        sequence = part.sequence
        schedule = self._scheduler.schedule
        tokens = schedule.commit(sequence, part.groups, picks) if part.decoding else picks[0]
        first = sequence.num_generated == 0
        sequence.passes += not first
        if sequence.params.max_tokens == 0 and NO_TOKEN not in tokens:
            tokens, sequence.finish_reason = [], "length"
        elif not tokens:
            return None
        if foreseen:
            del sequence.foreseen[: len(tokens)]
        before = sequence.num_generated
        error = None
        for token in tokens:
            if token == NO_TOKEN:
                sequence.finish_reason, error = "error", _NO_NUMBERS
                break
            sequence.append(token)
            if sequence.finish_reason is not None:
                break
        if sequence.mask is not None and sequence.mask.error is not None:
            return self._fail(sequence, sequence.mask.error, sequence.mask.param)
        taken = sequence.tokens[sequence.num_prompt + before :]
        if first:
            self._prompt_tokens += sequence.num_prompt
            self._prefix_hits += sequence.cached_tokens
        else:
            # A draft pass with a lead commits tokens too, but its cycle goes on.
            ends_cycle = all(group.view is View.AR for group in part.groups)
            sequence.cycles += ends_cycle
            self._cycles += ends_cycle
            self._committed += len(taken)
        # Every row whose input was committed is final: x_n and the accepted drafts.
        if part.decoding and not foreseen:
            self._scheduler.computed(sequence, len(taken))
        else:
            self._scheduler.name_pages(sequence)
        top = sequence.params.logprobs
        logprobs: tuple[TokenLogprob, ...] | None = None
        if top is not None:
            logprobs = token_logprobs(logits[: len(taken)], taken, top)
        finished = sequence.finish_reason is not None
        if finished:
            self._finish(sequence)
        return Chunk(
            request_id=sequence.request_id,
            index=sequence.index,
            token_ids=tuple(taken),
            logprobs=logprobs,
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
            stats=sequence.stats() if finished else None,
            prompt_logprobs=self._take_scores(sequence) if first else None,
            error=error,
        )

    def _fail(self, sequence: Sequence, error: str, param: str | None = None) -> Chunk:
        """End a choice that can't go on; for what its request asks in `param`, if that is why."""
        sequence.finish_reason = "error"
        self._finish(sequence)
        return Chunk(
            sequence.request_id,
            sequence.index,
            (),
            finish_reason="error",
            stats=sequence.stats(),
            error=error,
            error_param=param,
        )

    def _finish(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        choices = self._by_request[sequence.request_id]
        if all(s.finish_reason is not None for s in choices):
            del self._by_request[sequence.request_id]

    # --- set-up

    @property
    def _decode_rows(self) -> int:
        """Most rows of decoding sequences in a pass."""
        return max(DECODE_ROWS, self.config.max_num_seqs)

    def _num_pages(self) -> int:
        """Pages of the KV cache, without the padding page."""
        config, model = self.config, self.model_config
        tokens = config.kv_cache_tokens
        if tokens is None:
            width = kv_bytes_per_token(model, self.forward.dtype.itemsize)
            full = (config.max_model_len or model.max_position_embeddings) * config.max_num_seqs
            tokens = min(full, max(self._cache_bytes() // width, self.page_size))
        return -(-tokens // self.page_size)

    def _cache_bytes(self) -> int:
        """Memory for the KV cache where no setting says how much."""
        if self.device.type != "cuda":
            return _DEFAULT_CPU_CACHE_BYTES
        from orthrus.runner.cuda_graphs import (
            pass_bytes,  # Needs Triton, which machines without a GPU may lack.
        )

        share = self.config.gpu_memory_utilization
        free, size = torch.cuda.mem_get_info(self.device)
        # What passes need comes on top of what is in use now.
        passes = pass_bytes(self.forward, self.page_size, self._max_rows, self._max_logits)
        left = int(size * share) - (size - free) - passes
        if left <= 0:
            raise ConfigError(
                f"the model leaves no GPU memory for a KV cache: {_gib(size - free)} are in use with its weights, passes need "
                f"{_gib(passes)}, and gpu_memory_utilization {share:g} of {_gib(size)} is {_gib(size * share)}: "
                f"{_gib(-left)} are missing. Raise gpu_memory_utilization, lower max_num_seqs or prefill_chunk, or take a "
                "larger GPU"
            )
        return left

    @property
    def _max_rows(self) -> int:
        return self.config.prefill_chunk + self._decode_rows

    @property
    def _max_logits(self) -> int:
        """Rows that need logits: all of decoding sequences, one of each prompt that ends in the pass, and what scores prompts."""
        return self._decode_rows + self.config.max_num_seqs + SCORE_ROWS

    def _make_runner(self) -> ModelRunner:
        if self.device.type != "cuda" or self.forward.dtype == torch.float64:
            keep_freed_memory()
            return EagerRunner(self.forward, self.cache)
        from orthrus.runner.cuda_graphs import CudaGraphRunner

        stages.info("capturing CUDA graphs")
        return CudaGraphRunner(
            self.forward,
            self.cache,
            max_rows=self._max_rows,
            max_logits=self._max_logits,
            # A sequence may have a group in each view.
            max_pages=2 * self.config.max_num_seqs * -(-self.max_model_len // self.page_size),
        )

    def _context_limit(self, cache_tokens: int) -> int:
        """The context limit in tokens: as set, else the model's, as far as the cache holds one such sequence."""
        wanted = self.config.max_model_len
        trained = self.model_config.max_position_embeddings
        if wanted is not None and wanted > cache_tokens:
            raise ConfigError(
                f"the KV cache holds {cache_tokens} tokens, fewer than max_model_len {wanted}: raise kv_cache_tokens "
                f"to {wanted} or lower max_model_len"
            )
        if wanted is None and trained > cache_tokens:
            logger.warning("context limit lowered from %d to the KV cache's %d tokens", trained, cache_tokens)
        return wanted or min(trained, cache_tokens)

    def _make_schedule(self) -> Schedule:
        model = self.model_config
        if self.schedule_name == "ar":
            return ARSchedule()
        assert model.block_size is not None and model.mask_token_id is not None, "checked by check_model"
        rows = self.config.draft_length or model.block_size
        cost = None
        if self.config.adaptive_draft and self.max_model_len > 2:  # Else no block fits.
            stages.info("measuring what passes cost")
            cost = measure_decode_cost(
                self._run_once,
                context=self.max_model_len,
                page_size=self.page_size,
                num_pages=self._pool.capacity + 1,
                max_batch=self.config.max_num_seqs,
                max_rows=self._decode_rows,
                mask_token_id=model.mask_token_id,
            )
            logger.info("decode cost: %s", cost)
        planner = DraftPlanner(rows, cost, self._decode_rows, self.config.draft_lead)
        return OrthrusSchedule(planner, model.mask_token_id)

    def use_schedule(self, schedule: Schedule) -> None:
        """Decode by another schedule from now on, while nothing runs."""
        assert not self.has_work, "a sequence's state belongs to its schedule"
        self._collect(keep=0)
        self._scheduler.schedule = schedule

    def use_runner(self, runner: ModelRunner) -> None:
        """Run passes by another runner from now on, while nothing runs."""
        assert not self.has_work, "passes on their way belong to their runner"
        self._collect(keep=0)
        self._runner = runner

    def time_passes(self, view: View, rows: int, batch: int, context: int, count: int) -> list[float]:
        """Seconds of each of `count` passes that follow one another: `rows` rows in one view of `batch` sequences, greedy.

        Nothing may run meanwhile, and what the cache holds is overwritten.
        """
        each = -(-context // self.page_size)
        groups = [
            RowGroup(view, [0] * rows, context - rows, list(range(1 + i * each, 1 + (i + 1) * each)), 0, rows)
            for i in range(batch)
        ]
        params = SamplingParams(temperature=0.0)
        picking = [PickRows(params, seed=0, position=1, count=rows)] * batch
        times, before, begin = [], None, time.perf_counter()
        for _ in range(count + 2):
            launched = self._runner.launch(groups, picking)
            if before is not None:
                before.picks()
                times.append(time.perf_counter() - begin)
                begin = time.perf_counter()
            before = launched
        return times[1:]

    def _run_once(self, groups: list[RowGroup], temperature: float) -> None:
        """Run a pass to its end."""
        params = SamplingParams(temperature=temperature)
        rows = [PickRows(params, seed=0, position=1, count=g.num_logits) for g in groups if g.num_logits]
        self._runner.launch(groups, rows).picks()


@dataclass(frozen=True)
class _InFlight:
    """A pass whose picks have not been read. ahead: its sequences have gone on as if they were known."""

    planned: list[Planned]
    launched: LaunchedPass
    ahead: bool


def _check_memory(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ConfigError before anything is loaded if the device has no room for the weights."""
    wanted, name = weight_bytes(model, dtype.itemsize), str(dtype).removeprefix("torch.")
    if device.type == "cpu":
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if wanted > size:
            raise ConfigError(
                f"the weights of {model.name} need {_gib(wanted)} in {name}, and this machine has {_gib(size)} of memory: "
                "take a smaller model or a larger machine"
            )
    elif device.type == "cuda":
        free, size = torch.cuda.mem_get_info(device)
        if wanted > free:
            raise ConfigError(
                f"the weights of {model.name} need {_gib(wanted)} in {name}, and {_gib(free)} of the GPU's {_gib(size)} are "
                f"free: {_gib(wanted - free)} are missing. Free them, take a smaller model or a larger GPU, or set dtype to "
                "bfloat16"
            )


def _gib(size: float) -> str:
    return f"{size / (1 << 30):.1f} GiB"


_request_numbers = itertools.count()


def _completion(chunks: list[Chunk]) -> Completion:
    """One choice's chunks, the last of which has its finish reason and stats, as what they add up to."""
    whole = joined_chunks(chunks)
    assert whole.finish_reason is not None and whole.stats is not None
    return Completion(
        index=whole.index,
        token_ids=whole.token_ids,
        logprobs=whole.logprobs,
        finish_reason=whole.finish_reason,
        stop_reason=whole.stop_reason,
        stats=whole.stats,
        prompt_logprobs=whole.prompt_logprobs,
    )
