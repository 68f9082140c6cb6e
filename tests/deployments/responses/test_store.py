"""Stored responses: bounded, kept apart by owner, listed in pages; as plain objects, without Ray."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from orthrus.deployments.access.call import Call
from orthrus.deployments.access.keys import ApiKey
from orthrus.deployments.config.api import ApiConfig, ResponseStoreConfig
from orthrus.deployments.failures.errors import ModelUnavailable, ResponseNotFound
from orthrus.deployments.failures.failure import describe_failure
from orthrus.deployments.generation.handler import Handler
from orthrus.deployments.generation.served_model import ServedModel
from orthrus.deployments.responses.api import ResponsesApi
from orthrus.deployments.responses.body import ResponsesBody
from orthrus.deployments.responses.store import Responses, ResponseStore, StoredResponse
from orthrus.errors import RequestError


class Handle:
    """Calls an object as Serve's handle would, in this process."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._target, name)

        class Method:
            @staticmethod
            def remote(*args: Any) -> Any:
                return method(*args)

        return Method


def held(store: ResponseStore, **ids: str) -> dict[str, str]:
    """Which of `ids`, separated by blanks, the store has, for each owner."""
    return {
        owner: " ".join(id for id in names.split() if asyncio.run(store.get(owner, id)))
        for owner, names in ids.items()
    }


def fill(store: ResponseStore, owner: str, ids: str, size: int = 10) -> None:
    for id in ids.split():
        asyncio.run(store.put(owner, id, b"x" * size))


def store_of(clock: Callable[[], float] = lambda: 0.0, **bounds: Any) -> ResponseStore:
    return ResponseStore(ResponseStoreConfig(**bounds), clock)


def test_the_oldest_go_when_there_are_too_many() -> None:
    store = store_of(max_responses=3)
    fill(store, "a", "1 2 3 4 5")
    assert held(store, a="1 2 3 4 5") == {"a": "3 4 5"}
    store = store_of(max_bytes=35)
    fill(store, "a", "1 2 3 4 5")
    assert held(store, a="1 2 3 4 5") == {"a": "3 4 5"}


def test_the_owner_with_the_most_bytes_loses_responses() -> None:
    store = store_of(max_bytes=100)
    fill(store, "small", "1 2")
    fill(store, "large", "1 2 3 4 5 6 7 8 9 10 11 12")
    assert held(store, small="1 2", large="1 2 3 4 5 6 7 8 9 10 11 12") == {
        "small": "1 2",
        "large": "5 6 7 8 9 10 11 12",
    }


def test_a_response_that_can_never_fit_pushes_nothing_out() -> None:
    store = store_of(max_bytes=100)
    fill(store, "a", "1 2")
    assert asyncio.run(store.put("b", "huge", b"x" * 101)) is False
    assert held(store, a="1 2", b="huge") == {"a": "1 2", "b": ""}


def test_responses_expire() -> None:
    now = 0.0
    store = store_of(lambda: now, lifetime_s=60)
    fill(store, "a", "1")
    now = 30.0
    fill(store, "a", "2")
    now = 60.0
    assert held(store, a="1 2") == {"a": "2"}
    now = 90.0
    assert held(store, a="1 2") == {"a": ""}
    assert store._kept == store._bytes == {}


def test_owners_are_kept_apart() -> None:
    store = store_of()
    fill(store, "a", "1")
    assert held(store, a="1", b="1") == {"a": "1", "b": ""}
    assert asyncio.run(store.delete("b", "1")) is False
    assert asyncio.run(store.delete("a", "1")) is True
    assert held(store, a="1") == {"a": ""} and asyncio.run(store.delete("a", "1")) is False


# --- the ingress's side


def call_of(name: str) -> Call:
    return Call("responses", ApiKey(name=name, sha256="0" * 64))


@pytest.fixture
def api() -> ResponsesApi:
    """The API with a stored response, alice's r1, whose prompt had seven items."""
    responses = Responses(Handle(store_of()))
    items = [{"id": f"i{i}", "type": "message", "role": "user", "content": str(i)} for i in range(8)]
    asyncio.run(responses.keep("alice", StoredResponse({"id": "r1", "output": items[7:]}, items, 7)))
    return ResponsesApi(None, responses)  # type: ignore[arg-type]


def test_only_its_key_finds_a_response(api: ResponsesApi) -> None:
    alice, bob = call_of("alice"), call_of("bob")
    assert asyncio.run(api.get(alice, "r1", {}))["id"] == "r1"
    for ask in (api.get(bob, "r1", {}), api.delete(bob, "r1"), api.input_items(bob, "r1", {})):
        with pytest.raises(ResponseNotFound):
            asyncio.run(ask)
    assert asyncio.run(api.delete(alice, "r1")) == {"id": "r1", "object": "response", "deleted": True}
    with pytest.raises(ResponseNotFound):
        asyncio.run(api.get(alice, "r1", {}))
    body = ResponsesBody(model="m", input="hi", previous_response_id="r1")
    with pytest.raises(RequestError, match="previous_response_id: there is no response 'r1'"):
        asyncio.run(api.create(alice, body))


def test_input_items_come_in_pages(api: ResponsesApi) -> None:
    alice, ids, query = call_of("alice"), [], {"limit": "3"}
    for _ in range(3):
        page = asyncio.run(api.input_items(alice, "r1", query))
        ids.append([item["id"] for item in page["data"]])
        assert (page["first_id"], page["last_id"]) == (ids[-1][0], ids[-1][-1])
        query = {"limit": "3", "after": page["last_id"]}
    assert ids == [["i6", "i5", "i4"], ["i3", "i2", "i1"], ["i0"]] and page["has_more"] is False
    page = asyncio.run(api.input_items(alice, "r1", {"order": "asc"}))
    assert [item["id"] for item in page["data"]] == [f"i{i}" for i in range(7)]
    for query in ({"limit": "0"}, {"limit": "101"}, {"limit": "x"}, {"order": "up"}, {"after": "i7"}):
        with pytest.raises(RequestError):
            asyncio.run(api.input_items(alice, "r1", query))


def test_without_a_store_the_setting_is_named() -> None:
    api = ResponsesApi(None, None)  # type: ignore[arg-type]
    call = call_of("alice")
    for ask in (api.get(call, "r", {}), api.delete(call, "r"), api.input_items(call, "r", {})):
        with pytest.raises(ResponseNotFound, match=r"api\.response_store"):
            asyncio.run(ask)
    with pytest.raises(RequestError, match=r"api\.response_store") as caught:
        asyncio.run(api.create(call, ResponsesBody(model="m", input="hi", previous_response_id="r")))
    assert caught.value.param == "previous_response_id"


def test_a_store_that_is_lost_does_not_cost_the_answer() -> None:
    class Lost:
        async def put(self, *args: Any) -> Any:
            raise ConnectionError

        get = put

    responses = Responses(Handle(Lost()))
    asyncio.run(responses.keep("a", StoredResponse({"id": "r"}, [], 0)))
    with pytest.raises(ModelUnavailable):
        asyncio.run(responses.find("a", "r"))


def test_a_stored_response_is_found_unchanged() -> None:
    responses = Responses(Handle(store_of()))
    stored = StoredResponse({"id": "r", "text": "Łódź"}, [{"id": "i"}], 1)
    asyncio.run(responses.keep("a", stored))
    assert asyncio.run(responses.find("a", "r")) == stored


def test_errors_name_what_the_client_sent(tokenizer: Any) -> None:
    """The chat body that a response becomes has other names for the fields."""
    model = ServedModel("m", tokenizer, 256, 100)
    handler = Handler(model, None, None, None, ApiConfig())  # type: ignore[arg-type]
    call = call_of("alice")
    with pytest.raises(RequestError) as caught:  # This tokenizer has no chat template.
        asyncio.run(ResponsesApi(handler, None).create(call, ResponsesBody(model="m", input="hi")))
    assert caught.value.param == "messages"
    assert describe_failure(caught.value, call.sent_as).param == "input"
