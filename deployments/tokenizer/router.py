"""Tokens of a text or a chat, the text of tokens, and the tokenizer's configuration: the paths are vLLM's."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Request

from orthrus.deployments.access.call import Call
from orthrus.deployments.http.body import read_body
from orthrus.deployments.http.depends import HandlerDep, Identified, admitted
from orthrus.deployments.openai.logprobs import spell
from orthrus.deployments.tokenizer.body import DetokenizeBody, TokenizeBody
from orthrus.deployments.tokenizer.info import tokenizer_info as describe_tokenizer
from orthrus.errors import RequestError

router = APIRouter()


@router.post("/tokenize")
async def tokenize(
    request: Request, handler: HandlerDep, call: Annotated[Call, admitted("tokenize")]
) -> dict[str, Any]:
    body = await read_body(request, TokenizeBody, handler)
    model = handler.model
    if body.prompt is None:
        tokens = (await handler.chat_prompt(body.chat())).tokens
    else:
        tokens = await model.encode(body.prompt, add_special_tokens=body.add_special_tokens)
    answer: dict[str, Any] = {"count": len(tokens), "max_model_len": model.max_model_len, "tokens": tokens}
    if body.return_token_strs:
        answer["token_strs"] = [spell(model.tokenizer, token) for token in tokens]
    call.outcome = "ok"
    return answer


@router.post("/detokenize")
async def detokenize(
    request: Request, handler: HandlerDep, call: Annotated[Call, admitted("detokenize")]
) -> dict[str, str]:
    body = await read_body(request, DetokenizeBody, handler)
    tokenizer = handler.model.tokenizer
    known = len(tokenizer)
    if any(not 0 <= token < known for token in body.tokens):
        raise RequestError(f"token ids must be between 0 and {known - 1}", "tokens")
    text = await asyncio.to_thread(tokenizer.decode, body.tokens)
    call.outcome = "ok"
    return {"prompt": text}


@router.get("/tokenizer_info", dependencies=[Identified])
async def tokenizer_info(handler: HandlerDep) -> dict[str, Any]:
    return describe_tokenizer(handler.model.tokenizer, handler.model.max_model_len)
