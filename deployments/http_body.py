"""Reading the body of an HTTP request, from a client that may send anything, slowly, and without end."""

import asyncio
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from deployments.api_config import ApiConfig
from deployments.failures import BodyTooLarge, BodyTooSlow, UnsupportedBody
from deployments.protocol import describe

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, body: type[Body], config: ApiConfig) -> Body:
    """The checked body. Raises RequestError, and UnsupportedBody, BodyTooLarge and BodyTooSlow before reading all of it."""
    # Browsers send other types, which need no preflight, for any page that asks them to.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedBody("the body must be JSON: send Content-Type: application/json")
    if (encoding := request.headers.get("content-encoding", "identity").lower()) != "identity":
        raise UnsupportedBody(f"Content-Encoding {encoding} is not supported: send the body as it is")
    too_large = BodyTooLarge(f"the request body is over {config.max_body_bytes} bytes: send a shorter prompt")
    if int(request.headers.get("content-length", 0)) > config.max_body_bytes:
        raise too_large
    raw = bytearray()
    try:
        async with asyncio.timeout(config.body_timeout_s):
            async for part in request.stream():
                raw += part
                if len(raw) > config.max_body_bytes:
                    raise too_large
    except TimeoutError:
        raise BodyTooSlow(f"the request body did not come within {config.body_timeout_s:g} s") from None
    try:
        return body.model_validate_json(bytes(raw))
    except ValidationError as error:
        raise describe(error) from None
