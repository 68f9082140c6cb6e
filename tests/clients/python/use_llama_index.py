"""LlamaIndex: OpenAILike, plain, streamed, with tools and structured output."""

from common import BASE, MODEL, PROMPT, QUESTION, step
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field


def weather(city: str, days: int) -> str:
    """The weather of a city."""
    return f"Sunny in {city} for {days} days."


class Weather(BaseModel):
    """What `weather` takes. LlamaIndex leaves out a limit that an annotation of the function states."""

    city: str = Field(max_length=20)
    days: int


class Report(BaseModel):
    """A report of the weather."""

    city: str = Field(max_length=20)
    sunny: bool


def model(max_tokens: int) -> OpenAILike:
    return OpenAILike(
        model=MODEL,
        api_base=BASE,
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        temperature=0,
        max_tokens=max_tokens,
        max_retries=0,
    )


llm, short = model(300), model(24)
asked = [ChatMessage(role="user", content=QUESTION)]
tool = FunctionTool.from_defaults(weather, fn_schema=Weather)

with step("chat, whole and streamed"):
    whole = short.chat(asked).message.content
    *_, last = short.stream_chat(asked)
    assert last.message.content == whole, (last, whole)

with step("complete"):
    assert OpenAILike(
        model=MODEL, api_base=BASE, api_key="none", is_chat_model=False, temperature=0, max_tokens=8
    ).complete(PROMPT)

with step("a tool, whole and streamed"):
    answer = llm.chat_with_tools([tool], chat_history=asked, tool_required=True)
    [call] = llm.get_tool_calls_from_response(answer)
    assert call.tool_name == "weather" and set(call.tool_kwargs) == {"city", "days"}
    *_, last = llm.stream_chat_with_tools([tool], chat_history=asked, tool_required=True)
    [streamed] = llm.get_tool_calls_from_response(last)
    assert streamed.tool_kwargs == call.tool_kwargs, (streamed, call)

with step("a tool's result"):
    output = tool(**call.tool_kwargs)
    result = ChatMessage(
        role="tool", content=str(output), additional_kwargs={"tool_call_id": call.tool_id, "name": "weather"}
    )
    assert short.chat([*asked, answer.message, result]).message.role == "assistant"

with step("structured output"):
    report = llm.as_structured_llm(Report).chat(asked).raw
    assert isinstance(report, Report), report
