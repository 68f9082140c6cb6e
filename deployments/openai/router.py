"""OpenAI's completions and chat completions, and the list of models."""

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from orthrus.deployments.access.call import Call
from orthrus.deployments.bodies.completion_body import CompletionBody
from orthrus.deployments.chat.body import ChatBody
from orthrus.deployments.generation.handler import Answer, Handler
from orthrus.deployments.http.body import read_body
from orthrus.deployments.http.depends import HandlerDep, Identified, admitted
from orthrus.deployments.openai.format import CompletionFormat
from orthrus.deployments.openai.logprobs import Echo
from orthrus.deployments.openai.respond import respond
from orthrus.requests.request import SamplingParams

router = APIRouter()


@router.post("/v1/completions")
async def completions(
    request: Request, handler: HandlerDep, call: Annotated[Call, admitted("completions")]
) -> Response:
    body = await read_body(request, CompletionBody, handler)
    params = await asyncio.to_thread(_read, call, body)
    answer = await handler.complete(call, body, params)
    out = CompletionFormat(
        False,
        body.model,
        handler.model.tokenizer,
        body.options.include_usage,
        n=params.n,
        logprobs=body.logprobs,
        prompt_logprobs=body.prompt_logprobs,
        skip_special_tokens=params.skip_special_tokens,
        options=body.options,
        prompts=answer.prompts,
    )
    if body.echo:
        out.echo = await _echoes(handler, body, answer)
    return await respond(call, answer, out, stream=bool(body.stream))


def _read(call: Call, body: CompletionBody | ChatBody) -> SamplingParams:
    """Note what the body says of the call, and return its sampling parameters. Raises RequestError.

    Call it in a thread: a grammar may take long to make.
    """
    call.read(body)
    return body.sampling()


async def _echoes(handler: Handler, body: CompletionBody, answer: Answer) -> Sequence[Echo]:
    """What is put before the choices of each prompt."""
    return [
        await asyncio.to_thread(
            Echo.of,
            handler.model.tokenizer,
            # A truncated prompt is spelled from its tokens: the client's text is longer.
            given if body.truncate_prompt_tokens is None else tokens,
            tokens,
            body.logprobs is not None,
        )
        for given, tokens in zip(body.prompts(), answer.prompts, strict=True)
    ]


@router.post("/v1/chat/completions")
async def chat_completions(
    request: Request, handler: HandlerDep, call: Annotated[Call, admitted("chat.completions")]
) -> Response:
    body = await read_body(request, ChatBody, handler)
    params = await asyncio.to_thread(_read, call, body)
    answer = await handler.chat(call, body, params)
    out = CompletionFormat(
        True,
        body.model,
        handler.model.tokenizer,
        body.options.include_usage,
        n=params.n,
        logprobs=body.alternatives,
        prompt_logprobs=body.prompt_logprobs,
        options=body.options,
        prompts=answer.prompts,
    )
    return await respond(call, answer, out, stream=bool(body.stream))


@router.get("/v1/models", dependencies=[Identified])
async def models(handler: HandlerDep) -> dict[str, Any]:
    return {"object": "list", "data": [handler.model.card]}


@router.get("/v1/models/{model:path}", dependencies=[Identified])
async def model(handler: HandlerDep, model: str) -> dict[str, Any]:
    handler.model.check_name(model)
    return handler.model.card
