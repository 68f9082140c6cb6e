"""litellm: its OpenAI and vLLM providers, streams, tools, structured output, errors; its responses and messages too."""

import asyncio

import litellm
from common import BASE, MODEL, PROMPT, QUESTION, URL, WEATHER, check_weather, refused, step
from pydantic import BaseModel, Field

litellm.telemetry = False


class Report(BaseModel):
    city: str = Field(max_length=20)
    sunny: bool


for provider in ("openai", "hosted_vllm"):
    asked = {
        "model": f"{provider}/{MODEL}",
        "api_base": BASE,
        "api_key": "none",
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "num_retries": 0,
    }
    with step(f"{provider}: chat, whole and streamed"):
        whole = litellm.completion(**asked, max_tokens=24).choices[0].message.content
        pieces = litellm.completion(**asked, max_tokens=24, stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole
    with step(f"{provider}: a tool, whole and streamed"):
        tools = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 300}
        called = litellm.completion(**asked, **tools)
        calls = called.choices[0].message.tool_calls
        check_weather(calls[0].function.arguments)
        chunks = list(litellm.completion(**asked, **tools, stream=True))
        built = litellm.stream_chunk_builder(chunks, messages=asked["messages"])
        assert [c.function.arguments for c in built.choices[0].message.tool_calls] == [
            c.function.arguments for c in calls
        ]
    with step(f"{provider}: structured output"):
        shaped = litellm.completion(**asked, response_format=Report, max_tokens=300)
        Report.model_validate_json(shaped.choices[0].message.content)
    with step(f"{provider}: an error"):
        error = refused(
            litellm.BadRequestError, lambda asked=asked: litellm.completion(**asked | {"temperature": -1})
        )
        assert "temperature" in str(error)

with step("completions"):
    done = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}", api_base=BASE, api_key="none", prompt=PROMPT, max_tokens=8
    )
    assert done.choices[0].text is not None

with step("responses"):
    made = litellm.responses(
        model=f"openai/{MODEL}", api_base=BASE, api_key="none", input=QUESTION, max_output_tokens=16
    )
    assert made.status in ("completed", "incomplete")

with step("messages"):
    answer = asyncio.run(
        litellm.anthropic_messages(
            model=f"anthropic/{MODEL}",
            api_base=URL,
            api_key="none",
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=16,
        )
    )
    assert answer["stop_reason"] in ("end_turn", "max_tokens")
