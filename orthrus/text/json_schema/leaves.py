"""Bounds for values without parts: constants, numbers and strings."""

import json
import math
import re
from functools import lru_cache

from llguidance import LLMatcher

from orthrus.text.json_schema.algebra import constants
from orthrus.text.json_schema.keywords import (
    FORMATS,
    NUMERIC,
    SCALAR,
    STRUCTURAL,
    TEXTUAL,
    Schema,
    SchemaError,
)

MAX_STRING = 4096
"""Characters of a string where the schema has no maxLength, beyond its minLength."""
MAX_MATCH = 256
"""The same where it has a pattern."""
MAX_INTEGER = (1 << 53) - 1
"""The largest integer that all readers of JSON keep exact."""
MAX_NUMBER = 10**15
"""The largest number that may have a fraction."""
DECIMALS = 10
"""Digits of a fraction."""

_FARTHEST = 9 * 10**18
"""What llguidance can count to, as a float."""
_MAX_CONSTANTS = 500
"""Objects and arrays in an enum. More take llguidance about a second."""


def constant(schema: Schema) -> Schema:
    """An `enum` of the values that `enum` and `const` leave, with the other keywords that restrict them."""
    values = constants(schema)
    structured = [value for value in values if isinstance(value, (dict, list))]
    if len(structured) > _MAX_CONSTANTS:
        raise SchemaError(f"enum may have {_MAX_CONSTANTS} objects and arrays at most")
    if structured and STRUCTURAL & schema.keys():
        raise SchemaError(
            "enum and const of objects or arrays must stand alone: leave out what only repeats them"
        )
    return {"enum": values, **{name: value for name, value in schema.items() if name in SCALAR}}


def number(schema: Schema, *, whole: bool) -> Schema:
    """Bounds for a number's digits: `minimum` and `maximum` for those before the point, `multipleOf` for the others."""
    found = {name: schema[name] for name in NUMERIC if name in schema}
    low = max(schema.get("minimum", -math.inf), schema.get("exclusiveMinimum", -math.inf))
    high = min(schema.get("maximum", math.inf), schema.get("exclusiveMaximum", math.inf))
    if low > _FARTHEST or high < -_FARTHEST:
        raise SchemaError(f"numbers beyond {_FARTHEST} are not written: lower minimum or raise maximum")
    usual = MAX_INTEGER if whole else MAX_NUMBER
    if low == -math.inf:
        found["minimum"] = low = -usual if high > -usual else -_FARTHEST
    if high == math.inf:
        found["maximum"] = high = usual if low < usual else _FARTHEST
    # Not in a very narrow range, whose bounds may themselves have more decimals.
    if not whole and "multipleOf" not in schema and high - low > 10.0 ** (1 - DECIMALS):
        found["multipleOf"] = 10.0**-DECIMALS
    return found


def string(schema: Schema) -> Schema:
    """Bounds for a text. Raises SchemaError for a pattern that llguidance can't follow."""
    found = {name: schema[name] for name in TEXTUAL if name in schema}
    usual = FORMATS.get(found.get("format", ""), MAX_MATCH if "pattern" in found else MAX_STRING)
    found.setdefault("maxLength", found.get("minLength", 0) + usual)
    if "pattern" in found:
        # llguidance may find a pattern together with a length too complex.
        problem = _string_problem(json.dumps(found))
        if problem and "maxLength" not in schema:
            del found["maxLength"]
            problem = _string_problem(json.dumps(found))
        if problem:
            raise SchemaError(f"pattern {schema.get('pattern')!r} can't be used: {problem}")
    return found


@lru_cache(maxsize=1024)
def _string_problem(keywords: str) -> str:
    """What llguidance objects to in the keywords of a string, which are given as JSON. Empty if nothing."""
    grammar = LLMatcher.grammar_from_lark(
        f"start: %json {json.dumps({'type': 'string', **json.loads(keywords)})}"
    )
    said: str = LLMatcher.validate_grammar(grammar)
    return re.sub(r".*(error|schema): ", "", said, flags=re.DOTALL).partition("\n")[0]
