"""Requests and answers of OpenAI's Responses API without a server, each checked against OpenAI's own types."""

import json
from typing import Any

from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter, ValidationError

from orthrus.deployments.bodies.faults import describe
from orthrus.deployments.generation.choices import Choice
from orthrus.deployments.generation.text_chunk import TextChunk
from orthrus.deployments.responses.body import ResponsesBody
from orthrus.deployments.responses.format import ResponsesFormat

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "name": "weather", "description": "d", "parameters": SCHEMA, "strict": True}


def body(**fields: Any) -> ResponsesBody:
    asked = {"model": "m", "input": "hi", **fields}
    try:
        return ResponsesBody.model_validate_json(json.dumps(asked))
    except ValidationError as error:
        raise describe(error) from None


def streamed(
    items: list[TextChunk], asked: ResponsesBody, tokenizer: Any = None
) -> tuple[list[Any], dict[str, Any]]:
    """The events, each of them OpenAI's to the letter and digested by OpenAI's client, and the response in the last."""
    out = ResponsesFormat(asked, tokenizer, stored=False)
    raw = [*out.opening(), *(event for item in items for event in out.events(item))]
    events = [EVENTS.validate_json(json.dumps(event), strict=True) for event in raw]
    state: Any = ResponseStreamState(input_tools=omit, text_format=omit)
    for event in events:
        state.handle_event(event)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    return events, raw[-1]["response"]


def whole(items: list[TextChunk], asked: ResponsesBody, tokenizer: Any = None) -> dict[str, Any]:
    response = ResponsesFormat(asked, tokenizer, stored=False).whole(Choice(items))
    Response.model_validate_json(json.dumps(response), strict=True)
    return response


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    output = [{**item, "id": None} for item in response["output"]]
    return {**response, "id": None, "created_at": None, "completed_at": None, "output": output}
