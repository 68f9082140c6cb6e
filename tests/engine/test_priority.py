"""Priority decides which sequences wait and which are preempted. A salt decides which share the cache. Neither changes a text."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orthrus.engine import Engine
from orthrus.engine.config import EngineConfig
from orthrus.errors import RequestError
from orthrus.requests.request import Request, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


def engine(path: Path, schedule: str = "orthrus", **settings: Any) -> Engine:
    fixed = {"model": str(path), "schedule": schedule, "adaptive_draft": False}
    return Engine.from_pretrained(EngineConfig.model_validate(fixed | settings))


def run(ours: Engine, requests: list[Request]) -> tuple[list[str], dict[tuple[str, int], tuple[int, ...]]]:
    """The requests' ids in the order in which their choices ended, and the tokens of each choice."""
    for request in requests:
        ours.submit(request)
    ended: list[str] = []
    tokens: dict[tuple[str, int], tuple[int, ...]] = defaultdict(tuple)
    while ours.has_work:
        for chunk in ours.step():
            tokens[chunk.request_id, chunk.index] += chunk.token_ids
            if chunk.finish_reason is not None:
                ended.append(chunk.request_id)
    return ended, tokens


def prompt(number: int, length: int = 20) -> list[int]:
    return [(7 * number + i) % 120 for i in range(length)]


def test_the_lowest_priority_number_goes_first_and_equals_in_order_of_arrival(tiny_orthrus: Path) -> None:
    ours, ar = engine(tiny_orthrus, max_num_seqs=1), engine(tiny_orthrus, "ar")
    priorities = {"a": 3, "b": 0, "c": -2, "d": 0, "e": 3, "f": -(1 << 31)}
    requests = [
        Request(name, prompt(i), replace(GREEDY, n=2 if name == "b" else 1), priority=priority)
        for i, (name, priority) in enumerate(priorities.items())
    ]
    ended, tokens = run(ours, requests)
    assert ended == ["f", "c", "b", "b", "d", "a", "e"]
    assert ours.stats.tokens_per_cycle > 1.1
    for request in requests:
        _, alone = run(ar, [replace(request, priority=0)])
        assert {choice: tokens[choice] for choice in alone} == alone


def test_the_sequence_with_the_highest_priority_number_is_preempted(tiny_orthrus: Path) -> None:
    """Two sequences whose pages don't fit together: the one with the higher number is preempted, or the later one of equals."""
    ar = engine(tiny_orthrus, "ar")
    params = replace(GREEDY, max_tokens=60)
    for first, second, ends_first in ((0, 0, "first"), (1, 0, "second"), (0, 1, "first")):
        tight = engine(tiny_orthrus, page_size=8, max_model_len=96, kv_cache_tokens=128)
        requests = [
            Request("first", prompt(1), params, priority=first),
            Request("second", prompt(2), params, priority=second),
        ]
        ended, tokens = run(tight, requests)
        assert tight.stats.preemptions > 0
        assert ended[0] == ends_first
        assert tokens == run(ar, requests)[1]


def test_only_equal_salts_share_the_cache(tiny_orthrus: Path) -> None:
    ours = engine(tiny_orthrus, page_size=16)
    text = prompt(3, 64)
    cached: dict[str, list[int]] = {}
    texts = set()
    for turn, salt in enumerate(["", "mine", "", "mine", "yours", "\ud800"]):
        [sequence] = [Request(f"{turn}", text, GREEDY, cache_salt=salt)]
        ours.submit(sequence)
        chunks = []
        while ours.has_work:
            chunks += ours.step()
        assert chunks[-1].stats is not None
        cached.setdefault(salt, []).append(chunks[-1].stats.cached_tokens)
        texts.add(tuple(token for chunk in chunks for token in chunk.token_ids))
    assert cached == {"": [0, 48], "mine": [0, 48], "yours": [0], "\ud800": [0]}
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("fields", "param"), [({"priority": 1 << 40}, "priority"), ({"cache_salt": "x" * 1025}, "cache_salt")]
)
def test_what_is_out_of_range_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        Request("r", [1], **fields)
    assert refused.value.param == param
