"""Between the gRPC messages of orthrus.proto and the engine's types."""

from collections.abc import Sequence
from typing import Any

from ray.serve.grpc_util import RayServegRPCContext

from deployments.failures import describe_failure
from deployments.generation import Choice
from deployments.proto import orthrus_pb2 as pb
from orthrus.request import Chunk, SamplingParams

_REPEATED = {"stop": tuple, "stop_token_ids": tuple, "logit_bias": dict}


def request_params(request: pb.GenerateRequest) -> SamplingParams:
    """Sampling parameters; what is unset has its default. Raises RequestError."""
    values: dict[str, Any] = {}
    for field in pb.SamplingParams.DESCRIPTOR.fields:
        value = getattr(request.sampling, field.name)
        if field.name in _REPEATED:
            values[field.name] = _REPEATED[field.name](value)
        elif request.sampling.HasField(field.name):
            values[field.name] = value
    return SamplingParams(**values).with_seed()


def chunk_message(index: int, text: str, chunks: Sequence[Chunk]) -> pb.GenerateChunk:
    """One message for `text` and the tokens of `chunks`, which belong to one choice."""
    last = chunks[-1]
    message = pb.GenerateChunk(
        index=index,
        text=text,
        token_ids=[token for chunk in chunks for token in chunk.token_ids],
        logprobs=[
            pb.TokenLogprob(
                token_id=item.token_id,
                logprob=item.logprob,
                top=[pb.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in item.top],
            )
            for chunk in chunks
            for item in chunk.logprobs or ()
        ],
        finish_reason=last.finish_reason or "",
    )
    if last.stats is not None:
        for field in pb.Stats.DESCRIPTOR.fields:
            setattr(message.stats, field.name, getattr(last.stats, field.name))
    return message


def whole_message(choices: Sequence[Choice]) -> pb.GenerateResponse:
    """The unary answer."""
    return pb.GenerateResponse(
        choices=[chunk_message(index, choice.text, choice.chunks) for index, choice in enumerate(choices)]
    )


def with_status(error: Exception, context: RayServegRPCContext) -> Exception:
    """Give the call the status that fits the error, and return the error to raise."""
    failure = describe_failure(error)
    context.set_code(failure.grpc_code)
    context.set_details(failure.message)
    return error
