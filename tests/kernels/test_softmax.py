"""Softmax over a vocabulary: what PyTorch is given to sum lies alike for every row."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from orthrus.engine.logprobs import prompt_logprobs, token_logprobs
from orthrus.kernels.rows.softmax import log_softmax, softmax
from tests.runner.test_sampling_filters import kept


@pytest.mark.parametrize("vocab", [5, 8, 61, 4001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_those_of_pytorch(vocab: int, dtype: torch.dtype) -> None:
    logits = torch.randn(3, vocab, dtype=dtype, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(log_softmax(logits), logits.log_softmax(-1))
    torch.testing.assert_close(softmax(logits), logits.softmax(-1))


@pytest.mark.parametrize("vocab", [61, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_row_that_is_summed_begins_at_a_multiple_of_16_bytes(
    vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, the order of a row's sum depends on where the row begins."""
    summed: list[int] = []

    def watched(method: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, int], Tensor]:
        def watch(self: Tensor, dim: int) -> Tensor:
            summed.extend(self[row].data_ptr() % 16 for row in range(len(self)))
            return method(self, dim)

        return watch

    for name in ("log_softmax", "softmax"):
        monkeypatch.setattr(Tensor, name, watched(getattr(Tensor, name)))
    logits = torch.randn(5, vocab, dtype=dtype, generator=torch.Generator().manual_seed(0))
    token_logprobs(logits, [1, 2, 3, 4, 5], 2)
    prompt_logprobs(logits, [1, 2, 3, 4, 5], 2)
    kept(logits, min_p=0.1)
    assert summed == [0] * 15
