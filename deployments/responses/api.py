"""What the endpoints of OpenAI's Responses API do, from a body to an answer."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse, Response
from pydantic import TypeAdapter, ValidationError

from orthrus.deployments.access.call import Call
from orthrus.deployments.failures.errors import ResponseNotFound
from orthrus.deployments.generation.handler import Handler
from orthrus.deployments.http.body import name_ignored
from orthrus.deployments.http.events import stream_answer
from orthrus.deployments.responses.body import ResponsesBody
from orthrus.deployments.responses.format import ResponsesFormat
from orthrus.deployments.responses.items import Item, listed
from orthrus.deployments.responses.store import Responses, StoredResponse
from orthrus.errors import RequestError

_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[Item])
_HOW_TO_STORE = "responses are not stored here: set api.response_store in the server's config"
_MOST_LISTED = 100


class ResponsesApi:
    """Makes, keeps, finds and deletes responses."""

    def __init__(self, handler: Handler, store: Responses | None) -> None:
        """store: None if responses are not stored."""
        self.handler, self._store = handler, store

    async def create(self, call: Call, body: ResponsesBody) -> Response:
        """The response, whole or as events. Raises RequestError, ModelUnavailable, and what `generate` raises."""
        name_ignored(call, body.left_out)
        before = await self._before(call, body)
        call.sent_as = body.field_names(before)
        chat = body.chat(before)
        params = chat.sampling()
        # In a thread: a grammar may take long to make.
        await asyncio.to_thread(call.read, chat)
        answer = await self.handler.chat(call, chat, params)
        store = self._store if body.store is not False else None
        out = ResponsesFormat(body, self.handler.model.tokenizer, stored=store is not None, before=before)

        async def keep() -> None:
            if store is not None:
                items = [listed(item) for item in (*before, *body.items)]
                kept = StoredResponse(out.response, [*items, *out.response["output"]], len(items))
                await store.keep(_owner(call), kept)

        if body.stream:
            return await stream_answer(call, answer, out, keep)
        [choice] = await answer.choices()
        response = out.whole(choice)
        await keep()
        call.outcome = "ok"
        return JSONResponse(response)

    async def count(self, call: Call, body: ResponsesBody) -> dict[str, Any]:
        """How many tokens the prompt would have. Raises what `create` raises."""
        name_ignored(call, body.left_out)
        before = await self._before(call, body)
        call.sent_as = body.field_names(before)
        prompt = await self.handler.chat_prompt(body.chat(before))
        call.outcome = "ok"
        return {"object": "response.input_tokens", "input_tokens": len(prompt.tokens)}

    async def get(self, call: Call, id: str, query: Mapping[str, str]) -> dict[str, Any]:
        """A stored response of this caller's. Raises RequestError, ResponseNotFound, ModelUnavailable."""
        if query.get("stream", "false") != "false":
            raise RequestError("a stored response is not streamed again: leave out stream", "stream")
        stored = await self._find(call, id)
        call.outcome = "ok"
        return stored.response

    async def delete(self, call: Call, id: str) -> dict[str, Any]:
        """Forget a stored response of this caller's. Raises ResponseNotFound, ModelUnavailable."""
        if self._store is None:
            raise ResponseNotFound(_HOW_TO_STORE)
        if not await self._store.delete(_owner(call), id):
            raise ResponseNotFound(f"there is no response {id!r} here, or no longer")
        call.outcome = "ok"
        return {"id": id, "object": "response", "deleted": True}

    async def input_items(self, call: Call, id: str, query: Mapping[str, str]) -> dict[str, Any]:
        """A page of what went into a stored response, the newest first unless `order` is asc. Raises as `get` does."""
        limit, order = query.get("limit", "20"), query.get("order", "desc")
        if not limit.isdecimal() or len(limit) > 9 or not 1 <= int(limit) <= _MOST_LISTED:
            raise RequestError(f"limit must be between 1 and {_MOST_LISTED}, got {limit}", "limit")
        if order not in ("asc", "desc"):
            raise RequestError(f"order must be asc or desc, got {order!r}", "order")
        stored = await self._find(call, id)
        items = stored.items[: stored.inputs]
        if order == "desc":
            items.reverse()
        if (after := query.get("after")) is not None:
            ids = [item["id"] for item in items]
            if after not in ids:
                raise RequestError(f"there is no item {after!r} in this response's input", "after")
            items = items[ids.index(after) + 1 :]
        page = items[: int(limit)]
        first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
        call.outcome = "ok"
        return {
            "object": "list",
            "data": page,
            "first_id": first,
            "last_id": last,
            "has_more": len(items) > len(page),
        }

    async def _find(self, call: Call, id: str) -> StoredResponse:
        if self._store is None:
            raise ResponseNotFound(_HOW_TO_STORE)
        stored = await self._store.find(_owner(call), id)
        if stored is None:
            raise ResponseNotFound(f"there is no response {id!r} here, or no longer")
        return stored

    async def _before(self, call: Call, body: ResponsesBody) -> Sequence[Item]:
        """The items of the earlier turns that this one continues."""
        if body.previous_response_id is None:
            return ()
        if self._store is None:
            raise RequestError(
                f"previous_response_id: {_HOW_TO_STORE}, or send the earlier items as input",
                "previous_response_id",
            )
        stored = await self._store.find(_owner(call), body.previous_response_id)
        if stored is None:
            raise RequestError(
                f"previous_response_id: there is no response {body.previous_response_id!r} here, or no longer",
                "previous_response_id",
            )
        try:
            return _ITEMS.validate_python(stored.items)
        except ValidationError as error:
            raise RequestError(
                f"previous_response_id: response {body.previous_response_id!r} has a call that was cut off: send the earlier "
                "items as input, without that call",
                "previous_response_id",
            ) from error


def _owner(call: Call) -> str:
    """Whose responses a call may see: those of its key; where there are no keys, everybody's."""
    return call.key.name if call.key is not None else ""
