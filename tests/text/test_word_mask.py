"""Bad words and allowed tokens: what they forbid, and that both schedules give the same text under them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orthrus.engine import Engine
from orthrus.engine.config import EngineConfig
from orthrus.errors import RequestError
from orthrus.requests.request import Request, SamplingParams
from orthrus.text.grammar import json_grammar
from orthrus.text.word_mask import JointMask, WordMask, WordRules

MODEL = str(Path(__file__).resolve().parents[2] / "models" / "orthrus-tiny")
GREEDY = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, seed=11, top_p=0.95, max_tokens=32, ignore_eos=True)
PROMPT = "def parse(self, line):\n"


def make_engine(schedule: Any) -> Engine:
    # Drafts whatever a pass costs: what is drafted must not depend on how busy the machine is.
    return Engine.from_pretrained(
        EngineConfig(model=MODEL, schedule=schedule, device="cpu", adaptive_draft=False, kv_cache_tokens=4096)
    )


@pytest.fixture(scope="module")
def ar() -> Engine:
    return make_engine("ar")


@pytest.fixture(scope="module")
def orthrus() -> Engine:
    return make_engine("orthrus")


def ids_of(mask: WordMask | JointMask, ahead: list[int], vocab: int) -> list[list[int]]:
    """The allowed token ids of each row."""
    rows = mask.allowed(ahead)
    bits = (rows.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32) & 1).flatten(1)
    assert not bits[:, vocab:].any()
    return [row.nonzero().flatten().tolist() for row in bits]


def rules(words: dict[str, list[int]], allowed: list[int] | None = None, vocab: int = 40) -> WordRules:
    """Rules over a vocabulary of which only `words`' spellings matter."""

    def tokenizer(texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [words.get(text, []) for text in texts]}

    return WordRules(tokenizer, vocab, [w for w in words if not w.startswith(" ")], allowed)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 9])
def test_long_words_are_known_token_by_token_and_in_one_block(length: int) -> None:
    word = list(range(1, length + 1))
    table = rules({"word": word, "abc": [11, 12, 13]})
    before = [20, 21, *word[:-1]]
    stepwise, block = WordMask(table), WordMask(table)
    for token in before:
        assert stepwise.accepts([token]) == 1
        stepwise.commit(token)
    assert block.accepts([*before, word[-1]]) == len(before)
    assert stepwise.accepts([word[-1]]) == 0
    assert ids_of(block, before, 40)[-1] == ids_of(stepwise, [], 40)[0]


def test_the_last_token_of_a_word_is_forbidden_behind_the_others() -> None:
    everything = list(range(40))
    mask = WordMask(rules({"a": [35], "bc": [5, 6], " bc": [7, 6], "xyz": [1, 2, 3]}))
    without = [t for t in everything if t != 35]
    assert ids_of(mask, [5, 1, 2, 9], 40) == [
        without,
        [t for t in without if t != 6],
        without,
        [t for t in without if t != 3],
        without,
    ]
    assert mask.accepts([1, 2, 4, 1, 2, 3]) == 5 and mask.accepts([35]) == 0
    for token in (1, 2):
        mask.commit(token)
    assert ids_of(mask, [], 40) == [[t for t in without if t != 3]]
    assert mask.error is None
    # Rows from a later place on are those of all rows.
    assert torch.equal(mask.allowed([5, 1, 2], first=2), mask.allowed([5, 1, 2])[2:])


def test_a_mask_that_allows_no_token_has_an_error() -> None:
    mask = WordMask(rules({"bc": [5, 6]}, allowed=[5, 6]))
    assert ids_of(mask, [5], 40) == [[5, 6], [5]]
    dead_end = WordMask(rules({"bc": [5, 6], "bb": [5, 5]}, allowed=[5, 6]))
    dead_end.commit(5)
    assert dead_end.error is None and ids_of(dead_end, [], 40) == [[5, 6]]
    dead_end.commit(5)
    assert "allow more" in str(dead_end.error)
    with pytest.raises(RequestError, match="no token"):
        rules({"a": [5]}, allowed=[5])

    joint = JointMask(WordMask(rules({}, allowed=[1, 2])), WordMask(rules({}, allowed=[2, 3])))
    assert ids_of(joint, [], 40) == [[2]] and joint.accepts([2, 1]) == 1 and joint.error is None
    joint.commit(1)
    assert "allow more" in str(joint.error)
    assert joint.param == "bad_words"


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, replace(SAMPLED, logprobs=2, repetition_penalty=1.2)])
def test_no_bad_word_comes_and_both_schedules_agree(
    ar: Engine, orthrus: Engine, params: SamplingParams
) -> None:
    prompt = [ar.tokenizer.encode(PROMPT)]
    free = ar.tokenizer.decode(ar.generate(prompt, params)[0][0].token_ids)
    words = tuple({word: None for word in free.split() if word.isidentifier()})[:12]
    assert words
    params = replace(params, bad_words=words)
    [[expected]], [[got]] = ar.generate(prompt, params), orthrus.generate(prompt, params)
    assert expected.token_ids == got.token_ids
    assert got.stats.tokens_per_cycle > 1.2
    for word in words:
        for spelling in (word, f" {word}"):
            tokens = tuple(ar.tokenizer.encode(spelling, add_special_tokens=False))
            places = range(len(got.token_ids))
            assert not any(got.token_ids[i : i + len(tokens)] == tokens for i in places), word


def test_only_allowed_tokens_come_under_both_schedules(ar: Engine, orthrus: Engine) -> None:
    prompt = [ar.tokenizer.encode(PROMPT)]
    allowed = tuple(range(100, 400))
    params = replace(SAMPLED, allowed_token_ids=allowed, n=2)
    [expected], [got] = ar.generate(prompt, params), orthrus.generate(prompt, params)
    for one, other in zip(expected, got, strict=True):
        assert one.token_ids == other.token_ids and set(one.token_ids) <= set(allowed)
        # No end is among them.
        assert (one.finish_reason, len(one.token_ids)) == ("length", 32)


def test_a_grammar_and_bad_words_hold_together(ar: Engine, orthrus: Engine) -> None:
    prompt = [ar.tokenizer.encode("kind = ")]
    schema = {"enum": ["function", "class", "module"]}
    params = SamplingParams(temperature=0.0, max_tokens=60, grammar=json_grammar(schema))
    [[free]] = ar.generate(prompt, params)
    first = json.loads(ar.tokenizer.decode(free.token_ids, skip_special_tokens=True))
    params = replace(
        params, bad_words=(first, f'"{first}', f'"{first[:3]}', first[:2], first[:1], f'"{first[:1]}')
    )
    [[expected]], [[got]] = ar.generate(prompt, params), orthrus.generate(prompt, params)
    assert expected.token_ids == got.token_ids
    said = json.loads(ar.tokenizer.decode(got.token_ids, skip_special_tokens=True))
    assert said in schema["enum"] and said != first


def test_a_grammar_that_needs_forbidden_tokens_ends_with_an_error(ar: Engine, orthrus: Engine) -> None:
    for engine in (ar, orthrus):
        digits = engine.tokenizer.encode("7")
        params = SamplingParams(
            temperature=0.0,
            max_tokens=20,
            grammar='start: "["',
            allowed_token_ids=tuple(digits),
        )
        engine.submit(Request("dead-end", engine.tokenizer.encode("x"), params))
        chunks = []
        while engine.has_work:
            chunks += engine.step()
        assert chunks[-1].finish_reason == "error" and chunks[-1].error_param == "bad_words"
        assert "allow more" in str(chunks[-1].error)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"bad_words": ("a", " ")}, "bad_words"),
        ({"bad_words": ("a",) * 1025}, "bad_words"),
        ({"bad_words": ("a" * 20_000,)}, "bad_words"),
        ({"allowed_token_ids": ()}, "allowed_token_ids"),
        ({"allowed_token_ids": (-1,)}, "allowed_token_ids"),
        ({"allowed_token_ids": (1 << 40,)}, "allowed_token_ids"),
    ],
)
def test_what_can_not_be_served_is_refused(ar: Engine, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        ar.check(Request("refused", [1, 2], SamplingParams(**fields)))
    assert refused.value.param == param
