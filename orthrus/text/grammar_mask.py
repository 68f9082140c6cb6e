"""Token masks from grammars (llguidance).

The parser can be rolled back, so the masks of a block of drafts are those that plain decoding would meet one by one.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from orthrus.errors import RequestError
from orthrus.text.grammar import check_size
from orthrus.text.unique_keys import KeyTokens, Place

# Masks are made on the engine's thread, where every stream waits for them.
_POSITION_SECONDS = 0.01
_MASK_SECONDS = 1.0
_LIMITS = LLParserLimits(
    max_items_in_row=1000,
    initial_lexer_fuel=500_000,
    step_lexer_fuel=50_000,
    step_max_items=10_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
)
# How the bounds of a JSON Schema write that an object may have keys by a pattern, which says nothing of how often each comes.
_FREE_KEYS = '"patternProperties": {"'


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
        keys = self._key_tokens if _FREE_KEYS in grammar else None
        return GrammarMask(self._compiled(grammar).deep_copy(), -(-self._vocab_size // 32), keys)

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        # Here, since it brings all of transformers' models, and an ingress only writes grammars.
        from llguidance.hf import from_tokenizer

        return from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=self._eos)

    @cached_property
    def _key_tokens(self) -> KeyTokens:
        return KeyTokens([self._vocabulary.decode_bytes([token]) for token in range(self._vocab_size)])

    def _compile(self, grammar: str) -> LLMatcher:
        check_size(grammar, "response_format")
        with self._lock:
            vocabulary = self._vocabulary
        matcher = LLMatcher(vocabulary, LLMatcher.grammar_from_lark(grammar), log_level=0, limits=_LIMITS)
        # A grammar that defines itself by itself shows only now.
        matcher.compute_bitmask()
        if matcher.is_error():
            reason = matcher.get_error().partition("<state>")[0].strip()
            raise RequestError(f"the grammar or schema can't be used: {reason}", "response_format")
        return matcher


class GrammarMask:
    """The `TokenMask` of one sequence under a grammar."""

    param = "response_format"

    def __init__(self, matcher: LLMatcher, width: int, keys: KeyTokens | None = None) -> None:
        """width: of a row, in int32; llguidance's may be wider. keys: the vocabulary's, if the grammar leaves keys free."""
        self.error: str | None = None
        self._matcher = matcher
        self._width = width
        self._keys = keys
        self._place = Place()
        self._ahead: list[_Position] = []
        self._seconds = 0.0  # Beyond what its positions may take.

    def allowed(self, ahead: Sequence[int], first: int = 0) -> Tensor:
        begin = time.thread_time()
        taken = self._matcher.try_consume_tokens(list(ahead[:first]))
        rows = [self._matcher.compute_bitmask()]
        for token in ahead[first:]:
            if not self._matcher.try_consume_tokens([token]):
                break
            taken += 1
            rows.append(self._matcher.compute_bitmask())
        self._matcher.rollback(taken)
        known = len(rows)
        rows += rows[-1:] * (len(ahead) + 1 - first - len(rows))
        masks = self._tensor(rows)
        # Only what is verified counts; a draft may bring a key again.
        if self._keys is not None and first == 0:
            self._forbid_repeated_keys(self._keys, masks[:known], ahead)
        self._note_time(begin, known)
        return masks

    def _tensor(self, rows: Sequence[bytes]) -> Tensor:
        masks = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.int32)
        return masks.view(len(rows), -1)[:, : self._width]

    def _behind(self, ahead: Sequence[int], token: int) -> Tensor:
        """The mask behind `ahead` and one more token, keys that come again included."""
        taken = self._matcher.try_consume_tokens([*ahead, token])
        row = self._matcher.compute_bitmask()
        self._matcher.rollback(taken)
        return self._tensor([row])[0]

    def _forbid_repeated_keys(self, keys: KeyTokens, masks: Tensor, ahead: Sequence[int]) -> None:
        place: Place | None = self._place
        self._ahead = []
        for i, row in enumerate(masks):
            if place is None:
                break  # What comes after a key that may not come is never read.
            anything = keys.follows_nothing(row)
            if anything:
                place = Place()
            behind = partial(self._behind, ahead[:i])
            stuck = not keys.forbid(row, place, behind)
            self._ahead.append(_Position(anything, stuck))
            if i < len(ahead):
                place = place.after(keys.texts[ahead[i]])

    def accepts(self, tokens: Sequence[int]) -> int:
        begin = time.thread_time()
        accepted: int = self._matcher.validate_tokens(list(tokens))
        self._note_time(begin, len(tokens))
        return accepted

    def commit(self, token: int) -> None:
        if self._keys is not None and not self._ahead:
            self.allowed([])
        begin = time.thread_time()
        if self._keys is not None:
            position = self._ahead.pop(0)
            place = Place() if position.anything else self._place
            self._place = place.after(self._keys.texts[token]) or Place()
            if position.stuck:
                self.error = (
                    "the answer can't go on: an object needs another key, and has all that its schema allows"
                )
        # Once the text is complete only an end of sequence is allowed, and the matcher has nothing more to take in.
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
        self._note_time(begin, 1)

    def _note_time(self, begin: float, positions: int) -> None:
        """Note what was done since `begin`, in this thread's seconds, for so many positions."""
        self._seconds = max(0.0, self._seconds + time.thread_time() - begin - positions * _POSITION_SECONDS)
        if self.error is None and self._matcher.is_error():
            reason = self._matcher.get_error().partition("<state>")[0].strip()
            self.error = f"the grammar is too complex to follow: {reason}"
        if self.error is None and self._seconds > _MASK_SECONDS:
            self.error = "the grammar takes too long to follow: make it less ambiguous, or smaller"


@dataclass(frozen=True, slots=True)
class _Position:
    """What a mask has shown of one position. stuck: nothing but a key that has come already may come."""

    anything: bool
    stuck: bool
