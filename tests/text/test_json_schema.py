"""JSON Schemas with bounds: every text under them ends, is strict JSON, and is valid under the original schema."""

import random
import time
from typing import Any

import jsonschema
import numpy as np
import pytest

from orthrus.engine import Engine
from orthrus.errors import RequestError
from orthrus.text.grammar import json_grammar
from orthrus.text.grammar_mask import GrammarMasks
from orthrus.text.json_schema.bounds import bounded
from tests.schemas import SCHEMAS, record
from tests.structured import both_schedules, check, strict_json, tokens_per_cycle

CLOSING = ('"', "}", "]", '"}', ",", '":')


@pytest.fixture(scope="module")
def masks(ar: Engine) -> GrammarMasks:
    return GrammarMasks(ar.tokenizer, ar.model_config.vocab_size, ar.model_config.eos_token_ids)


def allowed(masks_now: Any) -> list[int]:
    row = masks_now.allowed([])[0].numpy().view(np.uint8)
    tokens: list[int] = np.nonzero(np.unpackbits(row, bitorder="little"))[0].tolist()
    return tokens


def written(model: Engine, masks: GrammarMasks, schema: Any, seed: int, limit: int = 300) -> str | None:
    """A text under the schema from tokens drawn at random, those that end something more often; None if it is long."""
    draw, mask = random.Random(seed), masks(json_grammar(schema))
    text: list[int] = []
    closing = {token for text in CLOSING for token in model.tokenizer.encode(text)}
    ends = set(model.model_config.eos_token_ids)
    while len(text) < limit:
        tokens = allowed(mask)
        assert tokens, "some token is always allowed"
        for few in (ends, closing):
            chosen = [token for token in tokens if token in few]
            if chosen and draw.random() < 0.3:
                tokens = chosen
        token = draw.choice(tokens)
        mask.commit(token)
        assert mask.error is None
        if token in ends:
            return str(model.tokenizer.decode(text))
        text.append(token)
    return None


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_is_written_is_valid(ar: Engine, masks: GrammarMasks, name: str) -> None:
    schema = SCHEMAS[name]
    texts = [written(ar, masks, schema, seed) for seed in range(3)]
    assert any(text is not None for text in texts)
    for text in texts:
        if text is not None:
            jsonschema.validate(strict_json(text), schema, cls=jsonschema.validators.validator_for(schema))


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (5, "object, true or false"),
        (False, "no value"),
        ({"type": "strin"}, "#: type must be one of"),
        ({"properties": {"a": {"items": {"maxLength": -1}}}}, "#/properties/a/items: maxLength"),
        ({"properties": 5}, "properties must be"),
        ({"enum": []}, "enum must be"),
        ({"anyOf": []}, "anyOf must be"),
        ({"multipleOf": 0}, "multipleOf must be"),
        ({"const": float("inf")}, "too large"),
        ({"const": "\ud800"}, "surrogate"),
        ({"$ref": "#/$defs/x"}, "leads nowhere"),
        ({"$ref": "#/allOf/" + "9" * 5000, "allOf": [True]}, "leads nowhere"),
        ({"$ref": "#x"}, "no such .anchor"),
        ({"$ref": "https://example.com/x"}, "leads out of the schema"),
        ({"$ref": "#"}, "no value"),
        (record(a={"$ref": "#"}), "no value"),
        (record(a=False), "no value"),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, "no type in common"),
        ({"type": "integer", "minimum": 1e30}, "numbers beyond"),
        ({"type": "array", "items": {}, "uniqueItems": True}, "uniqueItems can't be enforced"),
        ({"if": {"type": "string"}, "then": {"minLength": 3}}, "if can't be enforced"),
        ({"items": {"x-guidance": {"whitespace_pattern": r"\s+"}}}, "#/items: x-guidance"),
        ({"not": {"type": "string"}}, "not can't be enforced"),
        ({"contains": {}}, "contains can't be enforced"),
        ({"dependentRequired": {"a": ["b"]}}, "dependentRequired can't be enforced"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "options 0 and 1 at once"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"properties": {f"p{i}": {"type": "null"} for i in range(300)}}, "200 optional properties"),
        ({"enum": [[i] for i in range(600)]}, "500 objects and arrays"),
        (
            record(**{f"p{i}": {"type": "string", "pattern": f"a{i}"} for i in range(400)}),
            "300 strings with a pattern",
        ),
        (record(**{f"p{i}": record(**{f"q{j}": {} for j in range(300)}) for i in range(300)}), "too large"),
    ],
)
def test_schemas_that_are_refused_say_where_and_why(schema: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        bounded(schema, "response_format")
    assert caught.value.param == "response_format"


def test_a_schema_nested_without_end_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(900):
        schema = {"items": schema}
    with pytest.raises(RequestError, match="nested too deeply"):
        json_grammar(schema)


def test_deep_and_tangled_schemas_take_little_time() -> None:
    deep: dict[str, Any] = {}
    for _ in range(30):
        deep = record(a=deep, b={"type": "array", "items": {}})
    doubled = {
        f"d{i}": record(x={"$ref": f"#/$defs/d{i + 1}"}, y={"$ref": f"#/$defs/d{i + 1}"}) for i in range(40)
    }
    tangled = {
        f"n{i}": {"properties": {f"p{j}": {"$ref": f"#/$defs/n{j}"} for j in range(20)}} for i in range(20)
    }
    begin = time.thread_time()
    for schema in (
        deep,
        {"$ref": "#/$defs/d0", "$defs": doubled | {"d40": {}}},
        {"$ref": "#/$defs/n0", "$defs": tangled},
    ):
        json_grammar(schema)
    assert time.thread_time() - begin < 10


@pytest.mark.parametrize("schema", [True, {}, {"title": "t", "x-order": 5}])
def test_annotations_constrain_nothing(schema: Any) -> None:
    assert json_grammar(schema) == json_grammar(
        {"description": "anything", "nullable": True, "deprecated": False}
    )


def test_both_schedules_write_the_same_answers() -> None:
    """A slice of `make test-structured`."""
    names = [
        "person",
        "tree",
        "map of strings",
        "tagged union",
        "number in a range",
        "array of a length",
        "nested",
        "any object",
    ]
    plain, drafted = both_schedules([(name, 1) for name in names])
    check(plain, drafted)
    assert sum(answer.finish_reason == "stop" for answer in plain) > len(plain) / 2
    assert tokens_per_cycle(drafted) > 1.5


def ends(model: Engine, masks: GrammarMasks, schema: Any, text: str) -> bool:
    """Whether a text is a whole answer under a schema."""
    mask, tokens = masks(json_grammar(schema)), model.tokenizer.encode(text)
    if mask.accepts(tokens) < len(tokens):
        return False
    for token in tokens:
        mask.commit(token)
    return bool(set(allowed(mask)) & set(model.model_config.eos_token_ids))


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        (
            record(a={"type": "boolean"}),
            ['{"a": true}', '{\n  "a": true\n}', '{"a":true}', '{\r\n\t"a": true\r\n}'],
            [
                '{\u00a0"a": true}',
                '{"a":\u2003true}',
                ' {"a": true}',
                '{"a":  true}',
                '{\n\n"a": true}',
                '{"a": true} ',
            ],
        ),
        (
            {"type": "integer"},
            ["0", "-7", str(2**53 - 1), str(1 - 2**53)],
            ["01", "1.0", "1e3", str(2**53), "9" * 30, "+1"],
        ),
        ({"type": "integer", "maximum": 10**18}, [str(10**18)], [str(10**18 + 1)]),
        ({"type": "number"}, ["0.5", "-12.25", "3"], ["1e400", "0." + "1" * 30, "1" * 30, ".5", "1.", "NaN"]),
        ({"type": "string"}, ['"é😀\\n"'], ['"\\ud800"', '"\u0007"', '"\n"', "'a'"]),
        ({"type": "string", "format": "color"}, ['"red"'], ["red"]),
        (
            record(a={}, b={}),
            ['{"a": [{"c": null}], "b": 1}'],
            ['{"b": 1, "a": 1}', '{"a": 1, "b": 1, "c": 1}'],
        ),
    ],
)
def test_answers_are_json_to_the_letter(
    ar: Engine, masks: GrammarMasks, schema: Any, right: list[str], wrong: list[str]
) -> None:
    assert [text for text in right if not ends(ar, masks, schema, text)] == []
    assert [text for text in wrong if ends(ar, masks, schema, text)] == []


@pytest.mark.parametrize(
    ("begun", "again"),
    [
        ('{"a": 1, "a', True),
        ('{"a": 1, "b', False),
        ('{"a": {"b": 1}, "b', False),
        ('{"a": {"b": 1}, "c": [{"a": 2}, {"a": 3}], "a', True),
        ('{"a": [{"b": 1, "b', True),
        ('{"x\\"y": "{\\"z", "x\\"y', True),
        ('{"é": "é", "é', True),
    ],
)
def test_a_key_comes_once(ar: Engine, masks: GrammarMasks, begun: str, again: bool) -> None:
    mask = masks(json_grammar({"type": "object"}))
    for token in ar.tokenizer.encode(begun):
        assert token in allowed(mask)
        mask.commit(token)
    quoted = [token for token in allowed(mask) if ar.tokenizer.decode([token]).startswith('"')]
    assert (quoted == []) == again
    # Also as a draft, together with what came before.
    block = masks(json_grammar({"type": "object"}))
    tokens = ar.tokenizer.encode(begun)
    rows = block.allowed(tokens).numpy().view(np.uint8)
    together = np.nonzero(np.unpackbits(rows[-1], bitorder="little"))[0].tolist()
    assert together == allowed(mask)
