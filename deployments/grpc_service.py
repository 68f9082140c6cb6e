"""Registers the Orthrus service with Serve's gRPC servers: Serve configs name `add_to_server` in `grpc_servicer_functions`.

Serve's gRPC proxy passes a cancellation on only if it comes while the proxy waits for the next message. A cancellation that comes
while a message is being sent is lost, and the replica would generate the rest for nobody. So each stream is read here by a task
that only waits for messages, and the end of the call cancels that task.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from ray.serve._private.proxy_request_response import gRPCStreamingType

from orthrus.deployments.failures.log_filter import quiet_client_errors
from orthrus.deployments.proto.orthrus_pb2_grpc import add_OrthrusServicer_to_server

StreamHandler = Callable[[Any, Any], AsyncIterator[Any]]


def add_to_server(servicer: Any, server: Any) -> None:
    """Register the service with `server`, one of Serve's gRPC servers. Serve calls handlers of its own instead of `servicer`."""
    quiet_client_errors()
    make_handler = server.service_handler_factory

    def make_safe_handler(*, service_method: str, streaming_type: gRPCStreamingType) -> Any:
        handler = make_handler(service_method=service_method, streaming_type=streaming_type)
        return _cancellable(handler) if streaming_type is gRPCStreamingType.UNARY_STREAM else handler

    server.service_handler_factory = make_safe_handler
    try:
        add_OrthrusServicer_to_server(servicer, server)
    finally:
        server.service_handler_factory = make_handler


class _Context:
    """A call's context for a handler that may outlive the call. The peer is read at once: after the call, reading it crashes."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._peer = context.peer()

    def peer(self) -> str:
        return self._peer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def _cancellable(handler: StreamHandler) -> StreamHandler:
    """A handler that runs `handler` in a task of its own. The end of the call cancels the task, whatever it is doing."""

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        messages: asyncio.Queue[Any] = asyncio.Queue()
        end = object()
        lasting_context = _Context(context)

        async def pump() -> None:
            try:
                async for message in handler(request, lasting_context):
                    messages.put_nowait(message)
            finally:
                messages.put_nowait(end)

        task = asyncio.create_task(pump())
        context.add_done_callback(lambda _: task.cancel())
        while (message := await messages.get()) is not end:
            yield message
        await task

    return stream
