"""Converts the gRPC messages of orthrus.proto to the types of bodies and of the engine, and back."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from ray.serve.grpc_util import RayServegRPCContext

from orthrus.deployments.bodies.body import sampling_params
from orthrus.deployments.bodies.completion_body import CompletionBody
from orthrus.deployments.bodies.faults import describe
from orthrus.deployments.chat.body import ChatBody
from orthrus.deployments.chat.output import joined
from orthrus.deployments.failures.failure import describe_failure
from orthrus.deployments.generation.text_chunk import TextChunk
from orthrus.deployments.proto import orthrus_pb2 as pb
from orthrus.errors import RequestError
from orthrus.requests.request import SamplingParams, TokenLogprob

_REPEATED = {"stop": tuple, "stop_token_ids": tuple, "logit_bias": dict, "bad_words": tuple}


def request_params(sampling: pb.SamplingParams) -> SamplingParams:
    """Sampling parameters. What is unset has its default, and the seed is drawn. Raises RequestError."""
    values: dict[str, Any] = {}
    for field in pb.SamplingParams.DESCRIPTOR.fields:
        value = getattr(sampling, field.name)
        if field.name == "allowed_token_ids":
            values[field.name] = tuple(value) or None
        elif field.name in _REPEATED:
            values[field.name] = _REPEATED[field.name](value)
        elif sampling.HasField(field.name):
            values[field.name] = value
    return sampling_params(**values).with_seed()


def chat_body(request: pb.ChatRequest) -> ChatBody:
    """The conversation as the HTTP API has it, without its sampling parameters. Raises RequestError."""
    choice = request.tool_choice
    schema = _json("json_schema", request.json_schema)
    if request.json_schema and not isinstance(schema, dict | bool):
        raise RequestError("json_schema must be a JSON Schema: an object, true or false", "json_schema")
    named = {"type": "function", "function": {"name": choice}}
    try:
        return ChatBody.model_validate(
            {
                "model": request.model,
                "messages": [_message(message) for message in request.messages],
                "tools": [_tool(index, tool) for index, tool in enumerate(request.tools)] or None,
                "tool_choice": choice or None if choice in ("", "auto", "none", "required") else named,
                "enable_thinking": _optional(request, "enable_thinking"),
                "parallel_tool_calls": _optional(request, "parallel_tool_calls"),
                "json_schema": request.json_schema or None,
                # So that truncate_prompt_tokens leaves room for the answer.
                "max_tokens": request.sampling.max_tokens
                if request.sampling.HasField("max_tokens")
                else None,
                "chat_template_kwargs": _json("chat_template_kwargs", request.chat_template_kwargs),
                "reasoning_effort": request.reasoning_effort or None,
                "include_reasoning": _optional(request, "include_reasoning"),
                "add_generation_prompt": _optional(request, "add_generation_prompt"),
                "continue_final_message": request.continue_final_message,
                **_common(request),
            }
        )
    except ValidationError as error:
        raise describe(error, ChatBody) from None


def completion_body(request: pb.GenerateRequest) -> CompletionBody:
    """The request as the HTTP API has it, without its sampling parameters. Raises RequestError."""
    match request.WhichOneof("input"):
        case "prompt":
            prompt: Any = request.prompt
        case "prompt_token_ids":
            prompt = list(request.prompt_token_ids.ids)
        case _:
            raise RequestError("set prompt or prompt_token_ids", "prompt")
    special = _optional(request, "add_special_tokens")
    try:
        return CompletionBody.model_validate(
            {"model": request.model, "prompt": prompt, "add_special_tokens": special, **_common(request)}
        )
    except ValidationError as error:
        raise describe(error, CompletionBody) from None


def _common(request: pb.GenerateRequest | pb.ChatRequest) -> dict[str, Any]:
    """What both kinds of request have besides sampling parameters."""
    constraint = request.structured_outputs
    kind = constraint.WhichOneof("constraint")
    if request.HasField("structured_outputs") and kind is None:
        raise RequestError("structured_outputs must have a constraint", "structured_outputs")
    value = getattr(constraint, kind) if kind is not None else None
    if isinstance(value, pb.Choices):
        value = list(value.values)
    return {
        "structured_outputs": {kind: value} if kind is not None else None,
        "truncate_prompt_tokens": _optional(request, "truncate_prompt_tokens"),
        "priority": request.priority,
        "cache_salt": request.cache_salt or None,
        "return_token_ids": request.return_token_ids,
    }


def _optional(request: pb.GenerateRequest | pb.ChatRequest, field: str) -> Any:
    return getattr(request, field) if request.HasField(field) else None


def _message(message: pb.ChatMessage) -> dict[str, Any]:
    """A message as the HTTP API has it. Empty fields are left out, because templates test whether a key is there."""
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in message.tool_calls
    ]
    optional = {
        "reasoning_content": message.reasoning_content,
        "tool_calls": calls,
        "tool_call_id": message.tool_call_id,
    }
    given = {key: value for key, value in optional.items() if value}
    return {"role": message.role, "content": message.content, **given}


def _tool(index: int, tool: pb.Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if (parameters := _json(f"tools[{index}].parameters", tool.parameters)) is not None:
        function["parameters"] = parameters
    return {"type": "function", "function": function}


def _json(field: str, text: str) -> Any:
    """The JSON in a text field, None if it is empty. Raises RequestError naming the field."""
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{field} must be JSON: {error}", field) from None


def generate_chunk(index: int, items: Sequence[TextChunk], prompt: Sequence[int] = ()) -> pb.GenerateChunk:
    """One message for `items`, which belong to one choice. prompt: the prompt's token ids, if the message has them."""
    text = "".join([item.text for item in items])
    message = pb.GenerateChunk(index=index, text=text, prompt_token_ids=prompt)
    _add_tokens(message, items)
    return message


def chat_chunk(
    index: int, items: Sequence[TextChunk], prompt: Sequence[int] = (), include_reasoning: bool = True
) -> pb.ChatChunk:
    """One message for `items`, which belong to one choice of a chat. prompt: the prompt's token ids, if the message has them."""
    delta = items[0].delta if len(items) == 1 else joined(item.delta for item in items if item.delta)
    assert delta is not None, "a chat's chunks have deltas"
    message = pb.ChatChunk(
        index=index,
        content=delta.content,
        reasoning_content=delta.reasoning if include_reasoning else "",
        prompt_token_ids=prompt,
        tool_calls=[
            pb.ToolCall(index=call.index, id=call.id or "", name=call.name or "", arguments=call.arguments)
            for call in delta.tool_calls
        ],
    )
    _add_tokens(message, items)
    return message


def _add_tokens(message: pb.GenerateChunk | pb.ChatChunk, items: Sequence[TextChunk]) -> None:
    """What both kinds of chunk have: tokens, log-probabilities, and how it ended."""
    for item in items:
        message.token_ids.extend(item.chunk.token_ids)
        message.logprobs.extend(map(_token_logprob, item.chunk.logprobs or ()))
        if item.chunk.prompt_logprobs is not None:
            message.prompt_logprobs.extend(map(_token_logprob, item.chunk.prompt_logprobs.tokens()))
    message.finish_reason = items[-1].finish_reason or ""
    if (stats := items[-1].chunk.stats) is not None:
        for field in pb.Stats.DESCRIPTOR.fields:
            setattr(message.stats, field.name, getattr(stats, field.name))


def _token_logprob(scored: TokenLogprob) -> pb.TokenLogprob:
    top = [pb.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in scored.top]
    return pb.TokenLogprob(token_id=scored.token_id, logprob=scored.logprob, top=top)


def with_status(error: Exception, context: RayServegRPCContext, sent_as: Mapping[str, str]) -> Exception:
    """Set the call's gRPC status for an error. Returns the error to raise: a stream can't tell Serve otherwise."""
    failure = describe_failure(error, sent_as)
    context.set_code(failure.grpc_code)
    context.set_details(failure.message)
    return error
