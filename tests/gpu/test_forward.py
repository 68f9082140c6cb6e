"""The whole forward on a GPU, two layers of Qwen3-8B's shape with random weights: rows keep their bits in every plan."""

from itertools import pairwise

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from torch import Tensor

from orthrus.checkpoint import tensor_shapes
from orthrus.config import ModelConfig
from orthrus.forward import LayerParallelForward
from orthrus.kv_cache import KVCache
from orthrus.plan import PassPlan, RowGroup, View

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
PAGE, LENGTH = 16, 640


def weights(dtype: torch.dtype) -> dict[str, Tensor]:
    """Matrices that keep a row's size about one, and norms of one, the same numbers in every dtype."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def tensor(shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, device=DEVICE, dtype=dtype)
        values = torch.randn(shape, generator=generator, device=DEVICE) / shape[1] ** 0.5
        return values.bfloat16().to(dtype)

    return {name: tensor(shape) for name, shape in tensor_shapes(CONFIG).items()}


class Model:
    """A forward and a cache, fed with groups."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._forward = LayerParallelForward(CONFIG, weights(dtype))
        self.cache = KVCache.allocate(CONFIG, 200, PAGE, DEVICE, dtype)

    def run(self, *groups: RowGroup) -> Tensor:
        plan = PassPlan.build(groups, page_size=PAGE, heads_per_kv=4, device=DEVICE)
        return self._forward(plan, self.cache)


def rows(tokens: list[int], start: int, count: int, first_page: int, view: View = View.AR) -> RowGroup:
    pages = range(first_page, first_page + 45)
    return RowGroup(view, tokens[start : start + count], start, pages, 0, count)


def test_logits_keep_their_bits_in_every_plan() -> None:
    tokens = torch.randint(31_000, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()
    model = Model(torch.bfloat16)
    expected = model.run(rows(tokens, 0, LENGTH, 1))
    keys = model.cache.keys[:, :, 1:41].clone()

    # In chunks, beside the same sequence on other pages, with a draft in the same pass.
    cut = [0, 3, 100, 500, 504, 520, LENGTH]
    mixed = []
    for begin, end in pairwise(cut):
        other = rows(tokens, begin, max(1, (end - begin) // 2), 60)
        logits = model.run(rows(tokens, begin, end - begin, 110), other)
        mixed.append(logits[: end - begin])
        if end < LENGTH:
            block = rows([*tokens[end : end + 1], *[31_999] * 7], 0, 8, 110)
            block = RowGroup(View.DIFFUSION, block.tokens, end, block.pages, 0, 8)
            step = RowGroup(View.AR, tokens[end : end + 1], end, rows(tokens, 0, 1, 110).pages, 0, 1)
            assert torch.equal(model.run(block, step)[8], expected[end]), f"beside a draft at {end}"
    differing = (torch.cat(mixed) != expected).any(1).nonzero().flatten().tolist()
    assert not differing, f"rows {differing[:20]} of {len(differing)}"
    assert torch.equal(model.cache.keys[:, :, 110:150], keys)

    # One by one, many sequences at once.
    for position in (1, 255, 256, 257, 511, 639):
        alone = model.run(rows(tokens, position, 1, 1))
        assert torch.equal(alone[0], expected[position]), position
        company = model.run(*[rows(tokens, position, 1, 1) for _ in range(64)])
        assert torch.equal(company, expected[position].expand(64, -1)), position


def test_logits_are_near_float64() -> None:
    tokens = torch.randint(31_000, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    exact = Model(torch.float64).run(rows(tokens, 0, 64, 1))
    got = Model(torch.bfloat16).run(rows(tokens, 0, 64, 1))
    assert ((got.double() - exact).norm() / exact.norm()).item() < 2e-2
    draft = [RowGroup(View.DIFFUSION, [tokens[0], *[31_999] * 7], 0, list(range(1, 46)), 0, 8)]
    exact, got = Model(torch.float64).run(*draft), Model(torch.bfloat16).run(*draft)
    assert ((got.double() - exact).norm() / exact.norm()).item() < 2e-2
