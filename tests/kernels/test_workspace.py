"""Layers whose results overwrite those of the previous layer, as in a captured pass. Kernels run in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from orthrus.kernels.linear.gpu import TritonWeight
from orthrus.kernels.workspace import BYTES, empty, results_in, scratch, start_layer

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton compiles here: tests/gpu checks the kernels"
)

CPU = torch.device("cpu")


def inside(tensor: Tensor, memory: Tensor) -> bool:
    offset = tensor.data_ptr() - memory.data_ptr()
    return 0 <= offset <= memory.numel() - tensor.nbytes


def test_every_layer_allocates_its_results_in_order_from_the_start() -> None:
    memory = torch.empty(4096, dtype=torch.uint8)
    with results_in(memory):
        first, second = (empty((3, 50), torch.float32, CPU) for _ in range(2))
        assert first.data_ptr() == memory.data_ptr()
        # 600 bytes, and the next one at a multiple of 256.
        assert second.data_ptr() - first.data_ptr() == 768
        large, small = empty((1, 700), torch.float32, CPU), empty((8,), torch.float16, CPU)
        assert not inside(large, memory), "too large for what is left"
        assert inside(small, memory) and small.dtype == torch.float16
        start_layer()
        assert empty((3, 50), torch.float32, CPU).data_ptr() == first.data_ptr()
    start_layer()
    assert not inside(empty((3,), torch.float32, CPU), memory)


def test_scratch_memory_is_the_same_for_every_call_and_lies_behind_the_results() -> None:
    memory = torch.empty(BYTES + 4096, dtype=torch.uint8)
    with results_in(memory):
        result = empty((BYTES - 256,), torch.uint8, CPU)
        first, second = (scratch((8, 16), torch.float32, CPU) for _ in range(2))
        assert first.data_ptr() == second.data_ptr() == memory.data_ptr() + BYTES
        assert inside(result, memory) and not inside(empty((512,), torch.uint8, CPU), memory)
        assert not inside(scratch((8, 129), torch.float32, CPU), memory), "too large"
    assert not inside(scratch((8, 16), torch.float32, CPU), memory)


@pytest.mark.parametrize("bytes", [16, 1500, 1 << 16])
def test_layers_whose_results_share_memory_compute_the_same(bytes: int) -> None:
    """With room for none, for some, and for all of a layer's results."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    layers = [
        (TritonWeight((randn(48, 32),), interleaved=True), TritonWeight((randn(32, 24),))) for _ in range(3)
    ]
    start, norm = randn(5, 32), torch.ones(32)

    results: list[tuple[Tensor, ...]] = []

    def run() -> Tensor:
        hidden, normed = start, start
        results.clear()
        for gated, down in layers:
            start_layer()
            inner = gated.linear_silu_mul(normed)
            hidden, normed = down.linear_add_rms_norm(inner, hidden, norm, 1e-6)
            results.append((inner, hidden, normed))
        return normed.clone()

    expected, memory = run(), torch.empty(bytes, dtype=torch.uint8)
    with results_in(memory):
        assert torch.equal(run(), expected)
    places = [[(inside(result, memory), result.data_ptr()) for result in layer] for layer in results]
    assert sum(kept for kept, _ in places[0]) == {16: 0, 1500: 1, 1 << 16: 3}[bytes]
    if bytes == 1 << 16:
        assert places[0] == places[1] == places[2]
