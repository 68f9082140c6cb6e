"""Splitting a chat answer's text into reasoning, content and tool calls, however the text is cut into pieces."""

import json
import random
import re

import pytest

from orthrus.deployments.chat.output import ChatSplitter

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "}\\"{", "b": [1, {"c": "漢"}]}}\n</tool_call>'
ARGUMENTS = '{"a": "}\\"{", "b": [1, {"c": "漢"}]}'
Parts = tuple[str, str, list[tuple[str, str]]]
TOOLS = {"calls": True}
THINKER = {"thinks": True, "calls": True}


def one(name: str, arguments: str, content: str = "") -> Parts:
    return content, "", [(name, arguments)]


def split(pieces: list[str], **options: bool) -> Parts:
    """Content, reasoning and (name, arguments) of each call, put together as a client does."""
    splitter = ChatSplitter(**options)
    deltas = [*(splitter.push(piece) for piece in pieces), splitter.push("", final=True)]
    calls: dict[int, list[str]] = {}
    for delta in deltas:
        assert len({call.index for call in delta.tool_calls}) == len(delta.tool_calls)
    for call in (call for delta in deltas for call in delta.tool_calls):
        if call.index not in calls:
            assert call.id and call.name and call.index == len(calls)
            calls[call.index] = [call.name, ""]
        else:
            assert call.id is None and call.name is None
        calls[call.index][1] += call.arguments
    content = "".join(delta.content for delta in deltas)
    reasoning = "".join(delta.reasoning for delta in deltas)
    assert splitter.called == bool(calls)
    return content, reasoning, [(name, arguments) for name, arguments in calls.values()]


CASES: list[tuple[str, dict[str, bool], Parts]] = [
    ("plain <tool_call> text \n", {}, ("plain <tool_call> text \n", "", [])),
    ("plain\n text \n", {"thinks": True, "calls": True}, ("plain\n text \n", "", [])),
    ("\n<think>\na b\n</think>\n\nc\n", {"thinks": True}, ("c\n", "a b", [])),
    ("a b\n</think>\n\nc", {"thinks": True, "inside_reasoning": True}, ("c", "a b", [])),
    ("<think>\nnever ends <", {"thinks": True}, ("", "never ends <", [])),
    ("<thin ice", {"thinks": True}, ("<thin ice", "", [])),
    ("say <think>x</think>", {"thinks": True}, ("say <think>x</think>", "", [])),
    (CALL, {"calls": True}, ("", "", [("f", ARGUMENTS)])),
    (f"Well.\n{CALL}\n{CALL}\n", {"calls": True}, ("Well.", "", [("f", ARGUMENTS)] * 2)),
    (f"<think>\n{CALL}\n</think>\n\n{CALL}", {"thinks": True, "calls": True}, ("", CALL, [("f", ARGUMENTS)])),
    (f"{CALL}\n{CALL}\nand", {"calls": True, "one_call": True}, ("and", "", [("f", ARGUMENTS)])),
    ("<tool_call>1</tool_call> a", {"calls": True, "one_call": True}, ("<tool_call>1</tool_call> a", "", [])),
    ('<tool_call>{"arguments": {}, "name": "g"}</tool_call>', {"calls": True}, ("", "", [("g", "{}")])),
    ('<tool_call>{"name": "g"}</tool_call>', {"calls": True}, ("", "", [("g", "{}")])),
    (
        "<tool_call>\nnot json\n</tool_call> end",
        {"calls": True},
        ("<tool_call>\nnot json\n</tool_call> end", "", []),
    ),
    ("<tool_call>[1]</tool_call>", {"calls": True}, ("<tool_call>[1]</tool_call>", "", [])),
    (
        '<tool_call>{"name": "\\ud800"}</tool_call>',
        {"calls": True},
        ('<tool_call>{"name": "\\ud800"}</tool_call>', "", []),
    ),
    ('<tool_call>{"name": "f", "arguments": {"a', {"calls": True}, ("", "", [("f", '{"a')])),
    ('<tool_call>{"na', {"calls": True}, ('<tool_call>{"na', "", [])),
    ("a <tool_call", {"calls": True}, ("a <tool_call", "", [])),
    ("", {"thinks": True, "calls": True}, ("", "", [])),
    # Llama's name for arguments, with and without a plain head.
    ('<tool_call>{"name": "f", "parameters": {"a": 1}}</tool_call>', TOOLS, one("f", '{"a": 1}')),
    ('<tool_call>{"parameters": {"a": 1}, "name": "f"}</tool_call>', TOOLS, one("f", '{"a": 1}')),
    # Arguments that are an object in a string, or nothing.
    ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', TOOLS, one("f", '{"a": 1}')),
    ('<tool_call>{"name": "f", "arguments": null}</tool_call>', TOOLS, one("f", "{}")),
    # Arguments that are no object make no call.
    *(
        (text, TOOLS, (text, "", []))
        for text in (
            '<tool_call>{"name": "f", "arguments": "Ulm"}</tool_call>',
            '<tool_call>{"name": "f", "arguments": "{} {}"}</tool_call>',
            '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
            '<tool_call>{"name": "f", "arguments": 5}</tool_call>',
            '<tool_call>{"name": "", "arguments": {}}</tool_call>',
            '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
            '<tool_call>{"arguments": {"a": 1}}</tool_call>',
            '<tool_call>{"name": "f"',
            '<tool_call>{"name": "f", "arguments": ',
            "<tool_call>",
            "<tool_call> \n",
        )
    ),
    # No close marker.
    ('<tool_call>{"name": "f", "arguments": {"a": 1}}', TOOLS, one("f", '{"a": 1}')),
    ('<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_c', TOOLS, one("f", '{"a": 1}')),
    ('<tool_call>{"name": "f", "arguments": {"a": 1}', TOOLS, one("f", '{"a": 1}')),
    ('<tool_call>{"arguments": {}, "name": "f"}', TOOLS, one("f", "{}")),
    ('<tool_call>{"name": "f", "arguments": {}}\nDone.', TOOLS, one("f", "{}", "Done.")),
    (f"{CALL.removesuffix('</tool_call>')}{CALL}", TOOLS, ("", "", [("f", ARGUMENTS)] * 2)),
    # Brackets that are missing, and keys after the arguments.
    ('<tool_call>{"name": "f", "arguments": {}</tool_call>.', TOOLS, one("f", "{}", ".")),
    ('<tool_call>{"name": "f", "arguments": {"a": [1</tool_call>.', TOOLS, one("f", '{"a": [1', ".")),
    ('<tool_call>{"name": "f", "arguments": {}, "id": "}"}</tool_call>.', TOOLS, one("f", "{}", ".")),
    ('<tool_call>{"name": "f", "arguments": {}, and so', TOOLS, one("f", "{}", ", and so")),
    # Several objects in one block.
    (
        '<tool_call>{"name": "f", "arguments": {}}\n{"arguments": {"a": 1}, "name": "g"}\n</tool_call> x',
        TOOLS,
        ("x", "", [("f", "{}"), ("g", '{"a": 1}')]),
    ),
    (
        '<tool_call>[{"name": "f"}, {"name": "g", "arguments": {"a": 1.50}}]</tool_call>',
        TOOLS,
        ("", "", [("f", "{}"), ("g", '{"a": 1.50}')]),
    ),
    # Markers inside strings.
    (
        '<tool_call>{"name": "f", "arguments": {"a": "</tool_call><tool_call>"}}</tool_call>',
        TOOLS,
        one("f", '{"a": "</tool_call><tool_call>"}'),
    ),
    (
        '<tool_call>{"arguments": {"a": "</tool_call>"}, "name": "f"}</tool_call>',
        TOOLS,
        one("f", '{"a": "</tool_call>"}'),
    ),
    # More blanks than a call has.
    ("a<tool_call>" + " " * 1200 + "{}", TOOLS, ("a<tool_call>" + " " * 1200 + "{}", "", [])),
    (
        '<tool_call>{"name": "f", "arguments": {}}' + " " * 1200 + "</tool_call>",
        TOOLS,
        one("f", "{}", "</tool_call>"),
    ),
    # Blanks between texts are kept. Blanks between a marker and either end of the text are dropped.
    (f" a \n{CALL}\n\n b{CALL} ", TOOLS, (" a \n\n\n b", "", [("f", ARGUMENTS)] * 2)),
    # Keys that come twice, and control characters in strings.
    (
        '<tool_call>{"name": "f", "arguments": {"a": 1, "a": [2, {"b": 3}], "c": {"a": 1, "\\u0061": 2}}}</tool_call>',
        TOOLS,
        one("f", '{"a": 1, "c": {"a": 1}}'),
    ),
    ('<tool_call>{"name": "f", "arguments": {"a": "1\n2"}}', TOOLS, one("f", '{"a": "1\\n2"}')),
    ('<tool_call>{"arguments": {"a": "1\n2"}, "name": "f"}', TOOLS, one("f", '{"a": "1\\n2"}')),
    # A call inside reasoning counts if the reasoning never ends.
    (f"<think>\nHm. \n{CALL}\n", THINKER, ("", "Hm.", [("f", ARGUMENTS)])),
    (f"<think>\nHm. {CALL}\nSo.", THINKER, ("", "Hm. So.", [("f", ARGUMENTS)])),
    (f"<think>{CALL}{CALL}", THINKER, ("", "", [("f", ARGUMENTS)] * 2)),
    (f"<think>a {CALL} b</think>\nc", THINKER, ("c", f"a {CALL} b", [])),
    ("<think>a <tool_call> b <tool_call>{</think>\nc", THINKER, ("c", "a <tool_call> b <tool_call>{", [])),
    ('<think>a <tool_call>{"</think>\nc', THINKER, ("c", 'a <tool_call>{"', [])),
    ("<think>a <tool_call> b <", THINKER, ("", "a <tool_call> b <", [])),
    ('<think>a <tool_call>{"name": "f", "argu', THINKER, ("", 'a <tool_call>{"name": "f", "argu', [])),
    (
        '<think>a <tool_call>{"name": "f", "arguments": {"a": "</think>"}}</tool_call>',
        THINKER,
        ("", "a", [("f", '{"a": "</think>"}')]),
    ),
]


@pytest.mark.parametrize(("text", "options", "expected"), CASES)
def test_parts_do_not_depend_on_the_pieces(text: str, options: dict[str, bool], expected: Parts) -> None:
    assert split([text], **options) == expected
    assert split(list(text), **options) == expected
    for at in range(len(text)):
        assert split([text[:at], text[at:]], **options) == expected
    rng = random.Random(0)
    for _ in range(20):
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(4))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert split(pieces, **options) == expected


def test_arguments_stream_as_they_come() -> None:
    splitter = ChatSplitter(calls=True)
    seen = [
        splitter.push(piece) for piece in ('<tool_call>{"name": "f", ', '"arguments": {"a', 'b": 1', "}}")
    ]
    assert [[call.arguments for call in delta.tool_calls] for delta in seen] == [
        [],
        ['{"a'],
        ['b": 1'],
        ["}"],
    ]
    assert json.loads('{"ab": 1}') == json.loads("".join(c.arguments for d in seen for c in d.tool_calls))


def test_only_what_may_be_a_marker_is_held_back() -> None:
    splitter = ChatSplitter(thinks=True, calls=True)
    seen = [splitter.push(piece).content for piece in ("Hi", " <", "b> <tool", "s>")]
    assert seen == ["Hi", "", " <b>", " <tools>"]


@pytest.mark.parametrize(
    ("tokens", "inside", "expected"),
    [
        (["<think>", "\n", "a", " b", "\n", "</think>", "\n\n", "c"], False, 5),
        (["\n", "<thi", "nk>a", " b", "</thi", "nk>", "c"], False, 3),
        (["a", "", "</think>", "c"], True, 3),
        (["a", "b"], True, 2),
        (["<thin", " ice"], False, 0),
        (["c", "<think>", "a", "</think>"], False, 0),
    ],
)
def test_tokens_of_reasoning_are_counted_however_they_come(
    tokens: list[str], inside: bool, expected: int
) -> None:
    """Those that begin after `<think>`, to the one that completes `</think>`."""
    for size in range(1, len(tokens) + 1):
        splitter = ChatSplitter(thinks=True, inside_reasoning=inside)
        count = 0
        for start in range(0, len(tokens), size):
            pieces = tokens[start : start + size]
            count += len(splitter.reasoning_span(pieces))
            splitter.push("".join(pieces))
        assert count == expected, size


FRAGMENTS = [
    *(
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "<tool",
        "</",
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        '"',
        "\\",
    ),
    *(
        '{"name": "f", "arguments": ',
        '{"name": "g", "parameters": {"a": 1',
        '"a": 1',
        ', "a": "<',
        "\n",
        " ",
        "x",
        CALL,
    ),
]


def test_any_text_comes_out_the_same_however_it_is_cut() -> None:
    rng = random.Random(1)
    for _ in range(400):
        text = "".join(rng.choices(FRAGMENTS, k=rng.randrange(1, 14)))
        options = {name: rng.random() < 0.5 for name in ("thinks", "calls", "one_call")}
        options["inside_reasoning"] = options["thinks"] and rng.random() < 0.5
        whole = split([text], **options)
        assert split(list(text), **options) == whole, text
        at = rng.randrange(len(text) + 1)
        assert split([text[:at], text[at:]], **options) == whole, text
        if not whole[2]:
            assert bare(whole[1] + whole[0]) == bare(text)


def bare(text: str) -> str:
    """Without blanks and the markers of reasoning."""
    return "".join(re.sub("</?think>", "", text).split())
