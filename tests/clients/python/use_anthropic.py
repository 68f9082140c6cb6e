"""The anthropic package: messages whole and streamed, tools and their results, thinking, counted tokens, errors."""

import anthropic
from common import MODEL, PARAMETERS, QUESTION, URL, check_weather, refused, step

client = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0)
asked = {
    "model": MODEL,
    "system": "You answer briefly.",
    "messages": [{"role": "user", "content": QUESTION}],
    "max_tokens": 24,
    "extra_body": {"temperature": 0},  # The API has it; this version of the package has no argument for it.
}
tool = {"name": "weather", "description": "The weather of a city.", "input_schema": PARAMETERS}

with step("messages"):
    whole = client.messages.create(**asked)
    text = "".join(block.text for block in whole.content if block.type == "text")
    assert whole.stop_reason in ("end_turn", "max_tokens") and whole.usage.output_tokens > 0

with step("messages, streamed"):
    with client.messages.stream(**asked) as stream:
        streamed = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert streamed == text, (streamed, text)
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.stop_reason == whole.stop_reason

with step("a tool, whole and streamed"):
    tools = {
        "tools": [tool],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "max_tokens": 300,
    }
    called = client.messages.create(**asked | tools)
    [use] = [block for block in called.content if block.type == "tool_use"]
    check_weather(use.input)
    assert called.stop_reason == "tool_use"
    with client.messages.stream(**asked | tools) as stream:
        final = stream.get_final_message()
    assert [b.input for b in final.content if b.type == "tool_use"] == [use.input]

with step("a tool's result"):
    back = [
        *asked["messages"],
        {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in called.content]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "Sunny."}]},
    ]
    assert client.messages.create(**asked | {"messages": back, "tools": [tool]}).stop_reason

with step("a stop sequence"):
    stopped = client.messages.create(**asked | {"max_tokens": 200, "stop_sequences": [text[2:3]]})
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == text[2:3]

with step("thinking"):
    thought = client.messages.create(
        **asked | {"max_tokens": 1100, "thinking": {"type": "enabled", "budget_tokens": 1024}}
    )
    assert thought.stop_reason

with step("counted tokens"):
    counted = client.messages.count_tokens(model=MODEL, system=asked["system"], messages=asked["messages"])
    assert counted.input_tokens == whole.usage.input_tokens

with step("errors"):
    for wrong, kind in (
        ({"model": "nobody"}, anthropic.NotFoundError),
        ({"extra_body": {"temperature": -1}}, anthropic.BadRequestError),
        ({"messages": []}, anthropic.BadRequestError),
    ):
        error = refused(kind, lambda wrong=wrong: client.messages.create(**asked | wrong))
        assert error.body["type"] == "error", error.body
