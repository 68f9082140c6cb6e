"""The fields that clients of other servers send: each is honoured, or refused with what to send instead."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from orthrus.deployments.bodies.completion_body import CompletionBody
from orthrus.deployments.bodies.faults import describe, field_path
from orthrus.deployments.bodies.unsupported_fields import UNSUPPORTED
from orthrus.deployments.chat.body import ChatBody
from orthrus.deployments.chat.output import ChatDelta
from orthrus.deployments.chat.template import ChatTemplate
from orthrus.deployments.failures.failure import describe_failure
from orthrus.deployments.generation.text_chunk import TextChunk
from orthrus.deployments.grpc.format import chat_body, completion_body, request_params
from orthrus.deployments.http.body import parse_body
from orthrus.deployments.openai.format import CompletionFormat
from orthrus.deployments.proto import orthrus_pb2 as pb
from orthrus.errors import RequestError
from orthrus.requests.request import Chunk, RequestStats
from orthrus.text.grammar_mask import GrammarMasks
from orthrus.text.tokenizer import load_tokenizer
from tests.conftest import ROOT

MODEL = ROOT / "models" / "orthrus-tiny"
MESSAGES = [{"role": "user", "content": "hi"}]


def completion(**fields: Any) -> CompletionBody:
    return parse_body(json.dumps({"model": "m", "prompt": "p", **fields}).encode(), CompletionBody)[0]


def chat(**fields: Any) -> ChatBody:
    return parse_body(json.dumps({"model": "m", "messages": MESSAGES, **fields}).encode(), ChatBody)[0]


def refused(make: Any, **fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        make(**fields).sampling()
    return caught.value


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(MODEL)


# What vLLM's and SGLang's own clients, and those of services like them, send besides OpenAI's fields.
OTHERS: dict[str, Any] = {
    "use_beam_search": False, "length_penalty": 1.0, "early_stopping": False, "spaces_between_special_tokens": True,
    "truncate_prompt_tokens": 5, "prompt_logprobs": None, "allowed_token_ids": [1, 2], "bad_words": ["a"],
    "detokenize": True, "logits_processors": [], "structured_outputs": None, "priority": 3, "request_id": "r-1",
    "return_tokens_as_token_ids": True, "return_token_ids": True, "cache_salt": "s", "kv_transfer_params": None,
    "vllm_xargs": None, "mm_processor_kwargs": None, "guided_decoding_backend": "xgrammar", "lora_path": None,
    "return_hidden_states": False, "stop_regex": None, "no_stop_trim": False, "session_params": None,
}  # fmt: skip
CHATS: dict[str, Any] = {
    **OTHERS, "best_of": 1, "echo": False, "add_generation_prompt": True, "continue_final_message": False,
    "add_special_tokens": False, "documents": None, "chat_template": None, "chat_template_kwargs": {}, "verbosity": "medium",
    "include_reasoning": True, "separate_reasoning": True, "stream_reasoning": True, "thinking_token_budget": None,
    "reasoning": {"effort": "low"}, "functions": [], "safety_settings": [],
    "top_logprobs": 0,
}  # fmt: skip


def test_what_clients_of_other_servers_send_by_default_is_accepted() -> None:
    assert completion(**OTHERS).sampling().allowed_token_ids == (1, 2)
    assert chat(**CHATS).sampling().bad_words == ("a",)


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_unsupported_fields_are_refused_with_what_to_send_instead(name: str) -> None:
    top, _, nested = name.partition(".")
    wanted = {nested: 1} if nested else "5" if name in ("messages", "prompt") else {"a": 1}
    body = completion if name in ("messages", "tools", "top_logprobs", "max_completion_tokens") else chat
    if name == "reasoning.max_tokens":
        body = chat
    error = refused(body, **{top: wanted})
    assert error.param == name and error.message.startswith(f"{name} is not supported: {UNSUPPORTED[name]}")
    # Only unknown fields may be ignored. These are known, and would change the answer.
    raw = {"model": "m", "prompt": "p"} if body is completion else {"model": "m", "messages": MESSAGES}
    given = json.dumps({**raw, top: wanted}).encode()
    with pytest.raises(RequestError):
        parse_body(given, CompletionBody if body is completion else ChatBody, ignore_unknown=True)


@pytest.mark.parametrize(
    ("fields", "param", "meant"),
    [
        ({"temprature": 1}, "temprature", "'temperature'"),
        ({"max_token": 1}, "max_token", "'max_tokens'"),
        ({"qwertz": 1}, "qwertz", "remove it"),
        ({"Temperature": 1}, "Temperature", "'temperature'"),
        ({"tools": [{"type": "function", "function": {"name": "f", "paramters": {}}}]},
         "tools[0].function.paramters", "'parameters'"),
        ({"stream": True, "stream_options": {"includeusage": True}}, "stream_options.includeusage", "'include_usage'"),
    ],
)  # fmt: skip
def test_a_misspelt_field_suggests_the_nearest_name(fields: dict[str, Any], param: str, meant: str) -> None:
    error = refused(chat, **fields)
    assert error.param == param and meant in error.message


def test_ignored_fields_are_named() -> None:
    raw = json.dumps(
        {
            "model": "m",
            "messages": MESSAGES,
            "temprature": 1,
            "tools": [{"type": "function", "function": {"name": "f", "x": 1}}],
        }
    ).encode()
    body, ignored = parse_body(raw, ChatBody, ignore_unknown=True)
    assert ignored == ["tools[0].function.x", "temprature"] or sorted(ignored) == [
        "temprature",
        "tools[0].function.x",
    ]
    assert body.temperature == 1.0 and body.tools is not None and body.tools[0].function.name == "f"
    # Other faults are still errors.
    with pytest.raises(RequestError, match="max_tokens"):
        parse_body(
            b'{"model": "m", "prompt": "p", "x": 1, "max_tokens": "5"}', CompletionBody, ignore_unknown=True
        )


@pytest.mark.parametrize(
    ("raw", "param", "said"),
    [
        (b'{"model": "m", "prompt": "p", "metadata": {"a": [NaN]}}', "metadata", "finite"),
        (b'{"model": "m", "prompt": "p", "temperature": -Infinity}', "temperature", "finite"),
        (b'{"model": "m", "prompt": "p", "metadata": {"a": 1e400}}', "metadata", "finite"),
        (b'{"model": "m", "prompt": "p", "metadata": {"a": -1%s.0}}' % (b"0" * 400), "metadata", "finite"),
        (b'{"model": "m", "prompt": "p", "metadata": {"a": 1E+0400}}', "metadata", "finite"),
        (b"[" * 100_000, None, "recursion limit"),
        (b'{"model": ' + b'{"a": ' * 1000, None, "not JSON"),
        (b'{"model": "m", "prompt": "\\ud800"}', None, "not JSON"),
        (b"\xff\xfe{}", None, "not JSON"),
        (b"", None, "not JSON"),
        (b"[]", None, "must be a JSON object"),
        (b"null", None, "must be a JSON object"),
    ],
)
def test_invalid_json_is_refused(raw: bytes, param: str | None, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_body(raw, CompletionBody)
    assert caught.value.param == param and said in caught.value.message


def test_null_fields_are_absent_at_any_depth() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": None, "extra": None}}
    body = chat(tools=[tool], stream=True, stream_options={"include_usage": True, "other": None}, messages=[
        {"role": "user", "content": [{"type": "text", "text": "a", "annotations": None}]}])  # fmt: skip
    assert body.messages[0].text == "a"


def test_paths_of_fields_leave_out_branches_of_unions() -> None:
    assert (
        field_path(("messages", 0, "content", "list[ContentPart]", 1, "text", "str"))
        == "messages[0].content[1].text"
    )
    assert field_path(("tool_choice", "NamedToolChoice", "function", "name")) == "tool_choice.function.name"


@pytest.mark.parametrize(
    ("fields", "param", "good", "bad"),
    [
        ({"structured_outputs": {"regex": "[ab]{3}"}}, "structured_outputs", "aba", "ac"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "structured_outputs", "no", "x"),
        ({"structured_outputs": {"json": {"enum": ["q"]}}}, "structured_outputs", '"q"', "q"),
        ({"structured_outputs": {"json": '{"enum": ["q"]}'}}, "structured_outputs", '"q"', "q"),
        ({"structured_outputs": {"json_object": True}}, "structured_outputs", "{}", "[]"),
        ({"structured_outputs": {"grammar": 'root ::= "a" "}"'}}, "structured_outputs", "a}", "b"),
        ({"guided_json": {"enum": [5]}}, "guided_json", "5", "6"),
        ({"guided_regex": "x+"}, "guided_regex", "xx", "y"),
        ({"guided_choice": ["a", "b"]}, "guided_choice", "b", "c"),
        ({"guided_grammar": 'start: "k"'}, "guided_grammar", "k", "l"),
        ({"json_schema": '{"enum": [1]}'}, "json_schema", "1", "2"),
        ({"regex": "z"}, "regex", "z", "y"),
        ({"ebnf": 'root ::= "e"'}, "ebnf", "e", "f"),
        ({"response_format": {"type": "json_object"}}, "response_format", "{}", "[]"),
    ],
)
def test_constraints_hold_for_texts_and_chats(
    tokenizer: Any, masks: GrammarMasks, fields: dict[str, Any], param: str, good: str, bad: str
) -> None:
    text, talk = completion(**fields), chat(**fields)
    assert text.sent_as["response_format"] == talk.sent_as["response_format"] == param
    prompt = ChatTemplate(tokenizer).apply(talk)
    for grammar in (text.sampling().grammar, prompt.grammar):
        assert grammar is not None
        tokens = tokenizer.encode(good, add_special_tokens=False)
        assert masks(grammar).accepts([*tokens, tokenizer.eos_token_id]) == len(tokens) + 1
        wrong = tokenizer.encode(bad, add_special_tokens=False)
        assert masks(grammar).accepts([*wrong, tokenizer.eos_token_id]) < len(wrong) + 1


@pytest.fixture(scope="module")
def masks(tokenizer: Any) -> GrammarMasks:
    return GrammarMasks(tokenizer, len(tokenizer), [tokenizer.eos_token_id])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[1]"}, "guided_json"),
        ({"regex": "a", "ebnf": 'root ::= "a"'}, "regex"),
        ({"guided_grammar": "root ::= ("}, "guided_grammar"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"bad_words": [""]}, "bad_words"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"request_id": "a b"}, "request_id"),
        ({"stream_options": {"continuous_usage_stats": True}}, "stream_options"),
    ],
)
def test_constraints_that_cannot_be_followed_are_refused(fields: dict[str, Any], param: str) -> None:
    assert refused(completion, **fields).param == param


def test_prompts_are_cut_on_the_left() -> None:
    tokens = list(range(20))
    assert completion().truncated(tokens, 16, 4) == tokens
    assert completion(truncate_prompt_tokens=3).truncated(tokens, 16, 4) == [17, 18, 19]
    assert completion(truncate_prompt_tokens=-1).truncated(tokens, 16, 4) == tokens[8:]
    assert completion(truncate_prompt_tokens=-1).truncated(tokens, 16, 400) == [19]
    assert completion(truncate_prompt_tokens=30).truncated(tokens, 16, 4) == tokens


def test_errors_name_what_the_client_sent() -> None:
    fault = RequestError("max_tokens must be at least 0, got -1: lower max_tokens", "max_tokens")
    names = chat(max_completion_tokens=5).sent_as
    failure = describe_failure(fault, names)
    assert failure.param == "max_completion_tokens" and failure.message.count("max_completion_tokens") == 2
    assert describe_failure(fault, chat(max_tokens=5).sent_as).param == "max_tokens"
    fault = RequestError("the prompt has 9 tokens", "prompt")
    assert describe_failure(fault, names).body["error"]["param"] == "messages"
    assert describe_failure(fault, completion().sent_as).param == "prompt"


@pytest.mark.parametrize(
    ("fields", "thinking"),
    [
        ({"reasoning": {"effort": "none"}}, False),
        ({"reasoning": {"enabled": True}}, True),
        ({"reasoning": {"effort": "high"}, "enable_thinking": False}, False),
        ({"reasoning": {"exclude": True}}, None),
    ],
)
def test_reasoning_objects(fields: dict[str, Any], thinking: bool | None) -> None:
    body = chat(**fields)
    assert body.thinking is thinking
    assert body.options.include_reasoning is not fields["reasoning"].get("exclude", False)


def test_the_last_message_is_continued(tokenizer: Any) -> None:
    template = ChatTemplate(tokenizer)
    messages = [*MESSAGES, {"role": "assistant", "content": "The answer is"}]
    goes_on = tokenizer.decode(template.apply(chat(messages=messages, continue_final_message=True)).tokens)
    assert goes_on.endswith("The answer is")
    bare = tokenizer.decode(template.apply(chat(add_generation_prompt=False)).tokens)
    opened = tokenizer.decode(template.apply(chat()).tokens)
    assert opened.startswith(bare) and len(opened) > len(bare)
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert refused(chat, messages=messages, **both).param == "continue_final_message"
    empty = [{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}]}]
    assert refused(chat, messages=empty, continue_final_message=True).param == "continue_final_message"


STATS = RequestStats(prompt_tokens=3, cached_tokens=1, completion_tokens=3, cycles=1, passes=2, seed=7)


def pieces(is_chat: bool) -> list[TextChunk]:
    """The chunks of an answer: reasoning, then one whose text is held back, then the rest."""
    chunks = [
        Chunk("r", 0, (11,)),
        Chunk("r", 0, (12,)),
        Chunk("r", 0, (13,), finish_reason="stop", stats=STATS),
    ]
    if not is_chat:
        return [
            TextChunk(0, t, c, finish_reason=c.finish_reason)
            for t, c in zip(("a", "", "b"), chunks, strict=True)
        ]
    deltas = [ChatDelta(reasoning="hm"), ChatDelta(), ChatDelta("b")]
    spans = [range(1), range(0), range(0)]
    return [
        TextChunk(0, "x", c, d, c.finish_reason, span)
        for c, d, span in zip(chunks, deltas, spans, strict=True)
    ]


def streamed(out: CompletionFormat, items: list[TextChunk]) -> list[dict[str, Any]]:
    """The events of a stream, from the opening to the usage."""
    events = [out.sse(opening)] if (opening := out.opening(0)) is not None else []
    events += [out.stream(told, 0) for item in items if (told := out.take(item)) is not None]
    if out.include_usage:
        events.append(out.sse(out.usage_event([STATS])))
    return [json.loads(event.removeprefix("data: ")) for event in events]


def response(body: CompletionBody | ChatBody, tokenizer: Any) -> CompletionFormat:
    is_chat = isinstance(body, ChatBody)
    usage = body.options.include_usage
    return CompletionFormat(is_chat, "m", tokenizer, usage, options=body.options, prompts=[[5, 6, 7]])


def test_token_ids_are_returned(tokenizer: Any) -> None:
    text, talk = (make(return_token_ids=True, stream=True) for make in (completion, chat))
    events = streamed(response(text, tokenizer), pieces(False))
    assert [event["choices"][0]["token_ids"] for event in events] == [[11], [12], [13]]
    assert (
        events[0]["choices"][0]["prompt_token_ids"] == [5, 6, 7]
        and "prompt_token_ids" not in events[1]["choices"][0]
    )
    events = streamed(response(talk, tokenizer), pieces(True))
    assert events[0]["prompt_token_ids"] == [5, 6, 7]
    assert [event["choices"][0]["token_ids"] for event in events[1:]] == [[11], [12], [13]]
    assert not any(
        "token_ids" in event["choices"][0] for event in streamed(response(chat(), tokenizer), pieces(True))
    )


def test_every_event_counts_the_tokens_so_far(tokenizer: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = streamed(response(chat(stream=True, stream_options=options), tokenizer), pieces(True))
    counted = [event["usage"]["completion_tokens"] for event in events]
    assert counted == [0, 1, 3, 3]
    assert all(event["usage"]["prompt_tokens"] == 3 for event in events)
    assert events[-1]["usage"]["completion_tokens_details"]["reasoning_tokens"] == 1


def test_events_are_padded_to_hide_their_text(tokenizer: Any) -> None:
    body = completion(stream=True, stream_options={"include_obfuscation": True})
    lengths = set()
    for text in ("a", "a longer text", "x" * 29):
        out = response(body, tokenizer)
        out.id = "cmpl-1"
        event = out.stream(TextChunk(0, text, Chunk("r", 0, (1,))), 0)
        assert json.loads(event.removeprefix("data: "))["choices"][0]["text"] == text
        lengths.add(len(event))
    assert len({length // 64 for length in lengths}) <= 2 and len({length % 64 for length in lengths}) == 1


def test_reasoning_can_be_left_out(tokenizer: Any) -> None:
    events = streamed(response(chat(include_reasoning=False, stream=True), tokenizer), pieces(True))
    assert [event["choices"][0]["delta"].get("content") for event in events] == ["", "b"]
    assert "reasoning_content" not in json.dumps(events)
    assert "hm" in json.dumps(streamed(response(chat(stream=True), tokenizer), pieces(True)))


def test_request_ids_are_returned(tokenizer: Any) -> None:
    assert response(chat(request_id="mine-1"), tokenizer).id == "chatcmpl-mine-1"


def test_grpc_has_the_same_fields() -> None:
    wanted = pb.StructuredOutputs(choice=pb.Choices(values=["a", "b"]))
    request = pb.GenerateRequest(
        model="m", prompt="p", structured_outputs=wanted, truncate_prompt_tokens=4, priority=-2, cache_salt="s",
        return_token_ids=True, add_special_tokens=False,
    )  # fmt: skip
    expected = {"structured_outputs": {"choice": ["a", "b"]}, "truncate_prompt_tokens": 4, "priority": -2,
                "cache_salt": "s", "return_token_ids": True}  # fmt: skip
    assert completion_body(request) == completion(**expected, add_special_tokens=False)
    talk = pb.ChatRequest(
        model="m", messages=[pb.ChatMessage(role="assistant", content="hi")], structured_outputs=wanted, priority=-2,
        truncate_prompt_tokens=4, cache_salt="s", return_token_ids=True, reasoning_effort="low", include_reasoning=False,
        continue_final_message=True,
    )  # fmt: skip
    messages = [{"role": "assistant", "content": "hi"}]
    assert chat_body(talk) == chat(
        **expected,
        messages=messages,
        reasoning_effort="low",
        include_reasoning=False,
        continue_final_message=True,
    )
    params = request_params(pb.SamplingParams(bad_words=["x"], allowed_token_ids=[4], schedule="ar"))
    assert (params.bad_words, params.allowed_token_ids, params.schedule) == (("x",), (4,), "ar")
    assert request_params(pb.SamplingParams()).allowed_token_ids is None
    with pytest.raises(RequestError):
        completion_body(pb.GenerateRequest(prompt="p", structured_outputs=pb.StructuredOutputs()))


def test_errors_of_pydantic_become_request_errors() -> None:
    with pytest.raises(ValidationError) as caught:
        ChatBody.model_validate({"model": "m", "messages": MESSAGES, "n": "x"})
    assert describe(caught.value, ChatBody).param == "n"
