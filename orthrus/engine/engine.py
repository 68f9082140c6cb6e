"""`Engine`: an `EngineCore` that is loaded from a checkpoint, with calls that wait for their result."""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthrus.engine.config import EngineConfig
from orthrus.engine.core import EngineCore
from orthrus.engine.rank_processes import start_ranks
from orthrus.engine.rank_worker import check_devices, rank_device
from orthrus.engine.sizing import check_memory, choose_device
from orthrus.errors import RequestError
from orthrus.loading import stages
from orthrus.models.checkpoint import compute_dtype, open_weights
from orthrus.models.config import ModelConfig
from orthrus.models.families import load_config
from orthrus.models.hub import resolve
from orthrus.models.medusa import load_medusa
from orthrus.models.medusa_config import read_medusa
from orthrus.models.shard import Shard
from orthrus.plan import RowGroup, View
from orthrus.requests.request import Chunk, Completion, Request, SamplingParams, joined_chunks
from orthrus.text.grammar_mask import GrammarMasks
from orthrus.text.tokenizer import load_tokenizer


class Engine(EngineCore):
    """Serves one model. `submit` requests and call `step` while `has_work`; or `generate` for a blocking batch."""

    @classmethod
    def from_pretrained(cls, config: EngineConfig) -> "Engine":
        """Load the checkpoint (directory or hub id) and tokenizer that `config.model` names. Raises ConfigError."""
        path = resolve(config.model)
        model_config = config.with_settings(load_config(path))
        size = config.tensor_parallel_size
        shard = Shard(model_config, 0, size)
        config.check_model(model_config)
        check_devices(config)
        device = rank_device(config.device, 0) if size > 1 else choose_device(config.device)
        dtype = compute_dtype(config.dtype, model_config, device)
        heads_in = config.medusa_folder(path)
        medusa = None if heads_in is None else read_medusa(heads_in, model_config)
        check_memory(config, shard, device, dtype, medusa)
        load = partial(open_weights, path, model_config)
        tokenizer, grammar_masks = _load_tokenizer(path, model_config)
        with start_ranks(config, model_config, load) as ranks:
            stages.info("loading the weights of %s", model_config.name)
            # `check` ends the loading as soon as another rank has failed.
            weights = load(device, config.dtype, shard=shard, check=ranks.check)
            if heads_in is not None:
                weights.update(load_medusa(heads_in, model_config, device, dtype))
            return cls(config, model_config, weights, tokenizer, grammar_masks, ranks)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[list[Completion]]:
        """Complete prompts (token ids), wait, and return each prompt's `n` completions.

        params: one for all or one per prompt; defaults to greedy. For other requests and errors see `stream`.
        """
        if not isinstance(params, Sequence):
            params = [params or SamplingParams(temperature=0.0)] * len(prompts)
        requests = [
            Request(f"generate-{next(_request_numbers)}", prompt, own)
            for prompt, own in zip(prompts, params, strict=True)
        ]
        collected: dict[tuple[str, int], list[Chunk]] = defaultdict(list)
        for chunks in self.stream(requests):
            for chunk in chunks:
                collected[chunk.request_id, chunk.index].append(chunk)
        return [[_completion(collected[r.request_id, i]) for i in range(r.params.n)] for r in requests]

    def stream(self, requests: Sequence[Request]) -> Iterator[list[Chunk]]:
        """Submit requests, and yield their chunks after every step, until all of them have ended.

        Other requests go on meanwhile, but their chunks are lost. Raises RequestError before anything runs. Requests that have
        not ended when the caller stops are cancelled.
        """
        for request in requests:
            self.check(request)
        open_choices = {(r.request_id, i) for r in requests for i in range(r.params.n)}
        own = {request.request_id for request in requests}
        try:
            for request in requests:
                self.submit(request)
            while open_choices:
                chunks = [chunk for chunk in self.step() if chunk.request_id in own]
                open_choices -= {(c.request_id, c.index) for c in chunks if c.finish_reason is not None}
                yield chunks
        finally:
            for request in requests:
                self.cancel(request.request_id)

    def score(self, tokens: Sequence[int]) -> Tensor:
        """The AR view's logits after every prefix of `tokens`: [len(tokens), vocab_size].

        Raises RequestError if there are too many tokens, and while requests are running.
        """
        with self.scored(tokens) as (logits, _):
            return logits

    @contextmanager
    def scored(self, tokens: Sequence[int]) -> Iterator[tuple[Tensor, list[int]]]:
        """What `score` gives, and the pages that hold the keys and values of `tokens` as long as the context lasts."""
        self.check(Request(f"score-{next(_request_numbers)}", tokens))
        pages = None if self.has_work else self._pool.allocate(-(-len(tokens) // self.page_size))
        if pages is None:
            raise RequestError("tokens can't be scored now: wait for running requests", "prompt")
        self._collect(keep=0)
        chunk = min(self.config.prefill_chunk, self.runner.max_logits)
        logits = []
        try:
            for start in range(0, len(tokens), chunk):
                span = list(tokens[start : start + chunk])
                logits.append(self.runner.logits([RowGroup(View.AR, span, start, pages, 0, len(span))]))
            yield torch.cat(logits), pages
        finally:
            self._pool.release(pages)


_request_numbers = itertools.count()


def _load_tokenizer(path: Path, model: ModelConfig) -> tuple[Any, GrammarMasks | None]:
    """A checkpoint's tokenizer, and what makes masks of grammars for it. Both are None if the folder has no tokenizer."""
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None, None
    tokenizer = load_tokenizer(path)
    # Logits may have more columns than the tokenizer has tokens.
    end_token_ids = [token for token in model.eos_token_ids if token < len(tokenizer)]
    if not end_token_ids:
        return tokenizer, None  # No text under a grammar could end.
    return tokenizer, GrammarMasks(tokenizer, model.vocab_size, end_token_ids)


def _completion(chunks: list[Chunk]) -> Completion:
    """Join all chunks of one choice. The last one has its finish reason and stats."""
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
