"""gRPC: calls that cannot be served, bytes that are no message, and metadata."""

from typing import Any

import grpc
import pytest

from orthrus.deployments.proto import orthrus_pb2 as pb
from orthrus.deployments.proto.orthrus_pb2_grpc import OrthrusStub
from tests.deployments.serving.hostile.bodies import nested
from tests.serving import MODEL


def generate(**fields: Any) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(**{"max_tokens": 2, **fields.pop("sampling", {})})
    return pb.GenerateRequest(**{"model": MODEL, "prompt": "x", **fields}, sampling=sampling)


MESSAGES = [pb.ChatMessage(role="user", content="x")]
REFUSED_CALLS: dict[str, tuple[Any, grpc.StatusCode]] = {
    "nan": (generate(sampling={"temperature": float("nan")}), grpc.StatusCode.INVALID_ARGUMENT),
    "infinity": (generate(sampling={"top_p": float("inf")}), grpc.StatusCode.INVALID_ARGUMENT),
    "top_k": (generate(sampling={"top_k": -(2**63)}), grpc.StatusCode.INVALID_ARGUMENT),
    "n": (generate(sampling={"n": 2**62}), grpc.StatusCode.INVALID_ARGUMENT),
    "bias": (generate(sampling={"logit_bias": {-1: 1.0}}), grpc.StatusCode.INVALID_ARGUMENT),
    "stop": (generate(sampling={"stop": [""]}), grpc.StatusCode.INVALID_ARGUMENT),
    "token id": (
        pb.GenerateRequest(model=MODEL, prompt_token_ids=pb.TokenIds(ids=[2**62])), grpc.StatusCode.INVALID_ARGUMENT
    ),
    "no prompt": (pb.GenerateRequest(model=MODEL), grpc.StatusCode.INVALID_ARGUMENT),
    "nothing": (pb.GenerateRequest(), grpc.StatusCode.NOT_FOUND),
    "model of 100,000 letters": (generate(model="😀" * 100_000), grpc.StatusCode.NOT_FOUND),
    "model with a null": (generate(model="a\x00\r\nb"), grpc.StatusCode.NOT_FOUND),
    "5 MiB": (generate(prompt="x" * (5 << 20)), grpc.StatusCode.INVALID_ARGUMENT),
    "10 MiB": (generate(prompt="x" * (10 << 20)), grpc.StatusCode.RESOURCE_EXHAUSTED),
    "deep JSON": (
        pb.ChatRequest(model=MODEL, messages=MESSAGES, json_schema=nested(10**5)), grpc.StatusCode.INVALID_ARGUMENT
    ),
    "JSON that is none": (
        pb.ChatRequest(model=MODEL, messages=MESSAGES, json_schema="{'a'}"), grpc.StatusCode.INVALID_ARGUMENT
    ),
    "no object": (
        pb.ChatRequest(model=MODEL, messages=MESSAGES, json_schema="5"), grpc.StatusCode.INVALID_ARGUMENT
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_CALLS, ids=str)
def test_calls_that_cannot_be_served_have_the_right_status(stub: OrthrusStub, case: str) -> None:
    request, code = REFUSED_CALLS[case]
    chatting = isinstance(request, pb.ChatRequest)
    unary, stream = (stub.Chat, stub.ChatStream) if chatting else (stub.Generate, stub.GenerateStream)
    for call in (unary, lambda r: list(stream(r))):
        with pytest.raises(grpc.RpcError) as caught:
            call(request)
        assert caught.value.code() is code, caught.value.details()
        assert caught.value.details()


def test_bytes_that_are_no_message(ports: tuple[int, int]) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{ports[1]}") as channel:
        for method in ("Generate", "Chat"):
            call = channel.unary_unary(f"/orthrus.Orthrus/{method}", lambda raw: raw, lambda raw: raw)
            for sent in (b"\xff" * 10, b"\x0a\x02\xff\xfe", b"\x0a\xff\xff\xff\xff\x0f"):
                with pytest.raises(grpc.RpcError) as caught:
                    call(sent, timeout=30)
                # gRPC itself says so, before anything of ours sees them.
                assert caught.value.code() is grpc.StatusCode.UNKNOWN
                assert "Error parsing message" in (caught.value.details() or "")
        for method in ("/orthrus.Orthrus/Nothing", "/other.Service/Generate"):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(method, lambda raw: raw, lambda raw: raw)(b"", timeout=30)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_small_message_that_unpacks_to_a_large_one(stub: OrthrusStub) -> None:
    """64 KB on the wire, 64 MB in memory if it were unpacked."""
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(generate(prompt="x" * (64 << 20)), compression=grpc.Compression.Gzip)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    answer = stub.Generate(generate(prompt="x" * 1000), compression=grpc.Compression.Gzip)
    assert answer.choices[0].stats.completion_tokens == 2


@pytest.mark.parametrize(
    ("metadata", "codes"),
    [
        ([("request_id", "a b")], (grpc.StatusCode.INVALID_ARGUMENT,)),
        ([("request_id", "x" * 5000)], (grpc.StatusCode.INVALID_ARGUMENT,)),
        # Refused by gRPC, or by HAProxy, which ends the connection.
        ([("request_id", "x" * 50_000)], (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)),
    ],
)
def test_metadata_that_is_refused(
    stub: OrthrusStub, metadata: Any, codes: tuple[grpc.StatusCode, ...]
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(generate(), metadata=metadata)
    assert caught.value.code() in codes


@pytest.mark.parametrize(
    "metadata",
    [
        [("request_id-bin", b"\x00\xff"), ("request_id", "")],
        [("authorization", "Basic x"), ("multiplexed_model_id", "x"), ("session_id", "y")],
        [("traceparent", "not-one"), ("tracestate", "=,=")],
    ],
)
def test_metadata_that_is_ignored(stub: OrthrusStub, metadata: Any) -> None:
    assert stub.Generate(generate(), metadata=metadata).choices
