"""The openai package: chat, completions, responses, their streams and helpers, tools, structured output, errors."""

import openai
from common import BASE, MODEL, PARAMETERS, PROMPT, QUESTION, WEATHER, check_weather, refused, step
from pydantic import BaseModel, Field

client = openai.OpenAI(base_url=BASE, api_key="none", max_retries=0)
asked = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}


class Report(BaseModel):
    city: str = Field(max_length=20)
    sunny: bool
    days: list[int] = Field(max_length=3)


with step("models"):
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL

with step("chat"):
    whole = client.chat.completions.create(**asked, max_tokens=24)
    text = whole.choices[0].message.content
    assert whole.choices[0].finish_reason in ("stop", "length") and whole.usage.completion_tokens > 0

with step("chat, streamed"):
    streamed, usage = "", None
    for chunk in client.chat.completions.create(
        **asked, max_tokens=24, stream=True, stream_options={"include_usage": True}
    ):
        streamed += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert streamed == text, (streamed, text)
    assert usage.total_tokens == whole.usage.total_tokens, (usage, whole.usage)

with step("chat, the stream helper"):
    with client.chat.completions.stream(**asked, max_tokens=24) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
    assert "".join(deltas) == text  # Of an answer that was cut off the helper gives no final completion.

with step("chat, log-probabilities and several choices"):
    scored = client.chat.completions.create(
        **asked | {"temperature": 1}, max_tokens=8, n=2, seed=3, logprobs=True, top_logprobs=3
    )
    assert len(scored.choices) == 2
    assert all(len(token.top_logprobs) == 3 for c in scored.choices for token in c.logprobs.content)

for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
    kind = choice if isinstance(choice, str) else "named"
    tools = {"tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 200}
    with step(f"a tool, {kind}"):
        called = client.chat.completions.create(**asked, **tools)
        [call] = called.choices[0].message.tool_calls
        assert call.function.name == "weather"
        check_weather(call.function.arguments)
    with step(f"a tool, {kind}, streamed"):
        name, arguments = "", ""
        for chunk in client.chat.completions.create(**asked, **tools, stream=True):
            for delta in chunk.choices[0].delta.tool_calls or ():
                name += delta.function.name or ""
                arguments += delta.function.arguments or ""
        assert (name, arguments) == (call.function.name, call.function.arguments)
    with step(f"a tool, {kind}, the stream helper"):
        with client.chat.completions.stream(**asked, **tools) as stream:
            events = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        assert [event.arguments for event in events] == [call.function.arguments], events
        [final] = stream.get_final_completion().choices[0].message.tool_calls
        assert final.function.arguments == call.function.arguments

with step("a tool's result goes back"):
    back = [
        *asked["messages"],
        called.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "Sunny."},
    ]
    answer = client.chat.completions.create(**asked | {"messages": back}, tools=[WEATHER], max_tokens=16)
    assert answer.choices[0].finish_reason

with step("tools left to the model"):
    auto = client.chat.completions.create(**asked, tools=[WEATHER], max_tokens=16)
    assert auto.choices[0].finish_reason

with step("structured output"):
    parsed = client.chat.completions.parse(**asked, response_format=Report, max_tokens=400)
    assert isinstance(parsed.choices[0].message.parsed, Report)
    json_object = client.chat.completions.create(
        **asked, response_format={"type": "json_object"}, max_tokens=400
    )
    assert json_object.choices[0].message.content.startswith("{")

with step("structured output, the stream helper"):
    with client.chat.completions.stream(**asked, response_format=Report, max_tokens=400) as stream:
        for _ in stream:
            pass
    assert stream.get_final_completion().choices[0].message.parsed == parsed.choices[0].message.parsed

with step("completions"):
    plain = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=16, temperature=0)
    pieces = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=16, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == plain.choices[0].text
    many = client.completions.create(model=MODEL, prompt=[PROMPT, "x"], max_tokens=4, n=2, temperature=1)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]

with step("completions, echo with log-probabilities"):
    echoed = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=0, echo=True, logprobs=2)
    assert echoed.choices[0].text == PROMPT
    assert echoed.choices[0].logprobs.token_logprobs[0] is None
    assert all(p <= 0 for p in echoed.choices[0].logprobs.token_logprobs[1:])

with step("responses"):
    made = client.responses.create(model=MODEL, input=QUESTION, max_output_tokens=24, temperature=0)
    assert made.output_text is not None and made.status in ("completed", "incomplete")
    with client.responses.stream(model=MODEL, input=QUESTION, max_output_tokens=24, temperature=0) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete")

with step("responses, structured"):
    shaped = client.responses.parse(
        model=MODEL, input=QUESTION, text_format=Report, max_output_tokens=400, temperature=0
    )
    assert isinstance(shaped.output_parsed, Report)

with step("responses, a tool and its result"):
    tool = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}
    first = client.responses.create(
        model=MODEL,
        input=QUESTION,
        tools=[tool],
        tool_choice="required",
        max_output_tokens=400,
        temperature=0,
    )
    [item] = [item for item in first.output if item.type == "function_call"]
    check_weather(item.arguments)
    result = {"type": "function_call_output", "call_id": item.call_id, "output": "Sunny."}
    second = client.responses.create(
        model=MODEL,
        input=[{"role": "user", "content": QUESTION}, item.model_dump(exclude_none=True), result],
        tools=[tool],
        max_output_tokens=16,
    )
    assert second.status in ("completed", "incomplete")

for wrong, kind, param in (
    ({"model": "nobody"}, openai.NotFoundError, "model"),
    ({"temperature": -1}, openai.BadRequestError, "temperature"),
    ({"max_completion_tokens": -1}, openai.BadRequestError, "max_completion_tokens"),
    ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature"),
):
    with step(f"an error: {wrong}"):
        error = refused(kind, lambda wrong=wrong: client.chat.completions.create(**asked | wrong))
        assert error.param == param, error

with step("an endpoint that is not there"):
    refused(openai.NotFoundError, lambda: client.embeddings.create(model=MODEL, input="x"))
