"""Token masks from grammars (llguidance).

The parser can be rolled back. So the masks of a block of drafts are those that plain decoding would use one by one.
"""

import copy
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import AddedToken
from torch import Tensor

from orthrus.errors import RequestError
from orthrus.text.grammar import check_size
from orthrus.text.unique_keys import KeyTokens, Place

# Masks are made on the engine's thread, so every stream waits for them. A sequence gets this much time for each position,
# and may exceed it by `_MASK_SECONDS` in all.
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
# Stands in a grammar whose objects may have keys by a pattern. A pattern can't say that each key comes once.
_FREE_KEYS = '"patternProperties": {"'


class GrammarMasks:
    """Compiles grammars for one model. Thread-safe."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """tokenizer: a fast Hugging Face one. vocab_size: columns of the logits.

        eos_token_ids: tokens that may end a text. The tokenizer must know them.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = list(eos_token_ids)
        self._lock = threading.Lock()
        self._compiled = lru_cache(maxsize=128)(self._compile)

    def __call__(self, grammar: str) -> "GrammarMask":
        """The mask of a new sequence. Raises RequestError for a grammar that can't be compiled.

        The first call for a model takes seconds, and the first for a grammar up to one. Later calls take microseconds.
        """
        keys = self._key_tokens if _FREE_KEYS in grammar else None
        return GrammarMask(self._compiled(grammar).deep_copy(), -(-self._vocab_size // 32), keys)

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        # Imported here, because it imports all of transformers' models.
        from llguidance.hf import from_tokenizer

        # An end token may be ordinary text too. Flagged as special, it no longer matches a grammar's text: otherwise it
        # could end an answer in the middle of a string.
        tokenizer = self._tokenizer
        added = tokenizer.added_tokens_decoder
        ordinary = [token for token in self._eos if token not in added or not added[token].special]
        texts = tokenizer.convert_ids_to_tokens(ordinary)
        if texts := [text for text in texts if text is not None]:
            tokenizer = copy.deepcopy(tokenizer)
            flagged = [AddedToken(text, special=True, normalized=False) for text in texts]
            tokenizer.backend_tokenizer.add_special_tokens(flagged)
        return from_tokenizer(tokenizer, n_vocab=self._vocab_size, eos_token=self._eos)

    @cached_property
    def _key_tokens(self) -> KeyTokens:
        return KeyTokens([self._vocabulary.decode_bytes([token]) for token in range(self._vocab_size)])

    def _compile(self, grammar: str) -> LLMatcher:
        check_size(grammar, "response_format")
        with self._lock:
            vocabulary = self._vocabulary
        matcher = LLMatcher(vocabulary, LLMatcher.grammar_from_lark(grammar), log_level=0, limits=_LIMITS)
        # A rule that is defined only by itself is found when the first mask is computed.
        matcher.compute_bitmask()
        if matcher.is_error():
            reason = matcher.get_error().partition("<state>")[0].strip()
            raise RequestError(f"the grammar or schema can't be used: {reason}", "response_format")
        return matcher


class GrammarMask:
    """The `TokenMask` of one sequence under a grammar."""

    param = "response_format"

    def __init__(self, matcher: LLMatcher, width: int, keys: KeyTokens | None = None) -> None:
        """width: int32 numbers in a row of a mask; llguidance's rows may be wider. keys: given if the grammar has free keys."""
        self.error: str | None = None
        self._matcher = matcher
        self._width = width
        self._keys = keys
        self._place = Place()
        self._ahead: list[_Position] = []
        # By how much the time spent exceeds what the positions so far may take.
        self._seconds = 0.0

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
        # With `first` the masks are for drafts, which may repeat a key: verification decides.
        if self._keys is not None and first == 0:
            self._forbid_repeated_keys(self._keys, masks[:known], ahead)
        self._note_time(begin, known)
        return masks

    def _tensor(self, rows: Sequence[bytes]) -> Tensor:
        masks = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.int32)
        return masks.view(len(rows), -1)[:, : self._width]

    def _behind(self, ahead: Sequence[int], token: int) -> Tensor:
        """The mask after `ahead` and one more token. Repeated keys are not removed from it."""
        taken = self._matcher.try_consume_tokens([*ahead, token])
        row = self._matcher.compute_bitmask()
        self._matcher.rollback(taken)
        return self._tensor([row])[0]

    def _forbid_repeated_keys(self, keys: KeyTokens, masks: Tensor, ahead: Sequence[int]) -> None:
        place: Place | None = self._place
        self._ahead = []
        for i, row in enumerate(masks):
            if place is None:
                break  # Rows after a forbidden key are never read.
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
        # Once the text is complete, only an end of sequence is allowed. The matcher takes no more tokens.
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
        self._note_time(begin, 1)

    def _note_time(self, begin: float, positions: int) -> None:
        """Account for the time since `begin`, in CPU seconds of this thread, that `positions` positions took."""
        self._seconds = max(0.0, self._seconds + time.thread_time() - begin - positions * _POSITION_SECONDS)
        if self.error is None and self._matcher.is_error():
            reason = self._matcher.get_error().partition("<state>")[0].strip()
            self.error = f"the grammar is too complex to follow: {reason}"
        if self.error is None and self._seconds > _MASK_SECONDS:
            self.error = "the grammar takes too long to follow: make it less ambiguous, or smaller"


@dataclass(frozen=True, slots=True)
class _Position:
    """What the mask of one position shows."""

    # Any text may follow, so there is no JSON to track.
    anything: bool
    # Only keys that the object already has may follow.
    stuck: bool
