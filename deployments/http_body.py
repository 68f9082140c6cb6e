"""Reading the body of an HTTP request, from a client that may send anything, slowly, and without end."""

import asyncio
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from deployments.api_config import ApiConfig
from deployments.failures import BodyTooLarge, BodyTooSlow, UnsupportedBody
from deployments.protocol import describe

Body = TypeVar("Body", bound=BaseModel)
_READ_TO_THE_END = 16
"""Times the limit. So far a body is read and dropped: a client that is still sending may lose the answer that it is too large."""


async def read_body(request: Request, body: type[Body], config: ApiConfig) -> Body:
    """The checked body. Raises RequestError, UnsupportedBody, BodyTooLarge and BodyTooSlow."""
    # Browsers send other types, which need no preflight, for any page that asks them to.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedBody("the body must be JSON: send Content-Type: application/json")
    if (encoding := request.headers.get("content-encoding", "identity").lower()) != "identity":
        raise UnsupportedBody(f"Content-Encoding {encoding} is not supported: send the body as it is")
    raw, size = bytearray(), 0
    most = config.max_body_bytes
    try:
        async with asyncio.timeout(config.body_timeout_s):
            async for part in request.stream():
                size += len(part)
                if size <= most:
                    raw += part
                elif size > most * _READ_TO_THE_END:
                    break
    except TimeoutError:
        raise BodyTooSlow(f"the request body did not come within {config.body_timeout_s:g} s") from None
    if size > most:
        raise BodyTooLarge(f"the request body is over {most} bytes: send a shorter prompt")
    try:
        return body.model_validate_json(bytes(raw))
    except ValidationError as error:
        raise describe(error) from None
