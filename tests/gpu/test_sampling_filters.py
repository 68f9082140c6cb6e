"""Sampling filters keep the same tokens on a GPU as on a CPU, also among equal logits."""

import itertools

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from tests.runner.test_sampling_filters import kept


def test_the_same_tokens_are_kept_as_on_a_cpu() -> None:
    logits = (torch.randn(8, 4000, generator=torch.Generator().manual_seed(0)) * 4).round() / 2
    for top_k, top_p in itertools.product((0, 1, 3, 50), (0.0, 0.3, 0.5, 0.9, 0.999, 1.0)):
        expected = kept(logits, top_k=top_k, top_p=top_p) > float("-inf")
        got = kept(logits.cuda(), top_k=top_k, top_p=top_p).cpu() > float("-inf")
        assert torch.equal(got.sum(-1), expected.sum(-1)), (top_k, top_p)
        assert torch.equal(got, expected), (top_k, top_p)
