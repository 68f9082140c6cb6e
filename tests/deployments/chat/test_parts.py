"""The parts of an answer in their order."""

import pytest

from orthrus.deployments.chat.output import ChatSplitter, joined
from orthrus.deployments.chat.parts import PartStream

TEXT = 'Hm.<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>After.<tool_call>{"name": "g"}'


@pytest.mark.parametrize("size", [1, 5, 20, 45, 60, 63, len(TEXT)])
def test_parts_have_the_order_in_which_they_were_written(size: int) -> None:
    """However the text was cut into pieces, and in the whole answer too."""
    splitter, stream, whole = ChatSplitter(calls=True), PartStream(), PartStream()
    deltas = [
        splitter.push(TEXT[at : at + size], final=at + size >= len(TEXT)) for at in range(0, len(TEXT), size)
    ]
    for delta in deltas:
        list(stream.push(delta))
    list(whole.push(joined(deltas)))
    for parts in (stream.parts, whole.parts):
        assert [(part.kind, part.name, part.text) for part in parts] == [
            ("text", "", "Hm."),
            ("call", "f", '{"a": 1}'),
            ("text", "", "After."),
            ("call", "g", "{}"),
        ]
