"""The memory of the KV cache: its formats, their size, and copies of pages."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from orthrus.cache.kv_cache import KVCache
from orthrus.cache.kv_format import KVLayer
from orthrus.cache.kv_formats import KV_FORMATS, kv_bytes_per_token
from orthrus.cache.plain import PlainKVFormat
from orthrus.cache.plain_layer import PlainLayer
from orthrus.kernels.attention import AttentionPlan
from orthrus.kernels.rounding import Rounding
from orthrus.kernels.rows.types import KVWrites
from orthrus.models.checkpoint import load_weights
from orthrus.models.config import ModelConfig
from orthrus.models.families import load_config
from orthrus.models.forward import LayerParallelForward
from orthrus.plan import RowGroup, View
from orthrus.runner.eager import EagerRunner

CPU = torch.device("cpu")
PAGE = 4


class NegatedLayer(PlainLayer):
    """Stores values with the opposite sign, and attention turns it back. So no bit of the result changes.

    For a CPU only: it reads `num_ar` and other numbers on the host, which a captured CUDA graph does not allow.
    """

    def write(
        self,
        qkv: Tensor,
        qk_norm: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        eps: float,
        num_ar: Tensor,
        writes: KVWrites,
    ) -> None:
        super().write(qkv, qk_norm, cos, sin, eps, num_ar, writes)
        further = int(writes.more_ends[-1]) if len(writes.more_ends) else 0
        written = torch.cat([writes.slots[: int(num_ar)], writes.more_slots[:further]])
        self.slots[1][:, written] *= -1

    def attend(
        self, qkv: Tensor, attention: AttentionPlan, scale: float, rounding: Rounding | None = None
    ) -> Tensor:
        return PlainLayer(self.keys, -self.values).attend(qkv, attention, scale, rounding)


class NegatedFormat(PlainKVFormat):
    def allocate(
        self, config: ModelConfig, num_pages: int, page_size: int, device: torch.device, dtype: torch.dtype
    ) -> list[KVLayer]:
        plain = super().allocate(config, num_pages, page_size, device, dtype)
        return [NegatedLayer(layer.keys, layer.values) for layer in plain if isinstance(layer, PlainLayer)]


@pytest.fixture
def forward(tiny_orthrus: Path) -> LayerParallelForward:
    config = load_config(tiny_orthrus)
    forward = LayerParallelForward(
        config, load_weights(tiny_orthrus, config, device=CPU, dtype=torch.float32)
    )
    forward.use_context(64)
    return forward


def allocate(forward: LayerParallelForward, kv_format: str = "plain") -> KVCache:
    return KVCache.allocate(forward.config, 12, PAGE, CPU, torch.float32, kv_format)


def passes(forward: LayerParallelForward, cache: KVCache) -> Tensor:
    """Logits of a prompt, of a block and an AR step after it, and of two continuations that share a row."""
    runner, table, mask = EagerRunner(forward, cache), [3, 1, 4], forward.config.mask_token_id or 0
    prompt = runner.logits([RowGroup(View.AR, list(range(9)), 0, table, 0, 9)])
    step = RowGroup(View.AR, [9], 9, table, 0, 1)
    block = RowGroup(View.DIFFUSION, [9, mask, mask], 9, table, 0, 3)
    both = runner.logits([step, block])
    # The second continuation has a page of its own. The shared row is written to it too, and earlier rows are copied to it.
    run = RowGroup(View.AR, [10, 11], 10, table, 0, 2)
    branch = RowGroup(View.AR, [12], 11, [*table[:2], 5], 0, 1, parent=run)
    return torch.cat([prompt, both, runner.logits([run, branch])])


def test_a_format_is_a_class_for_a_layer_and_one_entry(
    forward: LayerParallelForward, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KV_FORMATS, "negated", f"{__name__}:{NegatedFormat.__name__}")
    plain, negated = allocate(forward), allocate(forward, "negated")
    assert torch.equal(passes(forward, negated), passes(forward, plain))
    for layer, other in zip(negated.layers, plain.layers, strict=True):
        assert isinstance(layer, NegatedLayer) and isinstance(other, PlainLayer)
        assert layer.values.any()
        assert torch.equal(layer.values, -other.values)


def test_the_cache_takes_as_much_memory_as_it_is_said_to(forward: LayerParallelForward) -> None:
    assert allocate(forward).nbytes == 12 * PAGE * kv_bytes_per_token(forward.config, 4)


def test_copying_pages_leaves_all_others_alone(forward: LayerParallelForward) -> None:
    cache = allocate(forward)
    for layer in cache.layers:
        assert isinstance(layer, PlainLayer)
        for tensor in (layer.keys, layer.values):
            tensor.copy_(torch.rand(tensor.shape))
    before = [layer.keys.clone() for layer in cache.layers if isinstance(layer, PlainLayer)]
    cache.copy_pages(torch.tensor([3, 7, PAGE, 5, 2, 1, 9, 9, 9], dtype=torch.int32), 2)
    source = {7: (3, PAGE), 2: (5, 1)}
    for layer, keys in zip(cache.layers, before, strict=True):
        assert isinstance(layer, PlainLayer)
        for page in range(12):
            copied, count = source.get(page, (page, PAGE))
            assert torch.equal(layer.keys[:, page, :count], keys[:, copied, :count]), page
            assert torch.equal(layer.keys[:, page, count:], keys[:, page, count:]), page
