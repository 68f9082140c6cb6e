"""The Orthrus service over gRPC: see orthrus.proto.

Serve ends a call's coroutine when its deadline has passed or its client has gone.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

from ray.serve.grpc_util import RayServegRPCContext

from deployments.calls import Call
from deployments.failures import BodyTooLarge
from deployments.generation import TextChunk, collect, generate, merge
from deployments.grpc_format import (
    chat_body,
    chat_chunk,
    completion_body,
    generate_chunk,
    request_params,
    with_status,
)
from deployments.ingress_core import IngressCore
from deployments.proto import orthrus_pb2 as pb


class GrpcIngress(IngressCore):
    """An ingress with the methods of the service, which Serve finds by their names."""

    async def Generate(
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> pb.GenerateResponse:
        async with self._rpc("Generate", grpc_context) as call:
            stream, n = await self._generate_call(call, request)
            choices = await collect(merge([stream], n), n)
            return pb.GenerateResponse(
                choices=[generate_chunk(index, choice.chunks) for index, choice in enumerate(choices)]
            )

    async def GenerateStream(
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.GenerateChunk]:
        async with self._rpc("GenerateStream", grpc_context) as call:
            stream, _ = await self._generate_call(call, request)
            async with aclosing(stream) as items:
                async for item in items:
                    yield generate_chunk(item.index, [item])

    async def Chat(self, request: pb.ChatRequest, grpc_context: RayServegRPCContext) -> pb.ChatResponse:
        async with self._rpc("Chat", grpc_context) as call:
            stream, n = await self._chat_call(call, request)
            choices = await collect(merge([stream], n), n)
            return pb.ChatResponse(
                choices=[chat_chunk(index, choice.chunks) for index, choice in enumerate(choices)]
            )

    async def ChatStream(
        self, request: pb.ChatRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.ChatChunk]:
        async with self._rpc("ChatStream", grpc_context) as call:
            stream, _ = await self._chat_call(call, request)
            async with aclosing(stream) as items:
                async for item in items:
                    yield chat_chunk(item.index, [item])

    @asynccontextmanager
    async def _rpc(self, method: str, context: RayServegRPCContext) -> AsyncGenerator[Call]:
        """An admitted call. What goes wrong under it gets the status that fits."""
        call = Call(method)
        try:
            await self._gate.admit(call, dict(context.invocation_metadata()))
            context.set_trailing_metadata(list(call.headers.items()))
            yield call
            call.outcome = "ok"
        except Exception as error:
            call.outcome = type(error).__name__
            raise with_status(error, context, call.sent_as) from None
        finally:
            call.end()

    async def _generate_call(
        self, call: Call, request: pb.GenerateRequest
    ) -> tuple[AsyncGenerator[TextChunk], int]:
        """The chunks of a call and its number of choices. Raises RequestError, ModelNotFound, BodyTooLarge."""
        self._check_message(request)
        params, body = request_params(request.sampling), completion_body(request)
        call.read(body)
        if body.constraint is not None:
            params = replace(params, grammar=body.constraint.lark)
        [given] = body.prompts()
        prompt = await self._prompt(body, given, params.max_tokens)
        return generate(self._replica, self._receiver, self._tokenizer, call, prompt, params), params.n

    async def _chat_call(self, call: Call, request: pb.ChatRequest) -> tuple[AsyncGenerator[TextChunk], int]:
        """As `_generate_call`."""
        self._check_message(request)
        params = request_params(request.sampling)
        return (await self._chats.start(call, chat_body(request), params)).chunks, params.n

    def _check_message(self, request: pb.GenerateRequest | pb.ChatRequest) -> None:
        if request.ByteSize() > self._config.max_body_bytes:
            raise BodyTooLarge(
                f"the request is over {self._config.max_body_bytes} bytes: send a shorter prompt"
            )
        self._check_model(request.model)
