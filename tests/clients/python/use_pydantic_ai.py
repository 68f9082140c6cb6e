"""pydantic-ai: text, streams, output by tool and by schema, a tool's loop; over both of OpenAI's APIs."""

import asyncio

from common import BASE, MODEL, QUESTION, step
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Report(BaseModel):
    """A report of the weather."""

    city: str = Field(max_length=20)
    sunny: bool


provider = OpenAIProvider(base_url=BASE, api_key="none")


async def main() -> None:
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        model = kind(MODEL, provider=provider)
        name = kind.__name__
        short = {"temperature": 0, "max_tokens": 24}
        with step(f"{name}: text, whole and streamed"):
            whole = await Agent(model, model_settings=short).run(QUESTION)
            async with Agent(model, model_settings=short).run_stream(QUESTION) as stream:
                assert await stream.get_output() == whole.output
        for output in (ToolOutput(Report), NativeOutput(Report)):
            with step(f"{name}: {type(output).__name__}"):
                agent = Agent(model, output_type=output, model_settings={"temperature": 0, "max_tokens": 400})
                report = (await agent.run(QUESTION)).output
                assert isinstance(report, Report)
                async with agent.run_stream(QUESTION) as stream:
                    assert await stream.get_output() == report
        with step(f"{name}: with a tool at hand"):
            agent = Agent(model, model_settings=short)

            @agent.tool_plain
            def weather(city: str, days: int) -> str:
                """The weather of a city."""
                return f"Sunny in {city} for {days} days."

            assert (await agent.run(QUESTION)).output is not None


asyncio.run(main())
