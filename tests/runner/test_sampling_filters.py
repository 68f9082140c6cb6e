"""Top-k and top-p against Hugging Face's processors: as many tokens are kept, and as likely ones, inside ties too."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from orthrus.requests.request import SamplingParams
from orthrus.runner.sampler import PickRows, adjust


def kept(logits: Tensor, **filters: Any) -> Tensor:
    """The logits [rows, vocab] of what is kept, the rest -inf."""
    params = SamplingParams(**filters)
    return adjust(logits, [PickRows(params, seed=0, position=1, count=logits.shape[0])])


def kept_there(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    scores = logits / temperature
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1.0:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return logits.masked_fill(scores == float("-inf"), float("-inf"))


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("vocab", [5, 12, 60, 500])
def test_as_many_and_as_likely_tokens_are_kept(vocab: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(vocab)
    for _ in range(10):
        logits = torch.randn(3, vocab, generator=generator) * 2
        if ties:
            logits = (logits * 2).round() / 2
        for top_k, top_p in itertools.product((0, 1, 2, 3, 7), (0.0, 0.1, 0.3, 0.5, 0.77, 0.9, 0.999)):
            got = kept(logits, temperature=0.7, top_k=top_k, top_p=top_p)
            expected = kept_there(logits, 0.7, top_k, top_p)
            assert torch.equal(got.sort(-1).values, expected.sort(-1).values), (top_k, top_p)
            # A row's are the same alone.
            assert torch.equal(kept(logits[1:2], temperature=0.7, top_k=top_k, top_p=top_p), got[1:2])


def test_of_equals_those_with_the_lowest_ids_are_kept() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.4, 0.1, 0.2], [0.2, 0.2, 0.2, 0.2, 0.2]]).log()
    none = float("-inf")
    for top_p, expected in (
        (0.0, [[none, none, 0.4, none, none], [0.2, none, none, none, none]]),
        (0.5, [[none, 0.2, 0.4, none, none], [0.2, 0.2, 0.2, none, none]]),
        (0.65, [[none, 0.2, 0.4, none, 0.2], [0.2, 0.2, 0.2, 0.2, none]]),
    ):
        result = kept(logits, top_p=top_p)
        assert torch.equal(result > none, torch.tensor(expected) > none), top_p
    # Top-k keeps what equals its last, and top-p shares out among all of these.
    assert (kept(logits, top_k=2) > none).tolist()[0] == [False, True, True, False, True]
    assert (kept(logits, top_k=2, top_p=0.6) > none).tolist()[0] == [False, True, True, False, False]
    assert (kept(logits, top_k=2, top_p=0.8) > none).tolist()[0] == [False, True, True, False, True]
    assert (kept(logits, top_k=2, top_p=0.7) > none).tolist()[1] == [True, True, True, True, False]


def test_a_score_that_is_no_number_stays_one() -> None:
    logits = torch.randn(3, 40)
    logits[1, 7] = float("nan")
    result = kept(logits, top_k=5, top_p=0.9)
    assert result[1, 7].isnan()
    assert torch.equal(result[0], kept(logits[:1], top_k=5, top_p=0.9)[0])
