"""The end of an HTTP call."""

from ray.exceptions import TaskCancelledError
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class CallMiddleware:
    """Ends the `Call` that an endpoint has put into `request.state.call`, and adds the call's headers to the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.setdefault("state", {})

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start" and "call" in state:
                MutableHeaders(scope=message).update(state["call"].headers)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except (ClientDisconnect, TaskCancelledError):
            pass  # The client has gone, so nobody reads an answer.
        except Exception as error:
            if "call" in state:
                state["call"].outcome = type(error).__name__
            raise
        finally:
            if "call" in state:
                state["call"].end()
