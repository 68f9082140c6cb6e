"""Constrained decoding: the text follows the grammar, and is the same under AR and Orthrus."""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import Tensor

from orthrus.engine import Engine
from orthrus.engine.config import EngineConfig
from orthrus.errors import RequestError
from orthrus.models.checkpoint import load_weights
from orthrus.requests.request import Completion, SamplingParams
from orthrus.runner.sampler import PickRows
from orthrus.text.grammar import choice_grammar, json_grammar, lark_grammar, regex_grammar
from orthrus.text.grammar_mask import GrammarMasks
from tests.checkpoints import edit_json
from tests.hostile import bounded

MODEL = str(Path(__file__).resolve().parents[2] / "models" / "orthrus-tiny")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["function", "class", "module"]},
        "lines": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 999}, "maxItems": 3},
        "documented": {"type": "boolean"},
    },
    "required": ["name", "kind", "lines", "documented"],
    "additionalProperties": False,
}
PARAMS = {
    "greedy": SamplingParams(temperature=0.0),
    "sampled": SamplingParams(temperature=1.0, seed=3),
    "filtered": SamplingParams(temperature=1.2, top_k=20, top_p=0.9, min_p=0.01, seed=4),
    "penalised": SamplingParams(
        temperature=0.8, repetition_penalty=1.3, presence_penalty=0.5, seed=5, logprobs=2
    ),
    "two choices": SamplingParams(temperature=1.0, seed=6, n=2),
}


def make_engine(schedule: Any, **settings: Any) -> Engine:
    # Drafts whatever a pass costs: what is drafted must not depend on how busy the machine is.
    settings = {"kv_cache_tokens": 4096, **settings}
    return Engine.from_pretrained(
        EngineConfig(model=MODEL, schedule=schedule, device="cpu", adaptive_draft=False, **settings)
    )


@pytest.fixture(scope="module")
def ar() -> Engine:
    return make_engine("ar")


@pytest.fixture(scope="module")
def orthrus() -> Engine:
    return make_engine("orthrus")


def constrained(params: SamplingParams, schema: dict[str, Any], max_tokens: int = 500) -> SamplingParams:
    return replace(params, grammar=json_grammar(schema), max_tokens=max_tokens)


def text(engine: Engine, completion: Completion) -> str:
    return str(engine.tokenizer.decode(completion.token_ids, skip_special_tokens=True))


@pytest.mark.parametrize("name", PARAMS)
def test_both_schedules_write_the_same_json(ar: Engine, orthrus: Engine, name: str) -> None:
    prompts = [ar.tokenizer.encode(t) for t in ("# The parser as JSON:\n", "config = ")]
    params = constrained(PARAMS[name], PERSON)
    expected, got = ar.generate(prompts, params), orthrus.generate(prompts, params)
    for one, other in zip(chain(*expected), chain(*got), strict=True):
        assert one.token_ids == other.token_ids
        assert one.finish_reason == other.finish_reason == "stop"
        jsonschema.validate(json.loads(text(ar, one)), PERSON)
        if one.logprobs is not None and other.logprobs is not None:
            mine, theirs = ([item.logprob for item in c.logprobs or ()] for c in (one, other))
            assert mine == pytest.approx(theirs, abs=1e-4)
    cycles = sum(c.stats.cycles for c in chain(*got))
    committed = sum(c.stats.completion_tokens - 1 for c in chain(*got))
    # Much of JSON follows from the schema, and the drafts follow the masks too.
    assert committed / cycles > 1.5


def test_neighbours_and_preemption_change_nothing(ar: Engine) -> None:
    """Free and constrained requests in the same passes, with a cache too small for them all."""
    prompts = [ar.tokenizer.encode(t) for t in ("def f(x):\n", "# JSON\n", "import ", "data = ")]
    params = [
        SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True),
        constrained(PARAMS["sampled"], PERSON, 60),
        SamplingParams(temperature=1.0, seed=8, max_tokens=60, ignore_eos=True),
        constrained(PARAMS["greedy"], PERSON, 60),
    ]
    alone = [ar.generate([p], one)[0][0].token_ids for p, one in zip(prompts, params, strict=True)]
    for schedule, tokens_per_cycle in (("orthrus", 1.3), ("ngram", 1.02)):
        tight = make_engine(schedule, page_size=8, max_model_len=96, kv_cache_tokens=96)
        together = [choices[0].token_ids for choices in tight.generate(prompts, params)]
        assert together == alone
        assert tight.stats.preemptions > 0 and tight.stats.tokens_per_cycle > tokens_per_cycle


def test_a_text_cut_short_is_the_beginning_of_the_whole(ar: Engine, orthrus: Engine) -> None:
    prompt = [ar.tokenizer.encode("x = ")]
    [[whole]] = ar.generate(prompt, constrained(PARAMS["greedy"], PERSON))
    for length in (1, 2, 7):
        [[cut]] = orthrus.generate(prompt, constrained(PARAMS["greedy"], PERSON, length))
        assert (cut.token_ids, cut.finish_reason) == (whole.token_ids[:length], "length")


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "strin"}, "strin"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "object", "properties": 5}, "properties"),
        ({"enum": ["x" * 300_000]}, "limit"),
    ],
)
def test_schemas_that_cannot_be_used_are_refused(ar: Engine, schema: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        ar.generate([[1]], constrained(PARAMS["greedy"], schema))
    assert not ar.has_work


def test_what_a_grammar_cannot_be_combined_with(tiny_orthrus: Path) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(grammar="start: /a/", ignore_eos=True)
    assert caught.value.param == "ignore_eos"
    engine = Engine.from_pretrained(
        EngineConfig(model=str(tiny_orthrus), device="cpu", schedule="ar", kv_cache_tokens=512)
    )
    with pytest.raises(RequestError, match="tokenizer"):
        engine.generate([[1]], SamplingParams(grammar="start: /a/"))


def bits(masks: Tensor) -> list[list[int]]:
    return [[i for i in range(masks.shape[1] * 32) if row[i // 32] >> (i % 32) & 1] for row in masks.tolist()]


def test_masks_of_a_block_are_those_met_one_by_one(ar: Engine) -> None:
    tokenizer = ar.tokenizer
    eos = ar.model_config.eos_token_ids
    masks = GrammarMasks(tokenizer, ar.model_config.vocab_size, eos)
    tokens = [*tokenizer.encode('{"a": [1, 22]}'), eos[0]]
    grammar = json_grammar({"type": "object"})
    block, step = masks(grammar), masks(grammar)
    together = bits(block.allowed(tokens[:-1]))
    assert block.accepts(tokens) == len(tokens)
    for i, token in enumerate(tokens):
        [alone] = bits(step.allowed([]))
        assert together[i] == alone and token in alone
        assert torch.equal(block.allowed(tokens[:-1], i), block.allowed(tokens[:-1])[i:])
        step.commit(token)
    assert set(together[-1]) >= set(eos)
    assert block.error is None and step.error is None


def test_an_end_token_that_is_text_too_ends_no_string(ar: Engine) -> None:
    letters = ar.tokenizer.encode("self", add_special_tokens=False)
    ends = [*ar.model_config.eos_token_ids, *letters]
    mask = GrammarMasks(ar.tokenizer, ar.model_config.vocab_size, ends)(regex_grammar('"[a-z]+"', "regex"))
    for token in ar.tokenizer.encode('"ab"', add_special_tokens=False):
        [row] = bits(mask.allowed([]))
        assert not set(ends) & set(row)
        mask.commit(token)
    [row] = bits(mask.allowed([]))
    assert set(row) == set(ends)


def test_a_forbidden_draft_leaves_no_trace(ar: Engine) -> None:
    masks = GrammarMasks(ar.tokenizer, ar.model_config.vocab_size, ar.model_config.eos_token_ids)
    mask = masks(json_grammar({"type": "integer"}))
    [one, word] = ar.tokenizer.encode("1"), ar.tokenizer.encode("x")
    before = mask.allowed([])
    assert mask.allowed([*one, *word, *one]).shape[0] == 4
    assert mask.accepts([*one, *word, *one]) == 1
    assert torch.equal(mask.allowed([]), before) and mask.error is None
    # A draft is picked first, and then kept to its mask by its logits.
    assert PickRows(SamplingParams(), seed=1, position=3, count=4, mask=mask, drafting=True).reads_logits


class _Breaks:
    """A mask whose grammar gives up at the third token, as one that grows too complex does."""

    param = "response_format"

    def __init__(self, _: str) -> None:
        self.error: str | None = None
        self._left = 3

    def allowed(self, ahead: Sequence[int], first: int = 0) -> Tensor:
        return torch.full((len(ahead) + 1 - first, 8192 // 32), -1, dtype=torch.int32)

    def accepts(self, tokens: Sequence[int]) -> int:
        return len(tokens)

    def commit(self, token: int) -> None:
        self._left -= 1
        if self._left == 0:
            self.error = "too complex"


def test_a_grammar_that_gives_up_ends_its_request_alone(ar: Engine) -> None:
    weights = load_weights(Path(MODEL), ar.model_config, ar.device, "auto")
    engine = Engine(ar.config, ar.model_config, weights, ar.tokenizer, _Breaks)
    free = SamplingParams(temperature=0.0, max_tokens=20)
    [[alone]] = ar.generate([[5, 6]], free)
    [[broken], [good]] = engine.generate(
        [[5, 6], [5, 6]], [SamplingParams(temperature=0.0, max_tokens=20, grammar="g"), free]
    )
    assert good.token_ids == alone.token_ids
    assert broken.finish_reason == "error" and len(broken.token_ids) == 2
    assert engine.stats.kv_pages_used == 0


def completes(model: Engine, masks: GrammarMasks, grammar: str, text: str) -> bool:
    """Whether a text is one of the grammar's."""
    mask = masks(grammar)
    tokens = model.tokenizer.encode(text)
    if mask.accepts(tokens) < len(tokens):
        return False
    for token in tokens:
        mask.commit(token)
    return bool(set(bits(mask.allowed([]))[0]) & set(model.model_config.eos_token_ids))


@pytest.fixture(scope="module")
def masks(ar: Engine) -> GrammarMasks:
    return GrammarMasks(ar.tokenizer, ar.model_config.vocab_size, ar.model_config.eos_token_ids)


@pytest.mark.parametrize(
    ("grammar", "texts", "others"),
    [
        (regex_grammar(r"\d{3}/[a-c]+", "guided_regex"), ["123/ab"], ["12/a", "123", "x123/a", "١٢٣/a"]),
        (regex_grammar("a\nb|\\\\", "guided_regex"), ["a\nb", "\\"], ["ab"]),
        (
            choice_grammar(["yes", "no", 'a "b"\\\n€😀', "ye"], "choice"),
            ["yes", "ye", 'a "b"\\\n€😀'],
            ["y", "non"],
        ),
        (lark_grammar('start: "a" rest?\nrest: "b" | "c"', "grammar"), ["a", "ab", "ac"], ["abc", "b"]),
        (lark_grammar('root ::= "a" rest\nrest ::= [b-c]+', "grammar"), ["ab", "abc"], ["a", "bc"]),
    ],
)
def test_grammars_of_other_kinds(
    ar: Engine, masks: GrammarMasks, grammar: str, texts: list[str], others: list[str]
) -> None:
    assert [completes(ar, masks, grammar, text) for text in texts] == [True] * len(texts)
    assert not any(completes(ar, masks, grammar, text) for text in others)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (partial(regex_grammar, "a\\"), "backslash"),
        (partial(regex_grammar, "x" * 300_000), "limit"),
        (partial(choice_grammar, []), "at least one"),
        (partial(choice_grammar, ["x" * 300_000]), "limit"),
        (partial(choice_grammar, ["\ud800"]), "surrogate"),
        (partial(lark_grammar, "a: b"), "Lark"),
        (partial(lark_grammar, "root ::= " + "(" * 5000), "GBNF"),
        (partial(lark_grammar, "start: \ud800"), "surrogate"),
        (partial(lark_grammar, " \n" * 120_000 + "a"), "GBNF"),
        (partial(lark_grammar, "".join(f"r{i} ::= r{i + 1}\n" for i in range(2001))), "2000 rules"),
    ],
)
def test_grammars_that_cannot_be_written_name_their_field(make: Callable[[str], str], said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught, bounded():
        make("structured_outputs")
    assert caught.value.param == "structured_outputs"


@pytest.mark.parametrize("end", [None, 8191])
def test_a_model_without_an_end_token_serves_all_but_grammars(tmp_path: Path, end: int | None) -> None:
    """Under a grammar only an end token that the tokenizer knows may follow a complete text."""
    for file in Path(MODEL).iterdir():
        if file.suffix == ".safetensors":
            (tmp_path / file.name).symlink_to(file)
        else:
            shutil.copy(file, tmp_path)
    edit_json(tmp_path / "config.json", eos_token_id=end)
    tokens = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    assert tokens.pop()["id"] == 8191
    edit_json(tmp_path / "tokenizer.json", added_tokens=tokens)
    (tmp_path / "generation_config.json").unlink()
    engine = Engine.from_pretrained(
        EngineConfig(model=str(tmp_path), device="cpu", adaptive_draft=False, kv_cache_tokens=1024)
    )
    assert not engine.takes_grammars
    params = SamplingParams(temperature=0.0, max_tokens=24)
    [[free]] = engine.generate([[1, 2, 3]], params)
    assert (len(free.token_ids), free.finish_reason) == (24, "length")
    assert free.stats.tokens_per_cycle > 1.0
    with pytest.raises(
        RequestError, match=r"need an end-of-sequence token .* the tokenizer knows, and this model has none"
    ):
        engine.generate([[1, 2, 3]], replace(params, grammar=json_grammar({})))


def test_a_grammar_that_takes_too_long_ends(masks: GrammarMasks, ar: Engine) -> None:
    """An ambiguous one, whose work grows with the square of the text: it may not hold up other requests' passes."""
    mask = masks('start: many\nmany: many many | "a" | many many many')
    [token] = ar.tokenizer.encode("a")
    begin = time.thread_time()
    while mask.error is None:
        mask.allowed([])
        mask.commit(token)
    assert "takes too long" in mask.error or "too complex" in mask.error
    assert time.thread_time() - begin < 10
