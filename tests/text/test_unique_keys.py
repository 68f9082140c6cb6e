"""Unique keys: which tokens are removed from masks, which stay, and what that costs."""

import time
from typing import Any

import numpy as np
import pytest
import torch

from orthrus.engine import Engine
from orthrus.text.grammar import json_grammar
from orthrus.text.grammar_mask import GrammarMask, GrammarMasks
from orthrus.text.json_schema.bounds import MAX_KEY
from orthrus.text.unique_keys import KeyTokens, Place
from tests.text.test_json_schema import allowed

LONG = "measurement_of_the_quarterly_regional_revenue_before_taxes_in_area_"


@pytest.fixture(scope="module")
def masks(ar: Engine) -> GrammarMasks:
    return GrammarMasks(ar.tokenizer, ar.model_config.vocab_size, ar.model_config.eos_token_ids)


def closed(names: list[str], **more: Any) -> dict[str, Any]:
    properties = {name: {"type": "integer"} for name in names}
    return {
        "type": "object",
        "properties": properties,
        "required": names,
        "additionalProperties": False,
        **more,
    }


def in_single_characters(model: Engine, text: str) -> list[int]:
    return [token for character in text for token in model.tokenizer.encode(character)]


def test_many_long_keys_cost_a_position_little() -> None:
    keys = KeyTokens([b'"', *(b"%d" % i for i in range(150_000))])
    text = ", ".join(f'"{LONG}{i:03}": 1' for i in range(300))
    place = Place().after(f'{{{text}, "{LONG}'.encode())
    assert place is not None
    row = torch.full((150_001 // 32 + 1,), -1, dtype=torch.int32)
    begin = time.thread_time()
    assert keys.forbid(row, place, lambda token: torch.full_like(row, -1))
    # A look through the vocabulary for each key takes three times as long.
    assert time.thread_time() - begin < 1


def test_keys_are_followed_only_where_one_may_come_twice(ar: Engine, masks: GrammarMasks) -> None:
    followed = [
        masks(json_grammar(schema))._keys is not None
        for schema in (
            closed(["a", "b"]),
            {"type": "object"},
            closed(["a", "b"], required=[], minProperties=1),
        )
    ]
    assert followed == [False, True, True]


def test_a_long_key_may_begin_a_longer_one(ar: Engine, masks: GrammarMasks) -> None:
    name = "k" * (MAX_KEY + 6)
    schema = closed(
        [name, f"{name}er"], required=[], minProperties=3, additionalProperties={"type": "integer"}
    )
    mask = masks(json_grammar(schema))
    for token in in_single_characters(ar, f'{{"{name}": 1, "{name}er": 2, "x": 3'):
        assert token in allowed(mask)
        mask.commit(token)
        assert mask.error is None


def test_a_repeated_key_of_full_length_is_stopped_before_its_last_character(
    ar: Engine, masks: GrammarMasks
) -> None:
    mask = masks(json_grammar({"type": "object"}))
    name = "k" * MAX_KEY
    for token in in_single_characters(ar, f'{{"{name}": 1, "{name[1:]}'):
        assert token in allowed(mask)
        mask.commit(token)
    [again], [other] = ar.tokenizer.encode("k"), ar.tokenizer.encode("x")
    assert again not in allowed(mask) and other in allowed(mask)
    mask.commit(other)
    assert mask.error is None and ar.tokenizer.encode('"')[0] in allowed(mask)


class Slow(KeyTokens):
    """Takes longer for a position than a whole answer may."""

    def forbid(self, *args: Any) -> bool:
        begin = time.thread_time()
        while time.thread_time() - begin < 1.1:
            np.zeros(1000)
        return super().forbid(*args)


def test_the_time_for_keys_counts(ar: Engine, masks: GrammarMasks) -> None:
    whole = masks(json_grammar({"type": "object"}))
    assert whole._keys is not None
    mask = GrammarMask(whole._matcher, whole._width, Slow(whole._keys.texts))
    mask.allowed([])
    assert mask.error is not None and "takes too long" in mask.error
