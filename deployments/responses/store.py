"""Stores responses, which can be read again and continued, in one place for all ingress replicas.

They are kept in memory, within bounds of number, bytes and age. Beyond a bound, the key with the most bytes loses its oldest
responses, so that no key's responses push out those of a key that stores less. When a store is lost, so are its responses, and
Serve starts another store.
"""

import asyncio
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orthrus.deployments.config.api import ResponseStoreConfig
from orthrus.deployments.failures.errors import ModelUnavailable

logger = logging.getLogger("ray.serve")

_ANSWER_SECONDS = 5.0
"""How long an ingress waits for the store."""


@dataclass
class _Kept:
    text: bytes
    until: float


@dataclass(frozen=True)
class StoredResponse:
    """A response that can be read again and continued."""

    response: dict[str, Any]
    """As the client got it."""
    items: list[dict[str, Any]]
    """All items of its prompt and then of its output, in the API's JSON."""
    inputs: int
    """How many of the items are of the prompt."""


class ResponseStore:
    """Texts by owner and id. `clock`: seconds, for tests."""

    def __init__(self, config: ResponseStoreConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        # Of each owner, the oldest first.
        self._kept: dict[str, OrderedDict[str, _Kept]] = {}
        self._bytes: dict[str, int] = {}

    async def put(self, owner: str, id: str, text: bytes) -> bool:
        """Store a text, and delete old ones until all are within the bounds. Returns whether the text is stored."""
        if len(text) > self._config.max_bytes:
            return False
        self._forget_old()
        self._kept.setdefault(owner, OrderedDict())[id] = _Kept(text, self._clock() + self._config.lifetime_s)
        self._bytes[owner] = self._bytes.get(owner, 0) + len(text)
        while (
            sum(self._bytes.values()) > self._config.max_bytes
            or sum(map(len, self._kept.values())) > self._config.max_responses
        ):
            largest = max(self._bytes, key=lambda name: self._bytes[name])
            self._remove(largest, next(iter(self._kept[largest])))
        return id in self._kept.get(owner, ())

    async def get(self, owner: str, id: str) -> bytes | None:
        """The text, None if there is none of this owner's."""
        self._forget_old()
        owners = self._kept.get(owner)
        return owners[id].text if owners is not None and id in owners else None

    async def delete(self, owner: str, id: str) -> bool:
        """Delete a text of this owner's. Returns whether there was one."""
        self._forget_old()
        if id not in self._kept.get(owner, ()):
            return False
        self._remove(owner, id)
        return True

    def _forget_old(self) -> None:
        now = self._clock()
        for owner in list(self._kept):
            while owner in self._kept:
                oldest, kept = next(iter(self._kept[owner].items()))
                if kept.until > now:
                    break
                self._remove(owner, oldest)

    def _remove(self, owner: str, id: str) -> None:
        self._bytes[owner] -= len(self._kept[owner].pop(id).text)
        if not self._kept[owner]:
            del self._kept[owner], self._bytes[owner]


class Responses:
    """An ingress replica's client of the store."""

    def __init__(self, store: Any) -> None:
        """store: handle of a `ResponseStore` deployment."""
        self._store = store

    async def keep(self, owner: str, stored: StoredResponse) -> None:
        """Store a response. A failure is only logged, since the client has its answer all the same."""
        text = json.dumps(vars(stored), ensure_ascii=False).encode(errors="replace")
        try:
            kept = await self._ask("put", owner, stored.response["id"], text)
        except ModelUnavailable as error:
            kept, reason = False, str(error)
        else:
            reason = "api.response_store.max_bytes is too small for it"
        if not kept:
            logger.warning("response %s is not stored: %s", stored.response["id"], reason)

    async def find(self, owner: str, id: str) -> StoredResponse | None:
        """The response, None if there is none of this owner's. Raises ModelUnavailable if the store can't be reached."""
        text = await self._ask("get", owner, id)
        return StoredResponse(**json.loads(text)) if text is not None else None

    async def delete(self, owner: str, id: str) -> bool:
        """Delete a response. Returns whether there was one of this owner's. Raises ModelUnavailable as `find` does."""
        return bool(await self._ask("delete", owner, id))

    async def _ask(self, method: str, *args: Any) -> Any:
        try:
            answer = getattr(self._store, method).remote(*args)
            return await asyncio.wait_for(answer, _ANSWER_SECONDS)
        except Exception as error:
            logger.warning("the response store does not answer: %r", error)
            raise ModelUnavailable("the store of responses is not available: try again") from error
