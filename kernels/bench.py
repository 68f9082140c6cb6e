"""`python -m kernels.bench`: what the kernels reach on this GPU, at Qwen3-8B's shapes in bfloat16.

Linear layers run beside cuBLAS (torch.matmul) in one run, attention beside the measured copy bandwidth. Each figure is the
median over replays of a CUDA graph of several launches, which take turns over more copies of their inputs than the L2 cache
holds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from torch import Tensor

from kernels.attention import AttentionBatch
from kernels.attention_triton import paged_attention
from kernels.linear import PackedLinear
from kernels.linear_triton import LinearTiles, choose_tiles, linear, num_segments

SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (24576, 4096),
    "down": (4096, 12288),
    "lm_head": (151936, 4096),
}
"""(out_features, in_features) of Qwen3-8B."""
ROWS = (1, 8, 32, 64, 128, 256, 2048)
HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 16
_COLD_BYTES = 200_000_000


def candidates(rows: int) -> list[tuple[int, int, int, int, int]]:
    """(outs, rows, depth, warps, stages) of tiles worth trying for a launch of so many rows."""
    if rows <= 64:
        tile = 16 if rows <= 16 else 32 if rows <= 32 else 64
        return [(64, tile, 128, 4, 4), (128, tile, 64, 4, 6), (64, tile, 128, 4, 6 if tile < 64 else 3)]
    if rows <= 128:
        return [(64, 128, 64, 4, 4), (128, 128, 64, 8, 4)]
    if rows <= 256:
        return [(64, 256, 64, 4, 4), (128, 256, 64, 8, 4), (128, 128, 64, 8, 4)]
    return [(128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 128, 64, 8, 4)]


def variants(outs: int, ins: int, rows: int) -> dict[tuple[int, LinearTiles], None]:
    """Segments and tiles to measure for one shape and row count, the usual choice first; a dict for its order."""
    usual = num_segments(outs, ins)
    found = {(usual, choose_tiles(rows, outs, usual, torch.bfloat16)): None}
    few_tiles = outs <= 8192
    for segments in sorted({1, 2, 4}) if few_tiles else [1]:
        for out_tile, row_tile, depth, warps, stages in candidates(rows):
            for split in (False, True):
                if (segments == 1 and split) or (segments > 1 and not split and rows < 256):
                    continue
                if split and rows > 256:
                    continue
                found[segments, LinearTiles(out_tile, row_tile, depth, split, warps, stages)] = None
    return found


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _compile_linear(case: tuple[bool, LinearTiles]) -> str | None:
    """Compile a linear kernel by running it; says what went wrong, if anything."""
    whole, tiles = case
    try:
        layer = PackedLinear(_randn(512, 2048), None, False)
        linear(_randn(32, 2048), layer, tiles, 1 if whole else 2)
        torch.cuda.synchronize()
    except Exception as error:  # A tile that does not fit is left out of the table, not the end of it.
        return f"{tiles}: {type(error).__name__}: {str(error)[:200]}"
    return None


def _compile_attention(case: tuple[bool, bool, int]) -> str | None:
    diffusion, split, queries = case
    try:
        run = attention_case(1, 32, 900, diffusion, 1 << 11)
        run(0, split=split, queries=queries)
        torch.cuda.synchronize()
    except Exception as error:
        return f"attention {case}: {type(error).__name__}: {str(error)[:200]}"
    return None


def compile_all() -> list[str]:
    """Compile every kernel that the tables need, side by side; returns what failed."""
    linears = {
        (segments == 1, tiles): None
        for outs, ins in SHAPES.values()
        for rows in ROWS
        for segments, tiles in variants(outs, ins, rows)
    }
    attentions = [(d, s, q) for d in (False, True) for s in (False, True) for q in (64, 128)]
    with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_compile_attention, case) for case in attentions]
        jobs += [pool.submit(_compile_linear, case) for case in linears]
        return [line for job in jobs if (line := job.result()) is not None]


def microseconds(launch: Callable[[int], object], launches: int, replays: int = 7) -> float:
    """Median time of launch(0), launch(1), ... in a CUDA graph."""
    launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Not torch.cuda.graph(): it collects garbage first, which would take longer than all that is measured.
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin()
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


def copy_bandwidth() -> float:
    """GB/s of a large device copy, reads and writes counted."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / microseconds(lambda i: target.copy_(source), 2) / 1e3


def bench_linear(name: str, row_counts: tuple[int, ...] = ROWS) -> list[dict[str, object]]:
    """One row of figures per row count: cuBLAS, the usual tiles, and the best of each segment count."""
    outs, ins = SHAPES[name]
    copies = max(1, _COLD_BYTES // (outs * ins * 2))
    weights = [_randn(outs, ins) * 0.02 for _ in range(copies)]
    layers = [PackedLinear(w, None, False) for w in weights]

    def product(x: Tensor, i: int) -> Tensor:
        return torch.matmul(x, weights[i % copies].T)

    def ours(x: Tensor, tiles: LinearTiles, segments: int, i: int) -> Tensor:
        return linear(x, layers[i % copies], tiles, segments)

    found = []
    for rows in row_counts:
        x = _randn(rows, ins)
        launches = max(2, min(8, copies * 2)) if rows < 2048 else 2
        cublas = microseconds(partial(product, x), launches)
        times: dict[tuple[int, LinearTiles], float] = {}
        for segments, tiles in variants(outs, ins, rows):
            try:
                times[segments, tiles] = microseconds(partial(ours, x, tiles, segments), launches)
            except Exception as error:
                print(f"  {name} {rows} {segments} {tiles}: {type(error).__name__}: {str(error)[:120]}")
        usual = next(iter(variants(outs, ins, rows)))
        ranked = sorted(times, key=times.__getitem__)
        row: dict[str, object] = {
            "layer": name,
            "rows": rows,
            "cublas_us": cublas,
            "us": times.get(usual),
            "ratio": times.get(usual, float("nan")) / cublas,
            "all": [(s, *vars(t).values(), round(times[s, t], 2)) for s, t in ranked],
        }
        found.append(row)
        line = f"{name:8}{rows:5}  cublas {cublas:8.1f}  ours {times.get(usual, float('nan')):8.1f} us {row['ratio']:5.2f}x  best"
        for segments in sorted({s for s, _ in times}):
            best = next(k for k in ranked if k[0] == segments)
            t = best[1]
            line += (
                f" | S{segments} {times[best] / cublas:.2f} {t.outs}x{t.rows}x{t.depth}w{t.warps}s{t.stages}"
                f"{'+' if t.split else ''}"
            )
        print(line, flush=True)
    return found


def attention_case(
    groups: int, rows: int, start: int, diffusion: bool, cache_tokens: int
) -> Callable[..., Tensor]:
    """A launch of `rows` rows at positions from `start`, for each of `groups` sequences; argument i picks other pages."""
    pages = cache_tokens // PAGE
    k_cache, v_cache = _randn(KV_HEADS, pages, PAGE, HEAD_DIM), _randn(KV_HEADS, pages, PAGE, HEAD_DIM)
    qk = _randn(groups, rows, HEADS + KV_HEADS, HEAD_DIM)
    width = triton.cdiv(start + rows, 128) * (128 // PAGE)
    limits = torch.arange(rows, device="cuda").repeat(groups, 1) + start + 1
    if diffusion:
        limits = torch.full_like(limits, start)
    order = torch.randperm(pages, device="cuda").repeat(2)
    batches = []
    for i in range(max(1, pages // (width * groups))):
        table = order[i * width * groups :][: width * groups].view(groups, width).contiguous()
        batches.append(AttentionBatch(0, table, limits, PAGE, HEADS // KV_HEADS, diffusion))
    block = (qk[:, :, HEADS:], _randn(groups, rows, KV_HEADS, HEAD_DIM)) if diffusion else (None, None)

    def launch(i: int, **how: int | bool | None) -> Tensor:
        batch = batches[i % len(batches)]
        return paged_attention(
            qk[:, :, :HEADS],
            k_cache,
            v_cache,
            batch,
            HEAD_DIM**-0.5,
            *block,
            **how,  # type: ignore[arg-type]
        )

    return launch


def bench_attention(roof: float) -> list[dict[str, object]]:
    """Times and KV bandwidth of decode, verify, draft and prefill rows."""
    found = []
    for name, groups, rows, start, diffusion in (
        ("decode 1K", 1, 1, 1023, False),
        ("verify 1K", 1, 32, 992, False),
        ("draft 1K", 1, 32, 992, True),
        ("decode 1K x64", 64, 1, 1023, False),
        ("decode 32K", 1, 1, 32767, False),
        ("verify 32K", 1, 32, 32736, False),
        ("draft 32K", 1, 32, 32736, True),
        ("prefill 8K", 1, 512, 7680, False),
    ):
        launch = attention_case(groups, rows, start, diffusion, max(1 << 17, groups * 1024))
        times = {}
        for queries in (64, 128):
            for split in (None, False) if rows < 512 else (None,):
                times[queries, split] = microseconds(partial(launch, queries=queries, split=split), 4)
        kv_bytes = groups * (start + rows) * KV_HEADS * HEAD_DIM * 4
        speed = kv_bytes / times[64, None] / 1e3
        print(
            f"{name:14} {times[64, None]:8.1f} us {speed:6.0f} GB/s of KV ({speed / roof:4.0%} of the roof); "
            + ", ".join(f"Q{q} {'walk' if s is False else 'usual'} {t:.1f}" for (q, s), t in times.items()),
            flush=True,
        )
        found.append({"case": name, "us": {f"{q}/{s}": t for (q, s), t in times.items()}, "gbps": speed})
    return found


def main() -> None:
    """Print the tables; write every figure as JSON where asked to."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument(
        "--compile", action="store_true", help="compile every kernel in parallel, measure nothing"
    )
    arguments = parser.parse_args()
    started = time.perf_counter()
    if arguments.compile:
        print("\n".join(compile_all()))
        print(f"compiled in {time.perf_counter() - started:.1f} s")
        return
    torch.manual_seed(0)
    roof = copy_bandwidth()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}: copy {roof:.0f} GB/s"
    )
    figures: dict[str, object] = {"copy_gbps": roof}
    figures["attention"] = bench_attention(roof)
    figures["linear"] = []
    for name in SHAPES:
        figures["linear"] += bench_linear(name)  # type: ignore[operator]
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(figures))
    print(f"measured in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
