"""Reading the body of an HTTP request, from a client that may send anything, slowly, and without end."""

import asyncio
import math
from collections.abc import Sequence
from typing import Any, TypeVar
from urllib.parse import quote

from fastapi import Request
from jiter import from_json
from pydantic import ValidationError

from orthrus.deployments.access.call import Call
from orthrus.deployments.bodies.faults import describe, unknown_fields
from orthrus.deployments.bodies.strict_model import ModelBody
from orthrus.deployments.bodies.unsupported_fields import UNSUPPORTED
from orthrus.deployments.failures.errors import BodyTooLarge, BodyTooSlow, UnsupportedBody
from orthrus.deployments.generation.handler import Handler
from orthrus.errors import RequestError

Body = TypeVar("Body", bound=ModelBody)
_IGNORED = "x-orthrus-ignored-fields"
_MOST_IGNORED, _LONGEST_IGNORED = 20, 64
_DIGITS_AS_0 = bytes.maketrans(b"123456789E", b"000000000e")
_READ_TO_THE_END = 16
"""Times the limit. A body over the limit is read to here and dropped: a client that is still sending may miss the error."""


async def read_body(request: Request, body: type[Body], handler: Handler) -> Body:
    """Read a request's body and check it. A model that it names must be the handler's.

    Where unknown fields are ignored, a header of the answer names them.
    Raises RequestError, ModelNotFound, UnsupportedBody, BodyTooLarge and BodyTooSlow.
    """
    # Other types are refused because any web page can make a browser send them without a CORS preflight request.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedBody("the body must be JSON: send Content-Type: application/json")
    if (encoding := request.headers.get("content-encoding", "identity").lower()) != "identity":
        raise UnsupportedBody(f"Content-Encoding {encoding} is not supported: send the body as it is")
    config = handler.config
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
        if size <= most:
            raise BodyTooSlow(f"the request body did not come within {config.body_timeout_s:g} s") from None
    if size > most:
        raise BodyTooLarge(f"the request body is over {most} bytes: send a shorter prompt")
    checked, ignored = parse_body(bytes(raw), body, ignore_unknown=config.unknown_fields == "ignore")
    name_ignored(request.state.call, ignored)
    handler.model.check_name(checked.model)
    return checked


def name_ignored(call: Call, paths: Sequence[str]) -> None:
    """Add fields that were ignored to the header of the answer that names them."""
    if paths:
        before = [call.headers[_IGNORED]] if _IGNORED in call.headers else []
        call.headers = {
            **call.headers,
            _IGNORED: ", ".join([*before, *map(_header_text, paths[:_MOST_IGNORED])]),
        }


def parse_body(raw: bytes, body: type[Body], *, ignore_unknown: bool = False) -> tuple[Body, list[str]]:
    """The checked body, and the paths of those of its fields that were ignored as unknown. Raises RequestError."""
    data = _json(raw)
    try:
        return body.model_validate(data), []
    except ValidationError as error:
        unknown = unknown_fields(error) if ignore_unknown else None
        if unknown is None or any(path in UNSUPPORTED for path in unknown):
            raise describe(error, body) from None
    try:
        return body.model_validate(data, extra="ignore"), unknown
    except ValidationError as error:
        raise describe(error, body) from None


def _json(raw: bytes) -> Any:
    """The value of JSON text. If a key comes twice, the last value counts. Raises RequestError."""
    try:
        # Not pydantic's parser: it accepts NaN, which is not JSON and would get into schemas and templates.
        data = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        fault = RequestError(f"the body is not JSON: {error}")
    else:
        if _may_overflow(raw):
            _check_finite(data)
        return data
    try:
        data = from_json(raw)
    except ValueError:
        raise fault from None
    _check_finite(data)
    raise fault


def _may_overflow(raw: bytes) -> bool:
    """Whether JSON text may have a number of 200 digits or a three-digit exponent: others are finite as a double."""
    # A regular expression would take a second for 4 MiB of digits.
    same = raw.translate(_DIGITS_AS_0, b"+")
    return b"0e000" in same or b"0" * 200 in same


def _check_finite(data: Any) -> None:
    """Raise RequestError for a number that is infinite or none. It names the field."""
    for name, value in data.items() if isinstance(data, dict) else ():
        if not _is_finite(value):
            raise RequestError(f"{name}: NaN and Infinity are no JSON numbers: send a finite one", name)


def _is_finite(value: Any) -> bool:
    """Whether all numbers in a JSON value are finite. The parser limits the nesting, so recursion is safe."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict | list):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return True


def _header_text(path: str) -> str:
    """A field's path, shortened and quoted for a header."""
    return quote(path[:_LONGEST_IGNORED].encode(errors="replace"), safe="[].-_")
