"""Anthropic's Messages API."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from orthrus.deployments.access.call import Call
from orthrus.deployments.http.body import read_body
from orthrus.deployments.http.depends import HandlerDep, admitted
from orthrus.deployments.http.events import stream_answer
from orthrus.deployments.messages.body import CountTokensBody, MessagesBody
from orthrus.deployments.messages.format import MessageFormat

router = APIRouter()


@router.post("/v1/messages")
async def messages(
    request: Request, handler: HandlerDep, call: Annotated[Call, admitted("messages")]
) -> Response:
    body = await read_body(request, MessagesBody, handler)
    chat = body.chat()
    params = chat.sampling()
    # In a thread: the grammar of a schema may take long to make.
    await asyncio.to_thread(call.read, chat)
    answer = await handler.chat(call, chat, params)
    [prompt] = answer.prompts
    out = MessageFormat(body.model, len(prompt), body.max_tokens)
    if body.stream:
        return await stream_answer(call, answer, out)
    [choice] = await answer.choices()
    call.outcome = "ok"
    return JSONResponse(out.whole(choice))


@router.post("/v1/messages/count_tokens")
async def count_tokens(
    request: Request, handler: HandlerDep, call: Annotated[Call, admitted("messages.count_tokens")]
) -> dict[str, int]:
    body = await read_body(request, CountTokensBody, handler)
    prompt = await handler.chat_prompt(body.chat())
    call.outcome = "ok"
    return {"input_tokens": len(prompt.tokens)}
