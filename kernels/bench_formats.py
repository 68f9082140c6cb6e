"""`python -m orthrus.kernels.bench_formats`: the linear layers of Qwen3-8B in each weight format, as a pass runs them.

It runs all 36 layers and the LM head in a CUDA graph, with norms and picks, but without attention. For each number of rows, it
prints milliseconds, and the bytes of the weights over that time as a share of the read bandwidth. For the numbers of rows that
`hopper` takes, it then prints the microseconds of each part of a layer, measured in a graph of that part alone.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from orthrus.kernels.attention import paged_attention
from orthrus.kernels.bench import (
    HEAD_DIM,
    HIDDEN,
    INNER,
    SHAPES,
    AttentionCase,
    bandwidths,
    microseconds,
    randn,
)
from orthrus.kernels.linear import FIXED_FORMATS, OUTSIDE_MLP, Parameters, Weight, pack_weight
from orthrus.kernels.linear.fp8 import UNSCALED
from orthrus.kernels.linear.fp8_block import quantise_blocks
from orthrus.kernels.linear.gptq import quantise_gptq
from orthrus.kernels.linear.hopper import MOST_ROWS
from orthrus.kernels.linear.weight import Views
from orthrus.kernels.rounding_triton import rounded
from orthrus.kernels.workspace import BYTES, results_in, start_layer

OUR_FORMATS = ("plain", "lossless12", "fp8", "fp8+int4", "int4")
"""Our formats for weights and drafts."""
FORMATS = (*OUR_FORMATS, "fp8 blocks", "gptq 8", "gptq 4")
"""These, and formats of published checkpoints, whose LM head is not quantised."""
ROWS = (1, 8, 32, 64, 128, 256, 512)
LAYERS = 36
CONTEXT = 1024
"""Positions that the draft block of `attention_time` sees, including its own."""
_DISTINCT = 8
"""Layers with different weights: more than fit into the L2 cache."""


class Model:
    """The linear layers of the model in one format, with random weights."""

    def __init__(self, format: str) -> None:
        def pack(name: str, parts: int = 1, head: bool = False) -> Weight:
            outs, ins = SHAPES[name]
            views: Views = [[_parameters(format, outs // parts, ins, head) for _ in range(parts)]]
            kept = format if format in OUR_FORMATS else "plain"
            if name not in ("gate_up", "down"):
                kept = OUTSIDE_MLP.get(kept, kept)
            return pack_weight(views, kept, gated=parts > 1, head=head)

        names = ("qkv", 1), ("o", 1), ("gate_up", 2), ("down", 1)
        self.format = format
        self.layers = [[pack(name, parts) for name, parts in names] for _ in range(_DISTINCT)]
        self.head = pack("lm_head", head=True)
        self.norm = randn(HIDDEN)
        layer_bytes = sum(weight.nbytes for weight in self.layers[0])
        self.nbytes = LAYERS * layer_bytes + self.head.nbytes

    def microseconds(self, rows: int) -> float:
        """Time of a pass of so many rows, in microseconds."""
        x = randn(rows, HIDDEN)
        logits = torch.empty(rows, SHAPES["lm_head"][0], device="cuda")
        none = torch.zeros(1, device="cuda", dtype=torch.int32)
        temperatures = torch.zeros(rows, device="cuda")
        keys = torch.zeros(rows, 2, device="cuda", dtype=torch.int32)
        picks = torch.zeros(rows, device="cuda", dtype=torch.int32)

        def run(_: int) -> Tensor:
            hidden = normed = x
            for i in range(LAYERS):
                start_layer()
                qkv, out, gate_up, down = self.layers[i % _DISTINCT]
                attended = qkv.linear(normed)[:, :HIDDEN]
                hidden, normed = out.linear_add_rms_norm(
                    attended, hidden, self.norm, 1e-6, rounding=gate_up.rounding
                )
                gated = gate_up.linear_silu_mul(normed, rounding=down.rounding)
                hidden, normed = down.linear_add_rms_norm(
                    gated, hidden, self.norm, 1e-6, rounding=qkv.rounding if i + 1 < LAYERS else None
                )
            self.head.linear_gumbel_argmax(normed, logits, none, temperatures, keys, picks, none)
            return picks

        with results_in(torch.empty(BYTES, dtype=torch.uint8, device="cuda")):
            return microseconds(run, 1)

    def part_times(self, rows: int) -> dict[str, float]:
        """Microseconds of each part of a layer, for so many rows. Inputs of layers that multiply in FP8 are rounded before."""
        x, inner, residual = randn(rows, HIDDEN), randn(rows, INNER), randn(rows, HIDDEN)
        times = {}
        layers = self.layers
        if self.format in FIXED_FORMATS:
            times["round rows"] = part_time(lambda i: rounded(x, UNSCALED))
            x, inner = (rounded(wide, UNSCALED) for wide in (x, inner))
        qkv, _, gate_up, down = layers[0]
        parts: dict[str, Callable[[int], object]] = {
            "qkv": lambda i: layers[i][0].linear(x),
            "o, norm": lambda i: layers[i][1].linear_add_rms_norm(
                x, residual, self.norm, 1e-6, rounding=gate_up.rounding
            ),
            "gate, up": lambda i: layers[i][2].linear_silu_mul(x, rounding=down.rounding),
            "down, norm": lambda i: layers[i][3].linear_add_rms_norm(
                inner, residual, self.norm, 1e-6, rounding=qkv.rounding
            ),
        }
        return times | {name: part_time(part) for name, part in parts.items()}


def part_time(part: Callable[[int], object]) -> float:
    """Microseconds of one part(i), where those of all layers i run one after the other."""

    def run(_: int) -> None:
        for i in range(_DISTINCT):
            start_layer()
            part(i)

    with results_in(torch.empty(BYTES, dtype=torch.uint8, device="cuda")):
        return microseconds(run, 1) / _DISTINCT


def attention_time(rows: int) -> float:
    """Microseconds of attention, with merging, of one block of `rows` rows at the end of `CONTEXT` positions."""
    case = AttentionCase(1, rows, CONTEXT - rows, diffusion=True)
    return part_time(lambda i: paged_attention(case.qkv, *case.cache, case.plans[0], HEAD_DIM**-0.5))


def _parameters(format: str, outs: int, ins: int, head: bool) -> Parameters:
    """The tensors of a projection with random weights."""
    weight = randn(outs, ins) * 0.02
    if head or format in OUR_FORMATS:
        return {"weight": weight}
    if format == "fp8 blocks":
        numbers, scales = quantise_blocks(weight)
        return {"weight": numbers, "weight_scale_inv": scales.bfloat16()}
    return quantise_gptq(weight, int(format.split()[1]), 128)


def main() -> None:
    """Print one line for each number of rows, then one for each format's parts."""
    parser = argparse.ArgumentParser(prog="python -m orthrus.kernels.bench_formats", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="numbers of rows to measure")
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS, help="formats to measure")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    _, read = bandwidths()
    print(f"{torch.cuda.get_device_name()}: read {read:.0f} GB/s")
    models = {format: Model(format) for format in arguments.formats}
    for count in arguments.rows:
        cells = []
        for format, model in models.items():
            us = model.microseconds(count)
            cells.append(f"{format} {us / 1e3:7.3f} ms {model.nbytes / us / 1e3 / read:4.0%}")
        print(f"{count:4} rows  " + "  ".join(cells), flush=True)
    for count in [count for count in arguments.rows if count <= MOST_ROWS]:
        print(f"{count:4} rows  attention of a draft block {attention_time(count):.1f} us")
        for format, model in models.items():
            parts = "  ".join(f"{name} {us:.1f}" for name, us in model.part_times(count).items())
            print(f"{count:4} rows  {format}: {parts} us", flush=True)


if __name__ == "__main__":
    main()
