"""OpenAI's Responses API."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from orthrus.deployments.access.call import Call
from orthrus.deployments.http.body import read_body
from orthrus.deployments.http.depends import admitted
from orthrus.deployments.responses.api import ResponsesApi
from orthrus.deployments.responses.body import ResponsesBody

router = APIRouter()


async def _responses(request: Request) -> ResponsesApi:
    api: ResponsesApi = request.app.state.responses
    return api


ResponsesDep = Annotated[ResponsesApi, Depends(_responses)]


@router.post("/v1/responses")
async def responses(
    request: Request, api: ResponsesDep, call: Annotated[Call, admitted("responses")]
) -> Response:
    return await api.create(call, await read_body(request, ResponsesBody, api.handler))


@router.post("/v1/responses/input_tokens")
async def input_tokens(
    request: Request, api: ResponsesDep, call: Annotated[Call, admitted("responses.input_tokens")]
) -> dict[str, Any]:
    return await api.count(call, await read_body(request, ResponsesBody, api.handler))


@router.get("/v1/responses/{id}")
async def stored_response(
    request: Request, api: ResponsesDep, call: Annotated[Call, admitted("responses.get")], id: str
) -> dict[str, Any]:
    return await api.get(call, id, request.query_params)


@router.delete("/v1/responses/{id}")
async def delete_response(
    api: ResponsesDep, call: Annotated[Call, admitted("responses.delete")], id: str
) -> dict[str, Any]:
    return await api.delete(call, id)


@router.get("/v1/responses/{id}/input_items")
async def input_items(
    request: Request, api: ResponsesDep, call: Annotated[Call, admitted("responses.input_items")], id: str
) -> dict[str, Any]:
    return await api.input_items(call, id, request.query_params)
