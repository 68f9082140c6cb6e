"""Grammars as text: JSON Schemas, regular expressions, choices, and Lark grammars.

A grammar is sent as text, in `SamplingParams.grammar`, and compiled beside the engine (`orthrus.text.grammar_mask`). So code
that only writes grammars imports no torch.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import gbnf_to_lark

from orthrus.errors import RequestError
from orthrus.text.json_schema.bounds import bounded

MAX_GRAMMAR_CHARACTERS = 1 << 18
_MOST_GBNF_RULES = 2000
"""The time to convert a grammar grows with the square of the number of its rules."""
# As llguidance tells the notations apart. Its own pattern takes minutes where many lines are blank.
_LARK = re.compile(r"^[^\S\n]*(%llguidance\b|start\s*:)", re.MULTILINE)
# Allows JSON on one line or indented, but not an answer full of blanks.
_WHITESPACE = r" ?|\r?\n( {0,40}|\t{0,10})"


def json_grammar(schema: Any, param: str = "response_format") -> str:
    """A grammar whose texts are JSON values under a JSON Schema. Parameter and errors are those of `json_rule`."""
    return f"start: {json_rule(schema, param)}"


def json_rule(schema: Any, param: str = "response_format") -> str:
    """The right side of a Lark rule: JSON under a JSON Schema, with the bounds that `bounded` adds.

    param: the request's field that holds the schema, for errors. Raises RequestError.
    """
    options = {"whitespace_pattern": _WHITESPACE}
    return f"%json {json.dumps({**bounded(schema, param), 'x-guidance': options})}"


def regex_grammar(pattern: str, param: str) -> str:
    """A grammar whose texts match a regular expression from their first character to their last.

    `\\d`, `\\w` and `\\s` are ASCII's. param: the request's field, for errors. Raises RequestError.
    """
    check_size(pattern, param)
    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
        raise RequestError(f"{param} ends with a backslash that escapes nothing", param)
    return f"start: /{regex_to_lark(pattern, 'dws')}/"


def choice_grammar(choices: Sequence[str], param: str) -> str:
    """A grammar whose only texts are `choices`. param: the request's field, for errors. Raises RequestError."""
    if not choices:
        raise RequestError(f"{param} must have at least one choice", param)
    # One terminal: a rule for each choice takes ten times as long to compile.
    grammar = "start: CHOICE\nCHOICE: " + " | ".join(
        json.dumps(choice, ensure_ascii=False) for choice in choices
    )
    check_size(grammar, param)
    return grammar


def lark_grammar(text: str, param: str) -> str:
    """A grammar that a user wrote, in Lark's notation or in GBNF (`root ::= ...`), as Lark.

    param: the request's field, for errors. Raises RequestError. Mistakes in a Lark grammar show when it is compiled.
    """
    check_size(text, param)
    if _LARK.search(text):
        return text
    if (rules := text.count("::=")) > _MOST_GBNF_RULES:
        raise RequestError(f"{param} may have {_MOST_GBNF_RULES} rules in GBNF, and has {rules}", param)
    try:
        return gbnf_to_lark(text)
    except Exception as error:
        raise RequestError(
            f"{param} is neither a Lark grammar (with a rule named start) nor GBNF (with one named root): {error}",
            param,
        ) from None


def check_size(text: str, param: str) -> None:
    """Raise RequestError for a grammar that is too long, or that holds half of a surrogate pair. param: the request's field."""
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise RequestError(
            f"the grammar or schema has {len(text)} characters, over the limit of {MAX_GRAMMAR_CHARACTERS}",
            param,
        )
    if not _is_unicode(text):
        raise RequestError(f"{param} has half of a surrogate pair, which is no character", param)


def _is_unicode(text: str) -> bool:
    """Whether a text can be encoded: JSON's escapes can spell surrogates that no text may have."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
