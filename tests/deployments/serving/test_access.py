"""Keys, limits, logs and traces on a running Serve instance, over HTTP and gRPC, with two ingress replicas."""

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import anthropic
import grpc
import openai
import pytest
import yaml
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from ray import serve

from orthrus.deployments.access.keys import new_key
from orthrus.deployments.app import build
from orthrus.deployments.proto import orthrus_pb2 as pb
from orthrus.deployments.proto.orthrus_pb2_grpc import OrthrusStub
from tests.collector import Collector
from tests.conftest import ROOT
from tests.local_cluster import wait_for
from tests.serving import MODEL

APP = "access"
SECRET_PROMPT = "def nobody_may_read_this_in_the_log():"
ONE_TOKEN: dict[str, Any] = {"model": MODEL, "prompt": "x", "max_tokens": 1}


@dataclass
class Access:
    """A running application with keys: its address, keys by name, the keys file, and logs."""

    url: str
    keys: dict[str, str]
    file: Path
    logs: Path

    def client(self, name: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.keys[name], max_retries=0)

    def post(
        self, name: str, path: str = "/v1/completions", **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON of a call for one token."""
        headers = {"Content-Type": "application/json", **headers}
        if name:
            headers["Authorization"] = f"Bearer {self.keys[name]}"
        data = json.dumps(ONE_TOKEN).encode() if path.startswith("/v1/comp") else None
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, dict(answer.headers), json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), json.load(error)

    def records(self, **wanted: Any) -> list[dict[str, Any]]:
        """Log lines of the ingress replicas that have these fields."""
        lines = [line for file in self.logs.glob("*") for line in file.read_text().splitlines()]
        records = [json.loads(line) for line in lines]
        return [r for r in records if all(r.get(name) == value for name, value in wanted.items())]


@pytest.fixture(scope="module")
def access(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Access]:
    folder = tmp_path_factory.mktemp("access")
    made = {
        "free": new_key("free"),
        "other": new_key("other"),
        "revoked": new_key("revoked"),
        "expired": new_key("expired", datetime(2020, 1, 1, tzinfo=UTC)),
        "few-requests": new_key("few-requests", requests_per_minute=4),
        "few-tokens": new_key("few-tokens", tokens_per_minute=20),
    }
    file = folder / "keys.yaml"
    file.write_text("".join(entry for _, entry in made.values()))
    args = yaml.safe_load((ROOT / "configs" / "tiny-cpu.yaml").read_text())["applications"][0]["args"]
    args["engine"] |= {"max_num_seqs": 2, "kv_cache_tokens": 8192}
    args["api"] = {"keys_file": str(file), "response_store": {}}
    args["replica"] = {
        "max_ongoing_requests": 2,
        "max_queued_requests": 1,
        "ray_actor_options": {"num_cpus": 0.25},
    }
    args["ingress"] = {
        "num_replicas": 2,
        "ray_actor_options": {"num_cpus": 0.1},
        "logging_config": {"encoding": "JSON", "logs_dir": str(folder / "logs")},
    }
    serve.run(build(args), name=APP, route_prefix=f"/{APP}")
    try:
        yield Access(f"{url}/{APP}", {name: key for name, (key, _) in made.items()}, file, folder / "logs")
    finally:
        serve.delete(APP, _blocking=False)


def metadata(access: Access, name: str, *more: tuple[str, str]) -> list[tuple[str, str]]:
    key = (("authorization", f"Bearer {access.keys[name]}"),) if name else ()
    return [("application", APP), *key, *more]


# --- keys


def test_a_call_needs_a_key_that_is_known_and_has_not_expired(access: Access, stub: OrthrusStub) -> None:
    access.keys["wrong"] = access.keys["free"][:-1] + "?"
    assert access.client("free").completions.create(**ONE_TOKEN).usage is not None
    assert [m.id for m in access.client("free").models.list()] == [MODEL]
    for name, said in (("", "no API key"), ("wrong", "not known"), ("expired", "expired, on 2020-01-01")):
        for path in ("/v1/completions", "/v1/models", f"/v1/models/{MODEL}"):
            status, headers, answer = access.post(name, path)
            assert (status, headers["www-authenticate"]) == (401, "Bearer")
            assert answer["error"]["code"] == "invalid_api_key" and said in answer["error"]["message"]
        request = pb.GenerateRequest(model=MODEL, prompt="x")
        for call in (stub.Generate, lambda r, **k: list(stub.GenerateStream(r, **k))):
            with pytest.raises(grpc.RpcError) as caught:
                call(request, metadata=metadata(access, name))
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert said in (caught.value.details() or "")
    with pytest.raises(openai.AuthenticationError):
        access.client("expired").chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x"}]
        )
    assert access.post("", "/health")[0] == access.post("", "/ready")[0] == 200


def test_a_key_is_asked_for_before_the_body(access: Access) -> None:
    """A client without a key can't hold a slot by sending slowly, nor make the server read much."""
    request = urllib.request.Request(
        f"{access.url}/v1/completions", b"", {"Content-Length": "4000000", "Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=30)
    assert caught.value.code == 401


def test_a_revoked_key_is_refused_soon(access: Access) -> None:
    assert access.post("revoked")[0] == 200
    kept = [entry for entry in yaml.safe_load(access.file.read_text()) if entry["name"] != "revoked"]
    access.file.write_text(yaml.safe_dump(kept))
    # Both ingress replicas have read it once none of many calls gets through.
    wait_for(lambda: all(access.post("revoked")[0] == 401 for _ in range(10)))
    assert access.post("free")[0] == 200


# --- limits


def test_the_request_limit_holds_over_all_ingress_replicas(access: Access, stub: OrthrusStub) -> None:
    """4 requests at once, and then one every 15 s."""
    begin = time.monotonic()
    answers = [access.post("few-requests") for _ in range(12)]
    statuses = [status for status, _, _ in answers]
    admitted = statuses.count(200)
    assert 4 <= admitted <= 4 + (time.monotonic() - begin) / 15
    assert statuses[:4] == [200] * 4 and statuses.count(429) == 12 - admitted
    assert [headers["x-ratelimit-remaining-requests"] for _, headers, _ in answers[:4]] == list("3210")
    _, headers, answer = answers[statuses.index(429)]
    assert 0 < int(headers["retry-after"]) <= 15 and headers["x-ratelimit-limit-requests"] == "4"
    assert answer["error"]["code"] == "rate_limit_exceeded" and "try again in" in answer["error"]["message"]
    with pytest.raises(openai.RateLimitError):
        access.client("few-requests").completions.create(**ONE_TOKEN)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(pb.GenerateRequest(model=MODEL, prompt="x"), metadata=metadata(access, "few-requests"))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "4 requests a minute: try again in" in (caught.value.details() or "")
    assert access.post("free")[0] == 200, "other keys are not concerned"
    replicas = wait_for(lambda: {r["replica"] for r in access.records(key="few-requests")})
    assert len(replicas) == 2, "the calls went through both"


def test_the_token_limit_cuts_no_answer_and_delays_the_next(access: Access) -> None:
    answer = access.client("few-tokens").completions.create(
        model=MODEL, prompt="x y z", max_tokens=60, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None and answer.usage.completion_tokens == 60

    def refusal() -> dict[str, str] | None:
        """The headers of one that knows of the whole answer."""
        status, headers, _ = access.post("few-tokens")
        return headers if status == 429 and int(headers["retry-after"]) > 90 else None

    # 20 a minute, 60 and the prompt used: known everywhere a second after the last of them.
    headers = wait_for(refusal)
    assert headers["x-ratelimit-remaining-tokens"] == "0" and int(headers["retry-after"]) <= 200


def test_too_long_a_queue_is_refused_with_a_time_to_come_back(access: Access) -> None:
    """The replica takes 2, and each ingress lets 1 wait."""
    outcomes: list[Any] = []

    def run() -> None:
        try:
            outcomes.append(
                access.client("free").completions.create(
                    model=MODEL, prompt="x", max_tokens=120, extra_body={"ignore_eos": True}
                )
            )
        except openai.APIStatusError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=run) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [outcome for outcome in outcomes if isinstance(outcome, openai.APIStatusError)]
    assert refused and len(refused) <= 8
    for error in refused:
        assert isinstance(error, openai.RateLimitError), error
        assert error.response.headers["retry-after"] == "1" and "waiting" in error.message


# --- logs and traces


def test_a_request_id_comes_back_and_names_the_calls_log_lines(access: Access, stub: OrthrusStub) -> None:
    status, headers, _ = access.post("free", **{"X-Request-Id": "my-id.1"})
    assert (status, headers["x-request-id"]) == (200, "my-id.1")
    [record] = wait_for(lambda: access.records(request_id="my-id.1", endpoint="completions"))
    assert (record["outcome"], record["key"], record["finish_reasons"]) == ("ok", "free", ["length"])
    assert (record["prompt_tokens"], record["completion_tokens"]) == (1, 1)
    assert 0 < record["first_token_s"] <= record["duration_s"]
    request = pb.GenerateRequest(model=MODEL, prompt="x", sampling=pb.SamplingParams(max_tokens=2))
    _, call = stub.Generate.with_call(request, metadata=metadata(access, "free", ("request_id", "my-id.2")))
    assert ("request_id", "my-id.2") in [tuple(item) for item in call.trailing_metadata()]
    [record] = wait_for(lambda: access.records(request_id="my-id.2", endpoint="Generate"))
    assert (record["outcome"], record["key"], record["completion_tokens"]) == ("ok", "free", 2)
    status, headers, _ = access.post("free")
    assert status == 200 and len(headers["x-request-id"]) == 36


@pytest.mark.parametrize("unsafe", ["a b", "x" * 129, "é"])
def test_a_request_id_that_could_forge_log_lines_is_refused(
    access: Access, stub: OrthrusStub, unsafe: str
) -> None:
    status, _, answer = access.post("free", **{"X-Request-Id": unsafe.encode().decode("latin-1")})
    assert (status, answer["error"]["param"]) == (400, "x-request-id")
    if unsafe.isascii():
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(pb.GenerateRequest(), metadata=metadata(access, "free", ("request_id", unsafe)))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_the_log_has_no_prompts_and_no_stacks_of_bad_requests(access: Access, stub: OrthrusStub) -> None:
    client = access.client("free")
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 2}
    messages: Any = [{"role": "user", "content": SECRET_PROMPT}]
    client.completions.create(**asked, prompt=SECRET_PROMPT)
    client.chat.completions.create(**asked, messages=messages)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(**asked, prompt=SECRET_PROMPT * 1000)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**asked, messages=messages, temperature=-1)
    for request in (
        pb.GenerateRequest(model=MODEL, prompt=SECRET_PROMPT * 1000),
        pb.GenerateRequest(model=SECRET_PROMPT, prompt=SECRET_PROMPT),
    ):
        with pytest.raises(grpc.RpcError):
            stub.Generate(request, metadata=metadata(access, "free"))
    wait_for(lambda: len(access.records(outcome="RequestError", endpoint="completions")) >= 1)
    wait_for(lambda: len(access.records(outcome="ModelNotFound", endpoint="Generate")) >= 1)
    text = "".join(file.read_text() for file in access.logs.glob("*"))
    assert "nobody_may_read_this" not in text
    assert "Traceback" not in text


def test_prompts_are_in_the_log_where_that_is_wanted(
    client: openai.OpenAI, stub: OrthrusStub, serve_logs: Path
) -> None:
    """The application of the other tests is configured so."""
    prompts = ["print('wanted')", "print('this too')"]
    client.completions.create(
        model=MODEL, prompt=prompts, max_tokens=1, extra_headers={"X-Request-Id": "shown"}
    )

    def logged() -> list[str]:
        lines = [line for file in serve_logs.glob("*Ingress*") for line in file.read_text().splitlines()]
        calls = [record for record in map(json.loads, lines) if "endpoint" in record]
        return next((record["prompts"] for record in calls if record["request_id"] == "shown"), [])

    assert sorted(wait_for(logged)) == sorted(prompts)


CLIENT_SPAN = "b7ad6b7169203331"


def way_up(collector: Collector, trace: str) -> list[Span]:
    """The spans of a trace from the engine's up to the client's, empty as long as not all have come."""
    spans = collector.trace(trace)
    by_id = {span.span_id.hex(): span for span in spans}
    chain = [span for span in spans if span.name.startswith("replica_handle_request OrthrusReplica")]
    while chain and (above := by_id.get(chain[-1].parent_span_id.hex())) is not None:
        chain.append(above)
    return chain if chain and chain[-1].parent_span_id.hex() == CLIENT_SPAN else []


def test_a_trace_runs_from_the_client_through_every_process(
    client: openai.OpenAI, stub: OrthrusStub, collector: Collector
) -> None:
    """In the application of the other tests, since tracing is a setting of the whole Serve instance."""
    wanted = {"http": "0af7651916cd43dd8448eb211c80319c", "grpc": "1af7651916cd43dd8448eb211c80319c"}
    parent = {name: f"00-{trace}-{CLIENT_SPAN}-01" for name, trace in wanted.items()}
    client.completions.create(
        **ONE_TOKEN, stream=True, extra_headers={"traceparent": parent["http"]}
    ).response.read()
    request = pb.GenerateRequest(model=MODEL, prompt="x", sampling=pb.SamplingParams(max_tokens=1))
    list(stub.GenerateStream(request, metadata=[("traceparent", parent["grpc"]), ("application", "orthrus")]))
    for name, endpoint in (("http", "completions"), ("grpc", "GenerateStream")):
        chain = wait_for(partial(way_up, collector, wanted[name]))
        [ours] = [span for span in chain if span.name == endpoint]
        told = {item.key: item.value.int_value for item in ours.attributes}
        assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (1, 1)
        assert [event.name for event in ours.events] == ["first token"]


# --- keys of the further APIs


def test_only_its_key_can_continue_a_stored_response(access: Access) -> None:
    """Whichever ingress replica is asked, and streamed or not."""
    free, other = access.client("free"), access.client("other")
    asked: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 8}
    first = free.responses.create(**asked, input="def add(a, b):", instructions="Write code.")
    with free.responses.stream(**asked, input="And now?", previous_response_id=first.id) as stream:
        second = next(event.response for event in stream if event.type == "response.incomplete")
    assert first.usage is not None and second.usage is not None
    items: Any = free.responses.input_items.list(second.id, order="asc").data
    texts = [item.content[0].text for item in items if item.type == "message"]
    assert texts == ["def add(a, b):", first.output_text, "And now?"]
    # Instructions are not carried over: the same three messages in one request are the same prompt.
    spelt: Any = [
        {"role": "user", "content": texts[0]},
        {"role": "assistant", "content": texts[1]},
        {"role": "user", "content": texts[2]},
    ]
    alone = free.responses.create(**asked, input=spelt)
    assert alone.output_text == second.output_text
    assert alone.usage is not None and alone.usage.input_tokens == second.usage.input_tokens
    for _ in range(4):
        assert free.responses.retrieve(second.id).output_text == second.output_text
    with pytest.raises(openai.NotFoundError):
        other.responses.retrieve(second.id)
    free.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        free.responses.retrieve(second.id)
    unstored = free.responses.create(**asked, input="x", store=False)
    with pytest.raises(openai.NotFoundError):
        free.responses.retrieve(unstored.id)


def test_anthropics_clients_send_their_key_in_their_own_header(access: Access) -> None:
    asked: Any = {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}
    known = anthropic.Anthropic(base_url=access.url, api_key=access.keys["free"], max_retries=0)
    assert known.messages.create(**asked).usage.output_tokens == 1
    unknown = anthropic.Anthropic(base_url=access.url, api_key="sk-ant-unknown", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError) as caught:
        unknown.messages.create(**asked)
    assert caught.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]
