"""The parts of an answer in their order."""

import pytest

from orthrus.deployments.chat.output import ChatSplitter
from orthrus.deployments.chat.parts import PartStream

TEXT = 'Hm.<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>After.<tool_call>{"name": "g"}'


@pytest.mark.parametrize("size", [1, 5, 20, 45, 60, 63])
def test_text_after_a_call_is_a_part_of_its_own(size: int) -> None:
    """Even if it comes in the same delta as the end of the call."""
    splitter, stream = ChatSplitter(calls=True), PartStream()
    for at in range(0, len(TEXT), size):
        list(stream.push(splitter.push(TEXT[at : at + size], final=at + size >= len(TEXT))))
    list(stream.finish())
    parts = [(part.kind, part.name, part.text) for part in stream.parts]
    assert ("call", "f", '{"a": 1}') in parts and ("call", "g", "{}") in parts
    assert "".join(text for kind, _, text in parts if kind == "text") == "Hm.After."
