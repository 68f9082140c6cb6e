"""gRPC's messages: requests in and answers out, without a server."""

from dataclasses import replace
from importlib.resources import files
from operator import attrgetter
from pathlib import Path

import pytest
from grpc_tools import protoc

from orthrus.deployments.chat.output import ChatDelta
from orthrus.deployments.generation.text_chunk import TextChunk
from orthrus.deployments.grpc.format import chat_body, chat_chunk, generate_chunk, request_params
from orthrus.deployments.proto import orthrus_pb2 as pb
from orthrus.errors import RequestError
from orthrus.requests.request import SamplingParams
from tests.conftest import ROOT
from tests.deployments.examples import chunk, prompt_scores


def test_generated_stubs_are_up_to_date(tmp_path: Path) -> None:
    """If this fails: `make proto`."""
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    include = str(files("grpc_tools") / "_proto")
    source = "orthrus/deployments/proto/orthrus.proto"
    assert protoc.main(["protoc", f"-I{ROOT}", f"-I{include}", *outputs, str(ROOT / source)]) == 0
    made = sorted((tmp_path / source).parent.iterdir())
    assert [file.name for file in made] == ["orthrus_pb2.py", "orthrus_pb2.pyi", "orthrus_pb2_grpc.py"]
    for file in made:
        assert file.read_text() == (ROOT / source).with_name(file.name).read_text(), file.name


def test_grpc_has_the_same_parameters() -> None:
    names = {field.name for field in pb.SamplingParams.DESCRIPTOR.fields}
    # The grammar follows from the request's response_format and tools.
    assert names == set(SamplingParams.__dataclass_fields__) - {"grammar", "return_drafts"}
    message = pb.SamplingParams(
        temperature=0.0, n=2, stop=["a"], stop_token_ids=[4], logit_bias={5: 1.5}, max_tokens=3, seed=9
    )
    expected = SamplingParams(
        temperature=0.0, n=2, stop=("a",), stop_token_ids=(4,), logit_bias={5: 1.5}, max_tokens=3, seed=9
    )
    assert request_params(message) == expected
    assert request_params(pb.SamplingParams()).seed is not None


def test_grpc_answers() -> None:
    items = [
        TextChunk(0, "a", chunk(0, (1,), False, True)),
        TextChunk(0, "b", chunk(0, (2, 3), True, True), finish_reason="length"),
    ]
    choice = generate_chunk(0, items)
    assert (choice.text, list(choice.token_ids), choice.finish_reason) == ("ab", [1, 2, 3], "length")
    assert [item.token_id for item in choice.logprobs] == [1, 2, 3]
    assert (choice.stats.tokens_per_cycle, choice.stats.seed) == (2.0, 7)
    first = replace(items[0].chunk, prompt_logprobs=prompt_scores())
    for message in (
        generate_chunk(0, [replace(items[0], chunk=first), items[1]]),
        chat_chunk(0, [TextChunk(0, "", first, ChatDelta())]),
    ):
        assert [(s.token_id, s.logprob, len(s.top)) for s in message.prompt_logprobs] == [
            (66, -0.5, 2),
            (67, -2.0, 2),
        ]
        assert [(top.token_id, top.logprob) for top in message.prompt_logprobs[1].top] == [
            (1, -0.25),
            (67, -2.0),
        ]


@pytest.mark.parametrize("schema", ['{"not": {}}', '{"maximum": 1e400}', "false"])
def test_a_schema_that_cannot_be_used_is_named_as_the_client_does(schema: str) -> None:
    message = pb.ChatMessage(role="user", content="hi")
    body = chat_body(pb.ChatRequest(model="m", messages=[message], json_schema=schema))
    with pytest.raises(RequestError, match="json_schema") as caught:
        attrgetter("constraint.rule")(body)
    assert caught.value.param == "json_schema"
