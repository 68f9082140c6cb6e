"""The format "int4": its codes, its layers against float64, an LM head, and the kernel."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from orthrus.kernels.int4_sizes import GROUP, INT4_BYTES
from orthrus.kernels.leaves import Leaves
from orthrus.kernels.linear import Parameters, Split, pack_weight
from orthrus.kernels.linear.codes import LEVELS, Codes, pack_codes, round_to_codes
from orthrus.kernels.linear.fp8_block import round_blocks
from orthrus.kernels.linear.integers import round_to_integers
from orthrus.kernels.ranks import ONE_RANK
from tests.kernels.interpreted import assert_near, interpreted, randn

pack = partial(pack_weight, format="int4")


def projection(outs: int, ins: int, seed: int = 0) -> Parameters:
    return {"weight": randn(outs, ins, seed=seed) * 0.1, "bias": randn(outs, seed=seed + 100)}


def exact(inputs: Tensor, projections: list[Parameters]) -> Tensor:
    """The result of a layer with rounded weights, in float64. inputs: already rounded."""
    weights = [round_to_codes(p["weight"]).dequantised().double() for p in projections]
    return torch.cat(
        [inputs.double() @ w.T + p["bias"].double() for w, p in zip(weights, projections, strict=True)], 1
    )


def test_weights_become_the_nearest_of_16_values() -> None:
    weight = randn(1030, 256)  # More outputs than are rounded at once.
    weight[3, :GROUP] = 0.0
    rounded = round_to_codes(weight)
    levels = torch.tensor(LEVELS)
    assert torch.equal(levels.to(torch.float8_e4m3fn).float(), levels), "FP8 holds them"
    scales = rounded.scales.float().T.repeat_interleave(GROUP, 1)
    values = torch.cat([levels, -levels]) * scales[:, :, None]
    got = rounded.dequantised()
    assert torch.equal((got - weight).abs(), (values - weight[:, :, None]).abs().amin(2))
    assert float(got[3, :GROUP].abs().max()) < 1e-6


def test_normally_distributed_weights_lose_less_than_in_integers() -> None:
    weight = randn(256, 512)

    def error(rounded: Tensor) -> float:
        return float((rounded - weight).square().sum() / weight.square().sum())

    assert error(round_to_codes(weight).dequantised()) < 0.0087
    assert error(round_to_integers(weight, 4, GROUP).dequantised()) > 0.0135


def test_the_instructions_of_the_hopper_kernel_widen_packed_codes() -> None:
    """The instructions `prmt` and `lop3` of `grouped_hopper` are written out in Python."""
    codes = torch.randint(0, 16, (3, 256), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    table = list(torch.tensor(LEVELS).to(torch.float8_e4m3fn).view(torch.uint8).tolist())
    assert int.from_bytes(table[:4], "little") == 0x4A464033
    assert int.from_bytes(table[4:], "little") == 0x5552504D
    widened = torch.empty(3, 256, dtype=torch.uint8)
    for out, words in enumerate((pack_codes(codes).long() & 0xFFFFFFFF).tolist()):
        for number, word in enumerate(words):
            run, quarter = divmod(number, 4)
            for half, signs in ((0, word), (1, word << 4)):
                indices = (word & 0x77777777) >> 16 * half
                chosen = bytes(table[indices >> 4 * i & 15] for i in range(4))
                register = int.from_bytes(chosen, "little") | signs & 0x80808080
                begin = 32 * run + 16 * half + 4 * quarter
                widened[out, begin : begin + 4] = torch.tensor(list(register.to_bytes(4, "little")))
    scales = torch.ones(2, 3, dtype=torch.float16)
    assert torch.equal(widened.view(torch.float8_e4m3fn).float(), Codes(codes, scales).dequantised())


@pytest.mark.parametrize(
    "split", [None, Split(ONE_RANK, Leaves.whole(384, 128, 2))], ids=["whole", "in leaves"]
)
def test_a_layer_multiplies_rounded_weights_and_inputs(split: Split | None) -> None:
    one, x = projection(72, 384), randn(5, 384, seed=7) * torch.linspace(1, 9, 384)
    layer = pack([[dict(one)]], split=split)
    assert_near(layer.linear(x), exact(round_blocks(x), [one]))


def test_a_gated_layer_gives_silu_of_the_gate_times_up() -> None:
    both, x = [projection(72, 256, seed) for seed in (1, 2)], randn(5, 256, seed=7)
    gate, up = exact(round_blocks(x), both).chunk(2, 1)
    assert_near(pack([[dict(p) for p in both]], gated=True).linear_silu_mul(x), silu(gate) * up)


def test_a_head_is_kept_in_fp8() -> None:
    one, x = projection(300, 200), randn(5, 200, seed=7)
    for split in (None, Split(ONE_RANK)):
        fp8 = pack_weight([[dict(one)]], "fp8", head=True, split=split)
        assert torch.equal(pack([[dict(one)]], head=True, split=split).linear(x), fp8.linear(x))


def test_inputs_that_are_not_whole_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"200 inputs .* multiple of 128"):
        pack([[projection(72, 200)]])


@interpreted
@pytest.mark.parametrize("gated", [False, True])
def test_the_kernel_has_the_bytes_of_the_memory_plan_and_adds_no_bias_to_a_part(
    gated: bool,
) -> None:
    from orthrus.kernels.linear import grouped_triton
    from orthrus.kernels.linear.blocks_triton import quantise_inputs
    from orthrus.kernels.linear.grouped import code_layer

    both, x = [projection(72, 256, seed) for seed in (1, 2)], randn(5, 256, seed=7)
    bias = torch.cat([p["bias"] for p in both])
    codes = [round_to_codes(p["weight"]) for p in both]
    assert code_layer(codes, None, gated, None).nbytes == 144 * 256 * INT4_BYTES
    layer = code_layer(codes, bias, gated, None)
    numbers, scales = quantise_inputs(x)
    whole = exact(numbers.float() * scales[:, :5].T.repeat_interleave(GROUP, 1), both)
    if gated:
        gate, up = whole.chunk(2, 1)
        assert_near(layer.linear_silu_mul(x), silu(gate) * up)
        return
    assert_near(layer.linear(x), whole)
    part = torch.empty(1, 5, 144)
    grouped_triton.launch(numbers, layer, part, 1, x_scales=scales)
    assert_near(part[0], whole - bias.double())
