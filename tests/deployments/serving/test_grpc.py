"""The running Serve application over gRPC: the shipped stubs, reflection, deadlines and cancellation."""

from typing import Any

import grpc
import openai
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from orthrus.deployments.proto import orthrus_pb2 as pb
from orthrus.deployments.proto.orthrus_pb2_grpc import OrthrusStub
from orthrus.engine import Engine
from orthrus.requests.request import SamplingParams
from tests.serving import MODEL, PROMPT, plain, wait_until_busy, wait_until_free

HI = [pb.ChatMessage(role="user", content="# sort a list of words by length")]
LONG = pb.SamplingParams(max_tokens=1500, ignore_eos=True)


def test_grpc_gives_the_same_text(stub: OrthrusStub, ar: Engine) -> None:
    expected = plain(ar, PROMPT, SamplingParams(temperature=0.0, max_tokens=48))
    request = pb.GenerateRequest(
        model=MODEL, prompt=PROMPT, sampling=pb.SamplingParams(temperature=0, max_tokens=48, logprobs=1)
    )
    [choice] = stub.Generate(request).choices
    assert choice.text == expected
    assert choice.stats.tokens_per_cycle > 1.5 and len(choice.logprobs) == choice.stats.completion_tokens
    chunks = list(stub.GenerateStream(request))
    assert "".join(chunk.text for chunk in chunks) == expected
    assert [c.finish_reason for c in chunks if c.finish_reason] == ["length"]


def test_grpc_chat_is_the_http_chat(stub: OrthrusStub, client: openai.OpenAI) -> None:
    expected = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": HI[0].content}], max_tokens=40, n=2, seed=5
    )
    sampling = pb.SamplingParams(max_tokens=40, n=2, seed=5, logprobs=1)
    request = pb.ChatRequest(model=MODEL, messages=HI, sampling=sampling)
    choices = stub.Chat(request).choices
    assert [choice.content for choice in choices] == [c.message.content for c in expected.choices]
    assert all(len(choice.logprobs) == choice.stats.completion_tokens for choice in choices)
    texts = ["", ""]
    for chunk in stub.ChatStream(request):
        texts[chunk.index] += chunk.content
    assert texts == [choice.content for choice in choices]


def test_reflection_is_enough_to_call(ports: tuple[int, int]) -> None:
    """What grpcurl does: no stubs, only what the server says of itself."""
    with grpc.insecure_channel(f"127.0.0.1:{ports[1]}") as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert "orthrus.Orthrus" in database.get_services()
        pool = descriptor_pool.DescriptorPool(database)
        method = pool.FindServiceByName("orthrus.Orthrus").FindMethodByName("Generate")
        question = message_factory.GetMessageClass(method.input_type)
        answer = message_factory.GetMessageClass(method.output_type)
        call = channel.unary_unary("/orthrus.Orthrus/Generate", question.SerializeToString, answer.FromString)
        said = call(question(model=MODEL, prompt=PROMPT, sampling={"max_tokens": 3, "ignore_eos": True}))
        assert said.choices[0].stats.completion_tokens == 3


@pytest.mark.parametrize(
    ("request_", "code", "said"),
    [
        (pb.GenerateRequest(model="gpt-9", prompt="x"), grpc.StatusCode.NOT_FOUND, "gpt-9"),
        (pb.GenerateRequest(model=MODEL), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        (
            pb.GenerateRequest(model=MODEL, prompt="x", sampling=pb.SamplingParams(temperature=-1)),
            grpc.StatusCode.INVALID_ARGUMENT,
            "temperature",
        ),
        (
            pb.GenerateRequest(model=MODEL, prompt="x " * 9000),
            grpc.StatusCode.INVALID_ARGUMENT,
            "context limit",
        ),
        (pb.ChatRequest(model="gpt-9", messages=HI), grpc.StatusCode.NOT_FOUND, "gpt-9"),
        (pb.ChatRequest(model=MODEL), grpc.StatusCode.INVALID_ARGUMENT, "messages"),
        (
            pb.ChatRequest(model=MODEL, messages=HI, tools=[pb.Tool(name="f", parameters="{")]),
            grpc.StatusCode.INVALID_ARGUMENT,
            "tools",
        ),
        (
            pb.ChatRequest(model=MODEL, messages=[pb.ChatMessage(role="user", content="x " * 9000)]),
            grpc.StatusCode.INVALID_ARGUMENT,
            "context limit",
        ),
    ],
)
def test_grpc_errors_have_a_status_and_say_why(
    stub: OrthrusStub, request_: Any, code: grpc.StatusCode, said: str
) -> None:
    chat = isinstance(request_, pb.ChatRequest)
    unary, stream = (stub.Chat, stub.ChatStream) if chat else (stub.Generate, stub.GenerateStream)
    for call in (unary, lambda r: list(stream(r))):
        with pytest.raises(grpc.RpcError) as caught:
            call(request_)
        assert caught.value.code() is code
        assert said in (caught.value.details() or "")


@pytest.mark.parametrize("chat", [False, True])
def test_calls_that_end_early_free_their_pages(stub: OrthrusStub, chat: bool) -> None:
    request: Any
    if chat:
        request = pb.ChatRequest(model=MODEL, messages=HI, sampling=LONG)
    else:
        request = pb.GenerateRequest(model=MODEL, prompt="a", sampling=LONG)
    unary, streaming = (stub.Chat, stub.ChatStream) if chat else (stub.Generate, stub.GenerateStream)
    call = unary.future(request)
    wait_until_busy()
    call.cancel()
    wait_until_free()
    stream = streaming(request)
    next(iter(stream))
    stream.cancel()
    wait_until_free()
    with pytest.raises(grpc.RpcError) as caught:
        unary(request, timeout=0.5)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until_free()
    with pytest.raises(grpc.RpcError) as caught:
        for _ in streaming(request, timeout=0.5):
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until_free()
