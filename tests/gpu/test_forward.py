"""The whole forward on a GPU, two layers of Qwen3-8B's shape with random weights: rows keep their bits in every plan."""

from itertools import pairwise

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from torch import Tensor

from orthrus.cache.kv_cache import KVCache
from orthrus.cache.plain_layer import PlainLayer
from orthrus.models.config import ModelConfig
from orthrus.models.families import family_of
from orthrus.models.forward import LayerParallelForward
from orthrus.plan import RowGroup, View
from orthrus.runner.cuda_graphs import CudaGraphRunner
from orthrus.runner.eager import EagerRunner
from orthrus.runner.protocol import ModelRunner, RunnerLimits

DEVICE = torch.device("cuda")
CONFIG = ModelConfig(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=12_288,
    num_hidden_layers=2,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    block_size=32,
    mask_token_id=31_999,
)
PAGE, LENGTH = 64, 640
PAGES = LENGTH // PAGE
"""Pages of a sequence."""


def weights(dtype: torch.dtype) -> dict[str, Tensor]:
    """Random matrices that keep the numbers of a row near 1, and norm weights of 1. They are the same numbers in every dtype."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def tensor(shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, device=DEVICE, dtype=dtype)
        values = torch.randn(shape, generator=generator, device=DEVICE) / shape[1] ** 0.5
        return values.bfloat16().to(dtype)

    return {name: tensor(shape) for name, shape in family_of(CONFIG).tensor_shapes(CONFIG).items()}


class Model:
    """A cache, and a runner of passes: with plain PyTorch in float64, else with the Triton kernels."""

    def __init__(self, dtype: torch.dtype) -> None:
        forward = LayerParallelForward(CONFIG, weights(dtype))
        forward.use_context(PAGES * PAGE)
        self.cache = KVCache.allocate(CONFIG, 1 + 4 * PAGES, PAGE, DEVICE, dtype)
        self._runner: ModelRunner
        if dtype == torch.float64:
            self._runner = EagerRunner(forward, self.cache)
        else:
            limits = RunnerLimits(LENGTH, LENGTH, max_pages=64 * PAGES)
            self._runner = CudaGraphRunner(forward, self.cache, limits)

    def run(self, *groups: RowGroup) -> Tensor:
        """Logits of all rows, in the order of the groups."""
        return self._runner.logits(groups)

    def keys(self, sequence: int) -> Tensor:
        """A copy of the keys in the sequence's pages: [layers, kv_heads, pages, page_size, head_dim]."""
        layers = [layer for layer in self.cache.layers if isinstance(layer, PlainLayer)]
        return torch.stack([layer.keys[:, pages_of(sequence)] for layer in layers])


def pages_of(sequence: int) -> list[int]:
    first = 1 + sequence * PAGES
    return list(range(first, first + PAGES))


def rows(tokens: list[int], start: int, count: int, sequence: int) -> RowGroup:
    return RowGroup(View.AR, tokens[start : start + count], start, pages_of(sequence), 0, count)


def draft(token: int, start: int, sequence: int) -> RowGroup:
    return RowGroup(View.DIFFUSION, [token, *[31_999] * 7], start, pages_of(sequence), 0, 8)


def test_logits_keep_their_bits_in_every_plan() -> None:
    tokens = torch.randint(31_000, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()
    model = Model(torch.bfloat16)
    expected = model.run(rows(tokens, 0, LENGTH, 0))
    keys = model.keys(0)

    # In chunks, together with the same sequence on other pages, and with a draft in the same pass.
    mixed = []
    for begin, end in pairwise([0, 3, 100, 500, 504, 520, LENGTH]):
        other = rows(tokens, begin, max(1, (end - begin) // 2), 1)
        mixed.append(model.run(rows(tokens, begin, end - begin, 2), other)[: end - begin])
        if end < LENGTH:
            step = rows(tokens, end, 1, 2)
            assert torch.equal(model.run(draft(tokens[end], end, 2), step)[8], expected[end]), end
    differing = (torch.cat(mixed) != expected).any(1).nonzero().flatten().tolist()
    assert not differing, f"rows {differing[:20]} of {len(differing)}"
    assert torch.equal(model.keys(2), keys)

    # Layers and LM head in separate graphs, since not all rows need logits.
    last = RowGroup(View.AR, tokens[:100], 0, pages_of(3), 99, 100)
    assert torch.equal(model.run(last, draft(tokens[100], 100, 3))[0], expected[99])

    # Passes that are launched one after the other without waiting.
    chunks = [model.run(rows(tokens, at, 32, 3)) for at in range(0, LENGTH, 32)]
    assert torch.equal(torch.cat(chunks), expected)

    # A row alone, and in 64 sequences at once.
    for position in (1, 127, 128, 129, 511, 639):
        alone = model.run(rows(tokens, position, 1, 0))
        assert torch.equal(alone[0], expected[position]), position
        company = model.run(*[rows(tokens, position, 1, 0) for _ in range(64)])
        assert torch.equal(company, expected[position].expand(64, -1)), position


def test_logits_are_near_float64() -> None:
    tokens = torch.randint(31_000, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    reference, model = Model(torch.float64), Model(torch.bfloat16)
    for group in (rows(tokens, 0, 64, 0), draft(tokens[0], 0, 1), draft(tokens[63], 63, 0)):
        exact, got = reference.run(group), model.run(group)
        assert ((got.double() - exact).norm() / exact.norm()).item() < 2e-2, group.view
