"""The formats "int4" and "fp8+int4": codes, their packing, and layers against float64."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from orthrus.kernels.int4_sizes import GROUP, INT4_BYTES
from orthrus.kernels.leaves import Leaves
from orthrus.kernels.linear import Parameters, Split, Weight, pack_weight
from orthrus.kernels.linear.by_rows import MOST_ROWS
from orthrus.kernels.linear.codes import Codes, pack_codes, pack_tables, round_to_codes
from orthrus.kernels.linear.fp8 import UNSCALED
from orthrus.kernels.linear.integers import round_to_integers
from orthrus.kernels.ranks import ONE_RANK
from orthrus.kernels.rounding import rounded
from tests.kernels.interpreted import assert_near, interpreted, randn

pack = partial(pack_weight, format="int4")


def projection(outs: int, ins: int, seed: int = 0) -> Parameters:
    return {"weight": randn(outs, ins, seed=seed) * 0.1, "bias": randn(outs, seed=seed + 100)}


def exact(x: Tensor, projections: list[Parameters]) -> Tensor:
    """The result of a layer with rounded weights and inputs, in float64."""
    weights = [round_to_codes(p["weight"]).dequantised().double() for p in projections]
    inputs = rounded(x, UNSCALED).double()
    return torch.cat(
        [inputs @ w.T + p["bias"].double() for w, p in zip(weights, projections, strict=True)], 1
    )


def test_weights_become_the_nearest_numbers_of_their_tables() -> None:
    weight = randn(530, 256)  # More outputs than are rounded at once.
    weight[3, :GROUP] = 0.0
    weight[5] = 0.0
    codes = round_to_codes(weight)
    tables = codes.tables.float() * codes.scales[:, None, None]
    assert bool((tables.diff(dim=2) >= 0).all())
    values = torch.cat([tables, -tables], 2)[:, :, None]
    got = codes.dequantised()
    nearest = (values - weight.view(530, 2, GROUP, 1)).abs().amin(3).flatten(1)
    torch.testing.assert_close((got - weight).abs(), nearest, rtol=1e-5, atol=1e-6)
    assert float(got[3, :GROUP].abs().max()) == float(got[5].abs().max()) == 0.0


def test_normally_distributed_weights_lose_less_than_in_integers() -> None:
    weight = randn(256, 512)

    def error(rounded: Tensor) -> float:
        return float((rounded - weight).square().sum() / weight.square().sum())

    assert error(round_to_codes(weight).dequantised()) < 0.0081
    assert error(round_to_integers(weight, 4, GROUP).dequantised()) > 0.0135


def widened(words: Tensor, tables: Tensor, outs: int, ins: int) -> Tensor:
    """What the threads of `codes_hopper` compute: the instructions `prmt` and `lop3` are written out in Python."""
    numbers = torch.empty(outs, ins, dtype=torch.uint8)
    steps = ins // 256
    for tile in range(outs // 64 * steps):
        own = (words[8 * tile : 8 * tile + 8].long() & 0xFFFFFFFF).flatten().tolist()
        halves = (tables[tile].long() & 0xFFFFFFFF).tolist()
        for place, word in enumerate(own):
            row, quarter, run = place // 16, place // 4 % 4, place % 4
            group, half, warp, thread = row // 64, row // 32 % 2, row // 8 % 4, row % 8
            table = halves[row].to_bytes(4, "little") + halves[128 + row].to_bytes(4, "little")
            for register, signs in ((0, word), (1, word << 4)):
                indices = (word & 0x77777777) >> 16 * register
                chosen = bytes(table[indices >> 4 * i & 15] for i in range(4))
                found = int.from_bytes(chosen, "little") | signs & 0x80808080
                out = tile // steps * 64 + 16 * warp + 8 * half + thread
                begin = tile % steps * 256 + 128 * group + 32 * run + 16 * register + 4 * quarter
                numbers[out, begin : begin + 4] = torch.tensor(list(found.to_bytes(4, "little")))
    return numbers.view(torch.float8_e4m3fn).float()


def test_the_instructions_of_the_kernel_widen_packed_codes() -> None:
    weight = round_to_codes(randn(128, 512))
    unscaled = Codes(weight.codes, weight.tables, torch.ones(128))
    got = widened(pack_codes(weight.codes), pack_tables(weight.tables), 128, 512)
    assert torch.equal(got, unscaled.dequantised())


@pytest.mark.parametrize(
    "split", [None, Split(ONE_RANK, Leaves.whole(384, 128, 2))], ids=["whole", "in leaves"]
)
def test_a_layer_multiplies_rounded_weights_and_inputs(split: Split | None) -> None:
    one, x = projection(72, 384), randn(5, 384, seed=7) * torch.linspace(1, 9, 384)
    assert_near(pack([[dict(one)]], split=split).linear(x), exact(x, [one]))


def test_a_gated_layer_gives_silu_of_the_gate_times_up() -> None:
    both, x = [projection(72, 256, seed) for seed in (1, 2)], randn(5, 256, seed=7)
    gate, up = exact(x, both).chunk(2, 1)
    assert_near(pack([[dict(p) for p in both]], gated=True).linear_silu_mul(x), silu(gate) * up)


def test_heads_and_inputs_that_are_not_whole_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"200 inputs .* multiple of 128"):
        pack([[projection(72, 200)]])
    with pytest.raises(ValueError, match="an LM head can't be kept in 4 bits"):
        pack([[projection(72, 256)]], head=True)


def results(layers: list[Weight], x: Tensor) -> list[Tensor]:
    """All operations of an MLP's layers: one of a single projection, and a gated one."""
    single, gated = layers
    residual, norm = randn(len(x), 72, seed=2), randn(72, seed=3)
    return [single.linear(x), *single.linear_add_rms_norm(x, residual, norm, 1e-6), gated.linear_silu_mul(x)]


@pytest.mark.parametrize(
    "split", [None, Split(ONE_RANK, Leaves.whole(256, 128, 2))], ids=["whole", "in leaves"]
)
def test_few_rows_multiply_4_bits_and_many_fp8(split: Split | None) -> None:
    single, both = [projection(72, 256)], [projection(72, 256, seed) for seed in (1, 2)]

    def layers(format: str) -> list[Weight]:
        return [
            pack_weight([[dict(p) for p in parts]], format, gated=parts is both, split=split).with_factor(4.0)
            for parts in (single, both)
        ]

    ours, int4, fp8 = layers("fp8+int4"), layers("int4"), layers("fp8")
    for rows, expected in ((MOST_ROWS, int4), (MOST_ROWS + 1, fp8)):
        x = randn(rows, 256, seed=7)
        for got, wanted in zip(results(ours, x), results(expected, x), strict=True):
            assert torch.equal(got, wanted)
    for weight, few, many in zip(ours, int4, fp8, strict=True):
        assert weight.nbytes == few.nbytes + many.nbytes and weight.rounding == few.rounding == many.rounding
    x = randn(5, 256, seed=7)
    assert not torch.equal(int4[0].linear(x), fp8[0].linear(x))


@interpreted
def test_a_packed_layer_has_the_bytes_of_the_memory_plan() -> None:
    from orthrus.kernels.linear.codes_gpu import code_layer

    layer = code_layer(round_to_codes(randn(256, 512)), None, True, None, torch.bfloat16)
    assert layer.nbytes == 256 * 512 * INT4_BYTES + 4 * 256
    assert layer.with_factor(8.0).scales.sum() == layer.scales.sum() / 8


def test_a_program_has_as_many_consumers_as_make_it_soonest_done() -> None:
    from orthrus.kernels.linear.codes_hopper import num_consumers, num_parts

    gate_up, down = 384, 4 * 64  # Tiles of Qwen3-8B. The sum of down has four parts.
    assert num_consumers(gate_up, 132, 32) == 3, "128 units: each program has one"
    assert num_consumers(down, 132, 32) == 2, "128 units instead of two tiles for some programs"
    assert num_consumers(128, 132, 32) == 1, "each program has a tile already"
    assert num_consumers(160, 132, 32) == 2, "80 units instead of two tiles for some programs"
    assert num_consumers(gate_up, 132, 128) == 1
    shapes = (4096, 12288), (5120, 25600), (8192, 24576), (1024, 3072), (256, 512)
    assert [num_parts(32, *shape) for shape in shapes] == [4, 4, 2, 2, 1]
    assert [num_parts(rows, *shapes[0]) for rows in (64, 65, 128, 129, 300)] == [4, 2, 2, 1, 2]
