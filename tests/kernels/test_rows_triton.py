"""The Triton kernels that work row by row, in the interpreter, each against its plain PyTorch version."""

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from orthrus.kernels.rows import embedding_triton, qk_norm_rope_triton, sampling_triton, upload_triton
from orthrus.kernels.rows.embedding import embed
from orthrus.kernels.rows.qk_norm_rope import qk_norm_rope
from orthrus.kernels.rows.sampling import best_tokens, gumbel_argmax, gumbel_noise
from orthrus.kernels.rows.types import NO_TOKEN, KVWrites
from orthrus.kernels.rows.upload import upload
from tests.kernels.interpreted import DTYPES, assert_near, int32, interpreted, keys_of, randn

pytestmark = interpreted


@pytest.mark.parametrize("copy", [upload, upload_triton.upload])
@pytest.mark.parametrize("count", [1, 1024, 1500])
def test_upload_copies_all_and_nothing_else(copy: Callable[..., None], count: int) -> None:
    source, target = torch.arange(1, 2001, dtype=torch.int32), torch.zeros(2000, dtype=torch.int32)
    copy(source[:count], target[:count])
    assert torch.equal(target[:count], source[:count])
    assert not target[count:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed_matches_its_reference_and_takes_tokens_from_picks(dtype: torch.dtype) -> None:
    table, weight = randn(50, 40, dtype=dtype), randn(40, seed=1, dtype=dtype)
    cos, sin = randn(30, 6, seed=2, dtype=dtype), randn(30, 6, seed=3, dtype=dtype)
    tokens, positions, picks = int32(7, -1, 49, -3), int32(0, 29, 3, 3), int32(11, 12, 13)
    got = embedding_triton.embed(tokens, positions, picks, table, weight, 1e-6, cos, sin)
    exact = embed(tokens, positions, picks, table.double(), weight.double(), 1e-6, cos.double(), sin.double())
    assert torch.equal(got.hidden, table[[7, 11, 49, 13]])
    for name, value in vars(got).items():
        assert_near(value, getattr(exact, name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_ar", [0, 2, 3])
@pytest.mark.parametrize("views", [0, 1, 2])
def test_qk_norm_rope_matches_its_reference_and_writes_the_cache(
    views: int, num_ar: int, dtype: torch.dtype
) -> None:
    rows, heads, kv_heads, dim = 3, 4, 2, 16
    qkv = randn(rows, heads + 2 * kv_heads, dim, dtype=dtype)
    weights = randn(2, heads + kv_heads, dim, seed=1, dtype=dtype)
    weights[views:] = float("nan")  # The memory behind the weights must not be read.
    weight = weights[:views] if views else None
    cos, sin = randn(rows, 1, dim // 2, seed=2, dtype=dtype), randn(rows, 1, dim // 2, seed=3, dtype=dtype)
    cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    # The second row writes to three slots.
    writes = KVWrites(int32(7, 0, 33), int32(0, 2, 2), int32(8, 39))
    caches = [torch.zeros(kv_heads, 40, dim, dtype=dtype) for _ in range(2)]
    exact = [cache.double() for cache in caches]
    qkv[0, -1, 3] = float("inf")
    got, wide = qkv.clone(), qkv.nan_to_num(posinf=0.0).double()
    split = int32(num_ar)
    qk_norm_rope_triton.qk_norm_rope(got, weight, cos, sin, 1e-6, split, writes, caches[0], caches[1])
    widened = None if weight is None else weight.double()
    qk_norm_rope(wide, widened, cos.double(), sin.double(), 1e-6, split, writes, exact[0], exact[1])
    assert_near(got, wide)
    for cache, other in zip(caches, exact, strict=True):
        if num_ar:
            assert_near(cache, other)
        assert torch.equal(cache == 0, other == 0)


def test_gumbel_noise_matches_that_of_the_cpu() -> None:
    keys = keys_of([5, 5, 2**63 - 1], [9, 10, 0])
    got, expected = sampling_triton.gumbel_noise(keys, 3000), gumbel_noise(keys, 3000)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=5e-6)


def test_gumbel_argmax_matches_its_reference() -> None:
    """Greedy rows, sampled rows, equal logits, a vocabulary that no block divides, and picks in the middle of their tensor."""
    logits = randn(4, 9000) * 3
    logits[1, [40, 8999]] = 50.0
    temperatures, keys = torch.tensor([0.0, 0.0, 0.7, 1.3]), keys_of([1, 2, 3, 4], [5, 6, 7, 8])
    got, expected = torch.zeros(9, dtype=torch.int32), torch.zeros(9, dtype=torch.int32)
    sampling_triton.gumbel_argmax(logits, temperatures, keys, got, int32(3))
    gumbel_argmax(logits, temperatures, keys, expected, int32(3))
    assert torch.equal(got, expected)
    assert got[4] == 40
    assert not got[:3].any() and not got[7:].any()


@pytest.mark.parametrize("vocab", [200, 9000])
def test_best_tokens_match_their_reference(vocab: int) -> None:
    """Also if several of them are in one block of tokens, and if a row has fewer."""
    logits = randn(5, vocab) * 3
    logits[0, 130:134] = torch.tensor([50.0, 52.0, 51.0, 53.0])
    logits[1, 2:] = float("-inf")
    temperatures, keys = torch.tensor([0.0, 0.0, 0.7, 1.3, 0.0]), keys_of([1, 2, 3, 4, 5], [5, 6, 7, 8, 9])
    got = sampling_triton.best_tokens(logits, temperatures, keys, 4)
    assert torch.equal(got, best_tokens(logits, temperatures, keys, 4))
    assert got[0].tolist() == [133, 131, 132, 130]
    assert got[1, 2:].tolist() == [NO_TOKEN, NO_TOKEN]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_with_nan_or_infinity_has_no_pick(bad: float) -> None:
    logits = randn(4, 9000) * 3
    logits[2, :] = float("-inf")
    temperatures, keys = torch.tensor([0.0, 0.7, 0.0, 0.7]), keys_of([1, 2, 3, 4], [5, 6, 7, 8])
    good = torch.zeros(4, dtype=torch.int32)
    gumbel_argmax(logits, temperatures, keys, good, int32(0))
    assert good.min() >= 0
    for place in (0, 4095, 8999):
        for rows in ([0], [1], [0, 1]):
            broken = logits.clone()
            broken[rows, place] = bad
            got, expected = torch.zeros(4, dtype=torch.int32), good.clone()
            expected[rows] = NO_TOKEN
            for pick in (sampling_triton.gumbel_argmax, gumbel_argmax):
                pick(broken, temperatures, keys, got.zero_(), int32(0))
                assert torch.equal(got, expected), (place, rows)


def test_a_row_without_a_pick_embeds_a_token() -> None:
    tokens, picks = int32(-1, -2, 5), int32(NO_TOKEN, 3)
    table, angles = randn(8, 32), torch.zeros(1, 8)
    for embedding in (embedding_triton.embed, embed):
        rows = embedding(tokens, torch.zeros_like(tokens), picks, table, torch.ones(32), 1e-6, angles, angles)
        assert torch.equal(rows.hidden, table[[0, 3, 5]])
