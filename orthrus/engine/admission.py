"""Admission: whether a request can be served at all, and the state of its sequences."""

from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

from orthrus.errors import RequestError
from orthrus.models.config import ModelConfig
from orthrus.requests.request import Request, SamplingParams
from orthrus.requests.sequence import SequenceState
from orthrus.schedules.registry import SCHEDULES
from orthrus.text.stream import TextStream
from orthrus.text.token_mask import TokenMask
from orthrus.text.word_mask import JointMask, WordMask, WordRules


class Admission:
    """Checks requests against the model's limits. It does not know what runs, so any thread may use it."""

    def __init__(
        self,
        model: ModelConfig,
        max_model_len: int,
        tokenizer: Any,
        grammar_masks: Callable[[str], TokenMask] | None,
        schedules: tuple[str, ...],
    ) -> None:
        """tokenizer: a Hugging Face one, or None. grammar_masks: as for `EngineCore`. schedules: what a request may choose."""
        self.schedules = schedules
        self._model = model
        self._max_model_len = max_model_len
        self._tokenizer = tokenizer
        self._grammar_masks = grammar_masks
        # Cached because `masks` runs when a request is checked, and may run again when it is submitted.
        self._word_rules = lru_cache(maxsize=32)(partial(WordRules, tokenizer, model.vocab_size))

    @property
    def takes_grammars(self) -> bool:
        """Whether requests may have a grammar: that takes a tokenizer and a token that ends a text."""
        return self._grammar_masks is not None

    def check(self, request: Request) -> None:
        """Raise RequestError, naming the field, for a request that can never be served. `masks` checks grammars and words."""
        prompt, params, vocab = request.prompt, request.params, self._model.vocab_size
        if not prompt:
            raise RequestError("the prompt must have at least one token", "prompt")
        new = params.max_tokens != 0
        if len(prompt) + new > self._max_model_len:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, and the context limit of {self._max_model_len} must hold it"
                f"{' and at least one new token' if new else ''}: shorten the prompt",
                "prompt",
            )
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise RequestError(f"prompt token ids must be between 0 and {vocab - 1}", "prompt")
        if any(not 0 <= token < vocab for token in params.logit_bias):
            raise RequestError(f"logit_bias token ids must be between 0 and {vocab - 1}", "logit_bias")
        if params.stop and self._tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this model was loaded without one", "stop")
        if params.schedule not in self.schedules:
            raise RequestError(self._why_not(params.schedule), "schedule")

    def _why_not(self, schedule: str) -> str:
        """Why a request can't choose this schedule, and what it can choose."""
        reason = ""
        if schedule in SCHEDULES:
            reason = ": the model lacks the weights for it"
            if SCHEDULES[schedule].fits(self._model.has_diffusion, has_medusa=True):
                reason = f": to allow it, set the engine's schedule to {schedule!r}"
        return f"schedule must be one of {', '.join(self.schedules)}, got {schedule!r}{reason}"

    def masks(self, params: SamplingParams) -> list[TokenMask | None]:
        """The token mask of each choice, None where everything is allowed. Raises RequestError.

        A new grammar takes up to a second to compile.
        """
        if params.grammar is not None and self._grammar_masks is None:
            missing = "a tokenizer"
            if self._tokenizer is not None:
                missing = "an end-of-sequence token (eos_token_id) that the tokenizer knows"
            raise RequestError(
                f"structured output and forced tool calls need {missing}, and this model has none", "grammar"
            )
        rules = None
        if params.has_word_rules:
            rules = self._word_rules(params.bad_words, params.allowed_token_ids)

        def mask() -> TokenMask | None:
            words = WordMask(rules) if rules is not None else None
            if params.grammar is None:
                return words
            assert self._grammar_masks is not None, "asked for above"
            grammar = self._grammar_masks(params.grammar)
            return grammar if words is None else JointMask(grammar, words)

        return [mask() for _ in range(params.n)]

    def sequences(self, request: Request, masks: Sequence[TokenMask | None]) -> list[SequenceState]:
        """The request's sequences, one for each choice. masks: one for each choice."""
        params = request.params.with_seed()
        prompt = list(request.prompt)
        limit = self._max_model_len
        max_length = limit if params.max_tokens is None else min(limit, len(prompt) + params.max_tokens)
        # With max_tokens 0, the sequence would otherwise count as complete before its prompt is computed.
        max_length = max(max_length, len(prompt) + 1)
        eos_ids = () if params.ignore_eos else self._model.eos_token_ids
        stop_ids = frozenset(params.stop_token_ids) | frozenset(eos_ids)
        known = range(self._model.vocab_size)
        withheld = array("q", sorted(t for t in stop_ids if t in known) if params.min_tokens else ())
        choices: list[SequenceState] = []
        for index, mask in enumerate(masks):
            scored = params.prompt_logprobs is not None and index == 0
            choices.append(
                SequenceState(
                    request_id=request.request_id,
                    index=index,
                    params=params,
                    seed=params.choice_seed(index),
                    tokens=prompt.copy(),
                    num_prompt=len(prompt),
                    max_length=max_length,
                    stop_ids=stop_ids,
                    withheld_stop_ids=withheld,
                    text=self._text_stream(params),
                    mask=mask,
                    first_choice=choices[0] if choices else None,
                    priority=request.priority,
                    cache_salt=request.cache_salt,
                    unscored=range(len(prompt) - 1 if scored else 0),
                )
            )
        return choices

    def _text_stream(self, params: SamplingParams) -> TextStream | None:
        if not params.stop:
            return None
        return TextStream(self._tokenizer, params.stop, params.skip_special_tokens, params.min_tokens)
