"""Cases of the stream kernel for bfloat16 and FP8 weights (kernels/linear/hopper.py)."""

from typing import Any

import torch
from torch import Tensor

from orthrus.kernels.leaves import Leaves
from orthrus.kernels.linear import hopper
from orthrus.kernels.linear.fp8 import quantise_rows
from orthrus.kernels.linear.reference import DenseWeight
from orthrus.kernels.linear.types import DenseLayer
from orthrus.kernels.rounding import LARGEST, Rounding
from orthrus.kernels.rows.sampling import gumbel_noise, noise_keys
from tests.ptx.launches import Edit, emulating
from tests.ptx.machine import Way
from tests.ptx.tensors import check, check_stored, gated, int32, randn, unset


def launch(
    way: Way, x: Tensor, layer: DenseLayer, out: Tensor, *args: Any,
    programs: int = 2, edit: Edit | None = None, **kwargs: Any,
) -> None:  # fmt: skip
    """`hopper.launch`. Nothing may touch inputs and outputs before griddepcontrol.wait."""
    with emulating(hopper, way, programs=programs, chained=(x, out), edit=edit):
        hopper.launch(x, layer, out, *args, **kwargs)


def make_layer(
    views: int, outs: int, ins: int, fp8: bool, *, gated: bool = False, bias: bool = False
) -> tuple[DenseLayer, DenseWeight]:
    """A layer, and the same in float64."""
    weight = randn(views, outs, ins, seed=3) * ins**-0.5
    biases = randn(views, outs, seed=9) if bias else None
    exact_biases = None if biases is None else biases.double()
    if not fp8:
        return DenseLayer(weight.unbind(), biases, gated), DenseWeight(weight.double().unbind(), exact_biases)
    rounded = [quantise_rows(view) for view in weight]
    numbers = torch.stack([view.view(torch.uint8) for view, _ in rounded]).view(torch.float8_e4m3fn)
    scales = torch.stack([scale for _, scale in rounded])
    exact = numbers.double() * scales.double()[:, :, None]
    return DenseLayer(numbers.unbind(), biases, gated, scales), DenseWeight(exact.unbind(), exact_biases)


def make_inputs(rows: int, ins: int, fp8: bool) -> tuple[Tensor, Tensor]:
    """Inputs, and the same in float64."""
    x = randn(rows, ins, seed=1)
    if fp8:
        x = x.to(torch.float8_e4m3fn)
    return x, x.double()


def check_layer(
    way: Way, rows: int, views: int, fp8: bool, *, outs: int = 192, ins: int = 512, programs: int = 2,
    bias: bool = False, edit: Edit | None = None,
) -> None:  # fmt: skip
    layer, exact = make_layer(views, outs, ins, fp8, bias=bias)
    x, wide = make_inputs(rows, ins, fp8)
    for split in (rows,) if views == 1 else (rows // 3, 0):
        num_ar, out = int32(split), unset(rows, outs)
        launch(way, x, layer, out, num_ar, 1, programs=programs, edit=edit)
        check(out, exact.linear(wide, num_ar))


def check_gated(way: Way, rows: int, ins: int, fp8: bool) -> None:
    layer, exact = make_layer(1, 192, ins, fp8, gated=True)
    x, wide = make_inputs(rows, ins, fp8)
    out = unset(rows, 96)
    launch(way, x, layer, out, None, 1)
    check(out, gated(exact.linear(wide)))


def check_results_in_e4m3(way: Way, rows: int, rounding: Rounding) -> None:
    """The results of a gated layer, stored for the next layer. Some are too large for e4m3."""
    layer, exact = make_layer(1, 192, 512, fp8=True, gated=True)
    x, wide = make_inputs(rows, 512, fp8=True)
    out = unset(rows, 96, dtype=torch.float8_e4m3fn)
    launch(way, x, layer, out, None, 1, rounding=rounding)
    found = gated(exact.linear(wide))
    assert (found * (rounding.factor or 1.0)).abs().max() > LARGEST
    check_stored(out, found, rounding)


def check_tree(way: Way, leaves: int, first: int, count: int, parts: int, fp8: bool) -> None:
    """Leaves of unequal length. Parts have no bias, and go to tensors of their own."""
    unit, rows = 256 if fp8 else 128, 16
    whole = Leaves(11 * unit, unit, leaves, first, count)
    ins = whole.end - whole.begin
    layer, exact = make_layer(2, 128, ins, fp8)
    x, wide = make_inputs(rows, ins, fp8)
    out = unset(parts, rows, 128, dtype=torch.float32) if parts > 1 else unset(rows, 128)
    launch(way, x, layer, out, int32(7), parts, inputs=whole)
    check_parts(out, exact, wide, whole, parts)


def check_parts(out: Tensor, exact: DenseWeight, wide: Tensor, whole: Leaves, parts: int) -> None:
    """The results of `check_tree`: of the whole sum, or of each part of it."""
    if parts == 1:
        check(out, exact.linear(wide, int32(7)))
        return
    each = len(whole.spans) // parts
    for part in range(parts):
        begin, end = whole.spans[part * each].start, whole.spans[part * each + each - 1].stop
        own = DenseWeight(tuple(weight[:, begin:end] for weight in exact.weights))
        check(out[part], own.linear(wide[:, begin:end], int32(7)), 1e-5)


def check_picks(way: Way, warm: bool, wanted: bool) -> None:
    """The best token of each tile of 64 outputs, of all logits or of those with noise."""
    rows, outs, first = 10, 320, 1000
    layer, exact = make_layer(1, outs, 512, fp8=False)
    x, wide = make_inputs(rows, 512, fp8=False)
    out = unset(rows, outs)
    temperatures = torch.linspace(0, 1.5, rows) if warm else torch.zeros(rows)
    keys = torch.from_numpy(noise_keys(list(range(rows)), list(range(5, 5 + rows))))
    tiles = hopper.num_tiles(outs)
    values, indices = (
        unset(rows, tiles, dtype=torch.float32),
        torch.full((rows, tiles), -1, dtype=torch.int32),
    )
    picks = (temperatures, keys, int32(wanted), values, indices)
    launch(way, x, layer, out, None, 1, picks, first_token=first)
    logits = exact.linear(wide).float()
    if wanted:
        check(out, logits)
    else:
        assert out.isnan().all()
    live = temperatures > 0
    noise = gumbel_noise(keys, first + outs)[:, first:]
    scores = torch.where(live[:, None], logits / temperatures.clamp(min=1e-9)[:, None] + noise, logits)
    best = [part.max(1) for part in scores.split(64, 1)]
    check(values, torch.stack([tile.values for tile in best], 1), 1e-4)
    places = torch.stack([tile.indices + 64 * number for number, tile in enumerate(best)], 1) + first
    assert torch.equal(indices.long(), places)


def check_same_bits(way: Way, fp8: bool) -> None:
    """A row has the same bits among any number of rows."""
    layer, _ = make_layer(1, 192, 1536, fp8)
    x, _ = make_inputs(64, 1536, fp8)
    found = []
    for rows in (1, 16, 20, 64):
        out = unset(rows, 192)
        launch(way, x[:rows], layer, out, None, 1)
        found.append(out)
    for out in found:
        assert torch.equal(out, found[-1][: len(out)])
