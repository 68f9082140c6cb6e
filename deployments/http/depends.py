"""Dependencies of the endpoints, which their parameters name by type: the handler, and an admitted call."""

from typing import Annotated, Any

from fastapi import Depends, Request

from orthrus.deployments.access.call import Call
from orthrus.deployments.generation.handler import Handler


async def _handler(request: Request) -> Handler:
    handler: Handler = request.app.state.handler
    return handler


HandlerDep = Annotated[Handler, Depends(_handler)]
"""The handler of this application."""


def admitted(endpoint: str) -> Any:
    """A dependency that admits a request and gives its `Call`. `CallMiddleware` ends the call.

    endpoint: the call's name in logs and metrics.
    """

    async def admit(request: Request, handler: HandlerDep) -> Call:
        request.state.call = call = Call(endpoint)
        await handler.gate.admit(call, request.headers)
        return call

    return Depends(admit)


async def _identify(request: Request, handler: HandlerDep) -> None:
    handler.gate.identify(request.headers)


Identified = Depends(_identify)
"""A dependency that checks the caller's key, where keys are needed. For endpoints that cost nothing, and so are no calls."""
