"""LangChain: ChatOpenAI, plain, streamed, with tools and structured output, over both of OpenAI's APIs; an agent's loop."""

from typing import Annotated

import openai
from common import BASE, MODEL, PROMPT, QUESTION, refused, step
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field


@tool
def weather(city: Annotated[str, Field(max_length=20)], days: int) -> str:
    """The weather of a city."""
    return f"Sunny in {city} for {days} days."


class Report(BaseModel):
    """A report of the weather."""

    city: str = Field(max_length=20)
    sunny: bool


def model(**settings: object) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=BASE,
        api_key="none",
        model=MODEL,
        max_retries=0,
        **{"temperature": 0, "max_tokens": 300, **settings},
    )


for api in ("chat", "responses"):
    chat = model(use_responses_api=api == "responses")
    short = model(use_responses_api=api == "responses", max_tokens=24)
    with step(f"{api}: invoke and stream"):
        whole = short.invoke(QUESTION)
        streamed = None
        for piece in short.stream(QUESTION):
            streamed = piece if streamed is None else streamed + piece
        assert streamed.text == whole.text, (streamed, whole)
    with step(f"{api}: a tool, whole and streamed"):
        forced = chat.bind_tools([weather], tool_choice="any", parallel_tool_calls=False)
        answer = forced.invoke(QUESTION)
        [call] = answer.tool_calls
        assert call["name"] == "weather"
        assert isinstance(call["args"]["city"], str) and isinstance(call["args"]["days"], int)
        streamed = None
        for piece in forced.stream(QUESTION):
            streamed = piece if streamed is None else streamed + piece
        assert [c["args"] for c in streamed.tool_calls] == [call["args"]], streamed
    with step(f"{api}: a tool's result"):
        result = ToolMessage("Sunny.", tool_call_id=call["id"])
        assert short.bind_tools([weather]).invoke([HumanMessage(QUESTION), answer, result]) is not None
    with step(f"{api}: structured output"):
        for method in ("json_schema", "function_calling"):
            report = chat.with_structured_output(Report, method=method).invoke(QUESTION)
            assert isinstance(report, Report), (method, report)

with step("an agent"):
    state = create_agent(model(max_tokens=24), tools=[weather]).invoke({"messages": [HumanMessage(QUESTION)]})
    assert len(state["messages"]) >= 2

with step("completions"):
    assert OpenAI(base_url=BASE, api_key="none", model=MODEL, max_tokens=8, temperature=0).invoke(PROMPT)

with step("an error"):
    error = refused(openai.BadRequestError, lambda: model(temperature=-1).invoke(QUESTION))
    assert "temperature" in str(error)
