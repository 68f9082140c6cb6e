"""The OpenAI Agents SDK: a tool that has to be called, its result, the answer; whole and streamed, over both APIs."""

import asyncio
from typing import Annotated

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from common import BASE, MODEL, QUESTION, step
from openai import AsyncOpenAI
from pydantic import Field

set_tracing_disabled(True)
calls: list[tuple[str, int]] = []


@function_tool
def weather(city: Annotated[str, Field(max_length=20)], days: int) -> str:
    """The weather of a city."""
    calls.append((city, days))
    return f"Sunny in {city} for {days} days."


async def main() -> None:
    client = AsyncOpenAI(base_url=BASE, api_key="none", max_retries=0)
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        agent = Agent(
            name="Weather",
            instructions="Answer with the tool.",
            tools=[weather],
            model=kind(model=MODEL, openai_client=client),
            # Behind the call the choice goes back to the model's own: else the loop would have no end.
            model_settings=ModelSettings(
                tool_choice="required", temperature=0, max_tokens=200, parallel_tool_calls=False
            ),
        )
        with step(f"{kind.__name__}: whole"):
            calls.clear()
            whole = await Runner.run(agent, QUESTION, max_turns=8)
            assert calls and whole.final_output is not None
            first = calls[0]
        with step(f"{kind.__name__}: streamed"):
            calls.clear()
            streamed = Runner.run_streamed(agent, QUESTION, max_turns=8)
            async for _ in streamed.stream_events():
                pass
            assert calls[0] == first, (calls, first)


asyncio.run(main())
