"""Packing bfloat16 weights in 12 bits: unpacking gives every bit of them, or packing is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from orthrus.kernels.linear.lossless import (
    EXPONENT,
    LEAST_BASE,
    MOST_BASE,
    MOST_EXCEPTIONS,
    NotPacked,
    high_bytes,
    pack_lossless,
    unpack_lossless,
)
from orthrus.kernels.linear.types import DenseLayer, LosslessLayer
from tests.kernels.interpreted import randn

MODEL = Path(__file__).parents[2] / "models" / "orthrus-tiny"


def trained(outs: int, ins: int, seed: int = 0) -> Tensor:
    """Weights like those of a trained layer: normally distributed, with a different standard deviation for each output."""
    return (randn(outs, ins, seed=seed) * torch.logspace(-2, 0, outs)[:, None]).bfloat16()


def pack(*weights: Tensor) -> LosslessLayer:
    return pack_lossless(DenseLayer(torch.stack(weights).unbind()))


def assert_round_trip(*weights: Tensor) -> LosslessLayer:
    packed = pack(*weights)
    for found, weight in zip(unpack_lossless(packed).weights, weights, strict=True):
        assert torch.equal(found.view(torch.int16), weight.view(torch.int16))
    return packed


def can_be_kept(bits: int, base: int) -> bool:
    """Whether a row with this base can hold the bfloat16 number with these bits: from the definition, number by number."""
    exponent, mantissa = bits >> 7 & 255, bits & 127
    if exponent == 255:
        return False
    if base <= exponent < base + 15 or (exponent, mantissa) == (0, 0):
        return True
    if exponent == 0:  # Subnormal: the exponent that it would have as a normal number.
        exponent = mantissa.bit_length() - 7
    return 1 <= exponent + EXPONENT - base <= 254


@pytest.mark.parametrize("base", [LEAST_BASE, 105, MOST_BASE])
def test_every_bit_pattern_is_kept_or_refused(base: int) -> None:
    generator = torch.Generator().manual_seed(base)
    kept = [bits for bits in range(1 << 16) if can_be_kept(bits, base)]
    assert len(kept) > 49_000
    tiles = -(-len(kept) // (MOST_EXCEPTIONS))
    # Both ends of the window are in each row, so no other window has as few exceptions.
    exponents = torch.randint(base, base + 15, (64, tiles, 128), generator=generator)
    exponents[..., 64:80], exponents[..., 80:96] = base, base + 14
    weight = exponents << 7 | torch.randint(0, 128, exponents.shape, generator=generator)
    weight |= torch.randint(0, 2, exponents.shape, generator=generator) << 15
    window = weight[:, :1].clone()
    number = torch.arange(len(kept))
    row = torch.randint(0, 64, number.shape, generator=generator)
    weight[row, number // (MOST_EXCEPTIONS), number % (MOST_EXCEPTIONS)] = torch.tensor(kept)
    packed = assert_round_trip(weight.flatten(1).short().view(torch.bfloat16))
    assert torch.equal(packed.scales, torch.full((1, 64), 2.0 ** (base - EXPONENT)))
    refused = sorted(set(range(1 << 16)) - set(kept))
    for bits in refused[:: max(1, len(refused) // 40)]:
        bad = window.clone()
        bad[3, 0, 5] = bits
        with pytest.raises(NotPacked, match=r"too small or too large|NaN or infinite"):
            pack(bad.flatten(1).short().view(torch.bfloat16))


@pytest.mark.parametrize("views", [1, 2])
def test_typical_weights_take_three_quarters_of_the_bytes(views: int) -> None:
    weights = [trained(1088, 384, seed) for seed in range(views)]
    packed = assert_round_trip(*weights)
    assert packed.outs == 1088 and packed.scales.shape == (views, 1088)
    assert packed.tensor_bytes < 0.77 * sum(weight.nbytes for weight in weights)
    assert 0 < int(packed.exceptions[..., 0].sum()) < 1e-3 * packed.high.numel() * 4


def test_the_weights_of_a_trained_model_are_kept() -> None:
    weights = [tensor for file in MODEL.glob("model-*.safetensors") for tensor in load_file(file).values()]
    layers = [w for w in weights if w.dim() == 2 and w.shape[0] % 64 == 0 and w.shape[1] % 128 == 0]
    assert len(layers) == 1 + 10 * 11
    for weight in layers:
        assert_round_trip(weight)


def test_words_and_lists_have_the_layout_that_kernels_read() -> None:
    weight = trained(128, 256, seed=5)
    weight[70, 200], weight[65, 130], weight[1, 2] = 0.0, -3e4, 1e-30
    packed = assert_round_trip(weight)
    bits = weight.view(torch.int16).int() & 0xFFFF
    for row in (0, 70, 127):
        base = EXPONENT + int(packed.scales[0, row].log2())
        for i in (16, 21, 27, 31, 255):
            if not base <= int(bits[row, i]) >> 7 & 255 < base + 15:
                continue
            q, neighbour, eighth = i % 8 // 2, i % 2, i // 8 % 2
            byte = int(packed.high[row, i // 16 * 4 + q]) >> (8 - 8 * eighth + 16 * neighbour) & 255
            nibble = int(packed.low[row, i // 32 * 4 + q]) >> (4 * (i // 8 % 4) + 16 * neighbour) & 15
            widened = byte >> 7 << 15 | (0x3800 + ((byte & 0x78) << 4)) | (byte & 7) << 4 | nibble
            value = torch.tensor(widened).to(torch.int32).short().view(torch.bfloat16)
            assert float(value * packed.scales[0, row]) == float(weight[row, i])
    scale = float(packed.scales[0, 70])
    lists = packed.exceptions[1, 1]
    found = {int(entry) & 0xFFFF: int(entry) >> 16 & 0xFFFF for entry in lists[1 : 1 + int(lists[0])]}
    assert found[6 * 128 + 72] == 0 and bool((lists[1 + int(lists[0]) :] == 0).all())
    assert list(found) == sorted(found)
    assert scale == 2.0 ** int(torch.tensor(scale).log2())


def test_the_first_plane_alone_is_an_e4m3_number_near_the_weight() -> None:
    weight = trained(64, 256)
    packed = pack(weight)
    near = high_bytes(packed.high).view(torch.float8_e4m3fn).float() * 2.0**-8 * packed.scales[0][:, None]
    assert not bool(near.isnan().any())
    assert float((near - weight.float()).norm() / weight.float().norm()) < 0.05


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w[:63], "64 must divide its outputs"),
        (lambda w: w[:, :64], "128 its inputs"),
        (lambda w: w.float(), "not bfloat16"),
        (lambda w: w.index_fill(0, torch.tensor([9]), 0.0), "128 of the 8192 weights of a tile"),
        (lambda w: w.index_fill(1, torch.tensor([9]), 0.0), "64 of the 8192 weights of a tile"),
        (lambda w: w.index_fill(1, torch.tensor([9]), float("inf")), "NaN or infinite"),
        (lambda w: w.index_fill(1, torch.tensor([9]), float("nan")), "NaN or infinite"),
        (lambda w: w * 1e-30, "outside the 15 exponents"),
        (lambda w: w * 1e30, "outside the 15 exponents"),
    ],
)
def test_weights_that_can_not_be_packed_are_refused_with_a_reason(
    change: Callable[[Tensor], Tensor], words: str
) -> None:
    with pytest.raises(NotPacked, match=words):
        pack(change(trained(64, 256)))
