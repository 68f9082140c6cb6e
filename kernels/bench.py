"""`python -m orthrus.kernels.bench`: what the kernels reach on this GPU, at Qwen3-8B's shapes in bfloat16.

Linear layers are compared with cuBLAS (torch.matmul), attention with the measured read bandwidth, and a stack of layers with
the time that reading its weights takes. Each figure is the median over replays of a CUDA graph of several launches. The
launches take turns over more copies of their inputs than the L2 cache holds. `--sweep` tries other tiles too.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from orthrus.kernels.attention import AttentionGroup, AttentionPlan, AttentionWork, paged_attention
from orthrus.kernels.attention.gpu import attention_programs, shares_tiles, tile_rows
from orthrus.kernels.attention.work_list import plan_work
from orthrus.kernels.linear.add_rms_norm import add_rms_norm
from orthrus.kernels.linear.gpu import TritonWeight
from orthrus.kernels.linear.tiles import num_parts
from orthrus.kernels.linear.types import LinearTiles
from orthrus.kernels.rows.qk_norm_rope import qk_norm_rope
from orthrus.kernels.rows.types import KVWrites

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, PAGE = 4096, 12288, 32, 8, 128, 64
SHAPES = {
    "qkv": (6144, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate_up": (2 * INNER, HIDDEN),
    "down": (HIDDEN, INNER),
    "lm_head": (151936, HIDDEN),
}
"""(out_features, in_features) of Qwen3-8B."""
ROWS = (1, 8, 16, 32, 64, 128, 256, 2048)
_COLD_BYTES = 200_000_000


def linear_tiles(rows: int) -> list[LinearTiles]:
    """Tiles that are worth trying for a launch of `rows` rows."""
    if rows <= 64:
        tile = 16 if rows <= 16 else 32 if rows <= 32 else 64
        cuts = [
            (64, 128, 4, 4),
            (64, 128, 4, 6),
            (64, 64, 4, 8),
            (128, 64, 4, 4),
            (128, 64, 4, 6),
            (64, 256, 4, 3),
        ]
        cuts += [(128, 128, 4, 4), (128, 64, 8, 6)]
    elif rows <= 128:
        tile, cuts = 128, [(64, 64, 4, 4), (64, 128, 4, 3), (128, 64, 8, 4), (128, 64, 4, 4), (64, 64, 4, 6)]
    elif rows <= 256:
        tile, cuts = 256, [(64, 64, 4, 4), (128, 64, 8, 4), (128, 64, 8, 3), (64, 64, 8, 4)]
    else:
        tile, cuts = 256, [(128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 4, 4)]
    found = [LinearTiles(outs, tile, depth, warps=w, stages=s) for outs, depth, w, s in cuts]
    if rows > 128:
        found += [LinearTiles(128, 128, 64, warps=8, stages=4), LinearTiles(256, 128, 64, warps=8, stages=3)]
        found += [LinearTiles(128, 128, 64, warps=4, stages=4)]
    return found


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def device_plan(plan: AttentionPlan, programs: int | None = None) -> AttentionPlan:
    """The plan with a work list. programs: how many share the work of each KV head. With 0 no tile is divided."""
    if programs is None:
        programs = attention_programs(plan.device) // KV_HEADS
    capacity = 1 << 15 if programs else 0
    numbers = plan_work(
        plan.groups,
        tile_rows=tile_rows(plan.heads_per_kv, torch.bfloat16),
        shared=shares_tiles(torch.bfloat16, HEAD_DIM),
        programs=max(1, programs),
        capacity=capacity,
    )
    return replace(plan, work=AttentionWork(torch.from_numpy(numbers).to(plan.device), capacity))


@cache
def _first_graph() -> torch.cuda.CUDAGraph:
    """An empty graph, whose memory pool all measured graphs use. Only one of them exists at a time."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin()
        torch.empty(1, device="cuda").zero_()
        graph.capture_end()
    return graph


def microseconds(launch: Callable[[int], object], launches: int, replays: int = 7) -> float:
    """Median time of one launch, where launch(0), launch(1), ... run in one CUDA graph."""
    launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Not torch.cuda.graph(): it collects garbage first, which would take longer than all that is measured.
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin(pool=_first_graph().pool())
        for i in range(launches):
            launch(i)
        graph.capture_end()
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / launches)
    return statistics.median(times)


def bandwidths() -> tuple[float, float]:
    """GB/s of a large device copy, reads and writes counted, and of reading alone (a maximum norm)."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = 2 * source.numel() / microseconds(lambda i: target.copy_(source), 2) / 1e3
    numbers = source.view(torch.float32)
    read = source.numel() / microseconds(lambda i: torch.linalg.vector_norm(numbers, float("inf")), 2) / 1e3
    return copy, read


class LinearCase:
    """One of the layers, as a pass runs it and through cuBLAS, over more copies of its weight than the L2 cache holds.

    If a residual add and a norm follow the layer, they follow cuBLAS's product too, in the same kernel.
    """

    def __init__(self, name: str, rows: int) -> None:
        self.outs, self.ins = SHAPES[name]
        self.name, self.rows = name, rows
        self.layers = [
            TritonWeight((randn(self.outs, self.ins) * 0.02,), interleaved=name == "gate_up")
            for _ in range(max(1, _COLD_BYTES // (self.outs * self.ins * 2)))
        ]
        self.x = randn(rows, self.ins)
        self.residual, self.norm = randn(rows, HIDDEN), randn(HIDDEN)
        self.launches = max(2, min(8, 2 * len(self.layers))) if rows < 2048 else 2
        self.leaves = num_parts(self.outs, self.ins) if name in ("o", "down") else 1

    def variants(self, sweep: bool) -> list[tuple[int, LinearTiles | None]]:
        """Pairs of a number of leaves and tiles. The first is what a pass uses; its tiles are None."""
        found: dict[tuple[int, LinearTiles | None], None] = {(self.leaves, None): None}
        if sweep:
            for tiles in linear_tiles(self.rows):
                for leaves in (1, 2, 4) if self.name in ("o", "down") else (1,):
                    split = leaves > 1 and self.rows <= 256
                    if split or leaves == 1 or tiles.outs * tiles.rows <= 128 * 128:
                        found[leaves, replace(tiles, split=split)] = None
        return list(found)

    def ours(self, leaves: int, tiles: LinearTiles | None, i: int) -> object:
        layer = self.layers[i % len(self.layers)]
        if self.name == "gate_up":
            return layer.linear_silu_mul(self.x, tiles=tiles)
        if self.name in ("o", "down"):
            return layer.linear_add_rms_norm(
                self.x, self.residual, self.norm, 1e-6, tiles=tiles, leaves=leaves
            )
        out = torch.empty(self.rows, self.outs, device="cuda") if self.name == "lm_head" else None
        return layer.linear(self.x, out=out, tiles=tiles)

    def cublas(self, i: int) -> object:
        product = torch.matmul(self.x, self.layers[i % len(self.layers)].weights[0].T)
        if self.name in ("o", "down"):
            return add_rms_norm(product, self.residual, self.norm, 1e-6)
        return product


def bench_linear(name: str, sweep: bool, row_counts: tuple[int, ...] = ROWS) -> list[dict[str, Any]]:
    """Figures for each number of rows: cuBLAS, the usual tiles, and with `sweep` all other tiles and numbers of leaves."""
    found = []
    for rows in row_counts:
        case = LinearCase(name, rows)
        cublas = microseconds(case.cublas, case.launches)
        times: dict[tuple[int, LinearTiles | None], float] = {}
        for leaves, tiles in case.variants(sweep):
            try:
                times[leaves, tiles] = microseconds(partial(case.ours, leaves, tiles), case.launches)
            except Exception as error:
                # A tile that does not fit is left out of the table.
                print(f"  {name} {rows} {leaves} {tiles}: {type(error).__name__}: {str(error)[:100]}")
        usual = times[case.leaves, None]
        ranked = sorted(times, key=times.__getitem__)
        found.append(
            {
                "layer": name,
                "rows": rows,
                "cublas_us": cublas,
                "us": usual,
                "ratio": usual / cublas,
                "all": [(s, t and list(vars(t).values()), round(times[s, t], 2)) for s, t in ranked],
            }
        )
        line = f"{name:8}{rows:5}  cublas {cublas:8.1f}  ours {usual:8.1f} us {usual / cublas:5.2f}x"
        for leaves in sorted({count for count, _ in times}) if sweep else ():
            best = [k for k in ranked if k[0] == leaves][:3]
            line += f" | L{leaves} " + " ".join(f"{times[k] / cublas:.2f}:{_name(k[1])}" for k in best)
        print(line, flush=True)
    return found


def _name(tiles: LinearTiles | None) -> str:
    if tiles is None:
        return "usual"
    return f"{tiles.outs}x{tiles.rows}x{tiles.depth}w{tiles.warps}s{tiles.stages}"


class AttentionCase:
    """`rows` rows at positions from `start` on, for each of `groups` sequences. Calls take turns over the pages of the cache."""

    def __init__(self, groups: int, rows: int, start: int, diffusion: bool) -> None:
        each = triton.cdiv(start + rows, PAGE)
        pages = max(1 << 17, groups * (start + rows)) // PAGE + 1
        self.cache = randn(KV_HEADS, pages, PAGE, HEAD_DIM), randn(KV_HEADS, pages, PAGE, HEAD_DIM)
        self.qkv = randn(groups * rows, HEADS + 2 * KV_HEADS, HEAD_DIM)
        order = (torch.randperm(pages - 1) + 1).tolist()
        self.plans = []
        for at in range(0, max(1, len(order) // (each * groups)) * each * groups, each * groups):
            plan = AttentionPlan(
                tuple(
                    AttentionGroup(
                        g * rows, rows, start, order[at + g * each : at + (g + 1) * each], diffusion
                    )
                    for g in range(groups)
                ),
                PAGE,
                HEADS // KV_HEADS,
                torch.device("cuda"),
            )
            self.plans.append(device_plan(plan))

    def __call__(self, i: int) -> Tensor:
        plan = self.plans[i % len(self.plans)]
        return paged_attention(self.qkv, *self.cache, plan, HEAD_DIM**-0.5)


ATTENTION_CASES = (
    ("decode 1K", 1, 1, 1023, False),
    ("verify 1K", 1, 32, 992, False),
    ("draft 1K", 1, 32, 992, True),
    ("decode 1K x64", 64, 1, 1023, False),
    ("verify 1K x16", 16, 16, 992, False),
    ("decode 32K", 1, 1, 32767, False),
    ("verify 32K", 1, 32, 32736, False),
    ("draft 32K", 1, 32, 32736, True),
    ("prefill 8K", 1, 512, 7680, False),
)


def bench_attention(read: float) -> list[dict[str, Any]]:
    """Times and KV bandwidth of decode, verify, draft and prefill rows."""
    found = []
    for name, groups, rows, start, diffusion in ATTENTION_CASES:
        us = microseconds(AttentionCase(groups, rows, start, diffusion), 4)
        speed = groups * (start + rows) * KV_HEADS * HEAD_DIM * 4 / us / 1e3
        print(
            f"{name:14} {us:8.1f} us {speed:6.0f} GB/s of KV ({speed / read:4.0%} of the read bandwidth)",
            flush=True,
        )
        found.append({"case": name, "us": us, "gbps": speed})
    return found


class LayerStack:
    """`depth` layers as a pass runs them, each with weights of its own, for AR rows or for one diffusion block.

    Their results are not kept in the L2 cache, as a pass keeps them (`kernels.workspace`).
    """

    def __init__(self, depth: int, rows: int, start: int, groups: int = 1, diffusion: bool = False) -> None:
        def layer(name: str, views: int = 1) -> TritonWeight:
            outs, ins = SHAPES[name]
            return TritonWeight((randn(views, outs, ins) * 0.02).unbind(), interleaved=name == "gate_up")

        self.layers = [
            (
                layer("qkv", 2),
                layer("o", 2),
                layer("gate_up"),
                layer("down"),
                randn(2, HEADS + KV_HEADS, HEAD_DIM),
            )
            for _ in range(depth)
        ]
        self.attention = AttentionCase(groups, rows // groups, start, diffusion)
        self.plan = self.attention.plans[0]
        self.hidden, self.norm = randn(rows, HIDDEN), randn(HIDDEN)
        cos, sin = randn(rows, 1, HEAD_DIM // 2), randn(rows, 1, HEAD_DIM // 2)
        self.cos, self.sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        self.num_ar = torch.tensor([0 if diffusion else rows], dtype=torch.int32, device="cuda")
        self.writes = KVWrites.single(torch.arange(rows, dtype=torch.int32, device="cuda"))
        self.slot_cache = [cache.flatten(1, 2) for cache in self.attention.cache]
        self.bytes = depth * sum(outs * ins * 2 for name, (outs, ins) in SHAPES.items() if name != "lm_head")

    def __call__(self, i: int) -> Tensor:
        hidden, normed = self.hidden, self.hidden
        rows = hidden.shape[0]
        for qkv_layer, out, gate_up, down, norms in self.layers:
            qkv = qkv_layer.linear(normed, self.num_ar).view(rows, -1, HEAD_DIM)
            qk_norm_rope(qkv, norms, self.cos, self.sin, 1e-6, self.num_ar, self.writes, *self.slot_cache)
            attended = paged_attention(qkv, *self.attention.cache, self.plan, HEAD_DIM**-0.5)
            hidden, normed = out.linear_add_rms_norm(attended, hidden, self.norm, 1e-6, self.num_ar)
            gated = gate_up.linear_silu_mul(normed)
            hidden, normed = down.linear_add_rms_norm(gated, hidden, self.norm, 1e-6)
        return hidden


def bench_layers(read: float, depth: int = 8) -> list[dict[str, Any]]:
    """Time per layer, and share of the read bandwidth, of AR steps and of blocks."""
    found = []
    for name, rows, groups, diffusion in (
        ("step", 8, 1, False),
        ("draft 16", 16, 1, True),
        ("draft 32", 32, 1, True),
        ("verify 32", 32, 1, False),
        ("64 steps", 64, 64, False),
    ):
        stack = LayerStack(depth, rows, 1024 - rows // groups, groups, diffusion)
        us = microseconds(stack, 1) / depth
        print(
            f"{name:10} {us:7.1f} us per layer, {stack.bytes / depth / us / 1e3 / read:4.0%} of the read bandwidth",
            flush=True,
        )
        found.append({"case": name, "us_per_layer": us})
        del stack
    return found


def main() -> None:
    """Print the tables; write every figure as JSON where asked to."""
    parser = argparse.ArgumentParser(prog="python -m orthrus.kernels.bench", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--sweep", action="store_true", help="measure other tiles of the linear layers too")
    arguments = parser.parse_args()
    started = time.perf_counter()
    torch.manual_seed(0)
    copy, read = bandwidths()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}: "
        f"copy {copy:.0f} GB/s, read {read:.0f} GB/s"
    )
    figures: dict[str, Any] = {"copy_gbps": copy, "read_gbps": read}
    figures["layers"] = bench_layers(read)
    figures["attention"] = bench_attention(read)
    figures["linear"] = [row for name in SHAPES for row in bench_linear(name, arguments.sweep)]
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures))
    print(f"measured in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
