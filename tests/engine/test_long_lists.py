"""Long lists in a request's parameters: they are read when it begins, not in each of its passes, which other requests share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orthrus.engine import Engine
from orthrus.requests.request import Request, SamplingParams
from tests.engine.test_engine import engine


class Watched(dict[int, float]):
    """Counts how often it is walked through."""

    walks = 0

    def __iter__(self) -> Iterator[int]:
        type(self).walks += 1
        return super().__iter__()

    def values(self) -> Any:
        type(self).walks += 1
        return super().values()

    def items(self) -> Any:
        type(self).walks += 1
        return super().items()


@pytest.fixture(scope="module")
def ours(tiny_orthrus: Path) -> Engine:
    return engine(tiny_orthrus)


def test_biases_are_read_as_often_for_a_long_text_as_for_a_short_one(ours: Engine) -> None:
    walks = []
    for max_tokens in (2, 40):
        Watched.walks = 0
        bias = Watched(dict.fromkeys(range(60), -3.0))
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logit_bias=bias)
        ours.generate([[1, 2, 3]], params)
        walks.append(Watched.walks)
    assert walks[0] == walks[1]


def test_stop_tokens_that_come_too_early_are_listed_once_for_all_choices(ours: Engine) -> None:
    params = SamplingParams(n=3, min_tokens=4, stop_token_ids=(5, 3, 3, 999, -1), ignore_eos=True)
    request = Request("stops", [1], params)
    first, *others = ours._admission.sequences(request, ours.prepare(request))
    assert list(first.withheld_stop_ids) == [3, 5]
    assert all(choice.withheld_stop_ids is first.withheld_stop_ids for choice in others)
    assert memoryview(first.withheld_stop_ids).format == "q", "passes take it as it is"


def test_prompts_are_read_once_for_penalties(ours: Engine) -> None:
    request = Request("penalty", [7, 8, 9], SamplingParams(repetition_penalty=1.2))
    [sequence] = ours._admission.sequences(request, ours.prepare(request))
    assert sequence.prompt_ids is sequence.prompt_ids
    assert list(sequence.prompt_ids) == [7, 8, 9]
