"""Sampling filters keep the same tokens on a GPU as on a CPU, also among equal logits."""

import itertools

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from orthrus.engine.logprobs import token_logprobs
from orthrus.kernels.rows.softmax import softmax
from tests.runner.test_sampling_filters import kept


def test_the_same_tokens_are_kept_as_on_a_cpu() -> None:
    logits = (torch.randn(8, 4000, generator=torch.Generator().manual_seed(0)) * 4).round() / 2
    for top_k, top_p in itertools.product((0, 1, 3, 50), (0.0, 0.3, 0.5, 0.9, 0.999, 1.0)):
        expected = kept(logits, top_k=top_k, top_p=top_p) > float("-inf")
        got = kept(logits.cuda(), top_k=top_k, top_p=top_p).cpu() > float("-inf")
        assert torch.equal(got.sum(-1), expected.sum(-1)), (top_k, top_p)
        assert torch.equal(got, expected), (top_k, top_p)


@pytest.mark.parametrize("vocab", [1021, 4001, 4002, 151669, 151936])
def test_a_row_has_the_same_logprobs_and_filters_alone_and_at_any_place(vocab: int) -> None:
    """Vocabularies that are no multiple of four leave rows at odd places of memory."""
    row = torch.randn(1, vocab, generator=torch.Generator().manual_seed(1)).cuda() * 3
    [alone] = token_logprobs(row, [7], 3)
    assert token_logprobs(row.expand(8, -1).contiguous(), [7] * 8, 3) == (alone,) * 8
    probabilities = softmax(row)
    assert torch.equal(softmax(row.expand(8, -1).contiguous()), probabilities.expand(8, -1))
