"""Token masks from grammars (llguidance): JSON Schemas, and Lark grammars around them.

A grammar travels as text, in `SamplingParams.grammar`, and is compiled where the engine is. The parser can be rolled back,
so the masks of a block of drafts are those that plain decoding would meet one by one.
"""

import json
import threading
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor

from orthrus.errors import RequestError

MAX_GRAMMAR_CHARACTERS = 1 << 18
# JSON on one line, or laid out in lines, but never a context full of blanks.
_WHITESPACE = r" ?|\r?\n[ \t]{0,40}"


def json_grammar(schema: dict[str, Any]) -> str:
    """A grammar whose texts are JSON values under a JSON Schema."""
    return f"start: {json_rule(schema)}"


def json_rule(schema: dict[str, Any]) -> str:
    """The right side of a Lark rule: JSON under a JSON Schema. Raises RequestError if its `x-guidance` can't be one."""
    given = schema.get("x-guidance", {})
    if not isinstance(given, dict):
        raise RequestError("x-guidance must be an object, of llguidance's options", "response_format")
    options = {"whitespace_pattern": _WHITESPACE, **given}
    return f"%json {json.dumps({**schema, 'x-guidance': options})}"


class GrammarMasks:
    """Compiles grammars for one model. Any thread may use it."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """tokenizer: a fast Hugging Face one. vocab_size: columns of the logits. eos_token_ids: what may end a text."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = list(eos_token_ids)
        self._lock = threading.Lock()
        self._compiled = lru_cache(maxsize=128)(self._compile)

    def __call__(self, grammar: str) -> "GrammarMask":
        """The mask of a new sequence. Raises RequestError for a grammar that can't be compiled.

        The first call for a model takes seconds, the first for a grammar up to one; then it takes microseconds.
        """
        return GrammarMask(self._compiled(grammar).deep_copy())

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        return from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=self._eos)

    def _compile(self, grammar: str) -> LLMatcher:
        if len(grammar) > MAX_GRAMMAR_CHARACTERS:
            raise RequestError(
                f"the grammar or schema has {len(grammar)} characters, over the limit of {MAX_GRAMMAR_CHARACTERS}",
                "response_format",
            )
        with self._lock:
            matcher = LLMatcher(self._vocabulary, LLMatcher.grammar_from_lark(grammar), log_level=0)
            # A grammar that defines itself by itself shows only now.
            matcher.compute_bitmask()
        if matcher.is_error():
            reason = matcher.get_error().partition("<state>")[0].strip()
            raise RequestError(f"the grammar or schema can't be used: {reason}", "response_format")
        return matcher


class GrammarMask:
    """The `TokenMask` of one sequence under a grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.error: str | None = None
        self._matcher = matcher

    def allowed(self, ahead: Sequence[int], first: int = 0) -> Tensor:
        taken = self._matcher.try_consume_tokens(list(ahead[:first]))
        rows = [self._matcher.compute_bitmask()]
        for token in ahead[first:]:
            if not self._matcher.try_consume_tokens([token]):
                break
            taken += 1
            rows.append(self._matcher.compute_bitmask())
        self._matcher.rollback(taken)
        rows += rows[-1:] * (len(ahead) + 1 - first - len(rows))
        self._note_error()
        return torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.int32).view(len(rows), -1)

    def accepts(self, tokens: Sequence[int]) -> int:
        return self._matcher.validate_tokens(list(tokens))

    def commit(self, token: int) -> None:
        # Once the text is complete only an end of sequence is allowed, and the matcher has nothing more to take in.
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
        self._note_error()

    def _note_error(self) -> None:
        if self.error is None and self._matcher.is_error():
            reason = self._matcher.get_error().partition("<state>")[0].strip()
            self.error = f"the grammar is too complex to follow: {reason}"
