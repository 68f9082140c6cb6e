"""How much faster SIZE GPUs of this host are than one, compared with the targets: `make bench-ranks SIZE=2`.

Each part runs in a process of its own, so that the memory of the GPUs is free when it starts:

- the exchange of partial sums, with residual and norm, in a CUDA graph;
- an AR step of the 8B and the 32B shape, on one GPU and on SIZE GPUs, with SIZE leaves of sums and with twice as many;
- `orthrus bench shape` of the 72B shape on SIZE GPUs, and of the 8B shape on one GPU. The ratio of the first should reach that of
  the second.
"""

import argparse
import gc
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from orthrus.kernels.peer_sizes import PeerSizes
from orthrus.measure.random_model import shape_config, shape_engine
from orthrus.measure.shape_bench import PASSES, ShapeBenchOptions, shape_bench, time_passes
from orthrus.models.config import ModelConfig
from orthrus.plan import View

CONTEXT = 1024
WIDTH = 8192
EXCHANGES = 50
"""Exchanges in a CUDA graph, as many as a pass may have."""
BATCHES = (1, 4)


@dataclass(frozen=True)
class Figure:
    """One measured number, and the targets for it."""

    name: str
    value: float
    unit: str
    bar: float | None = None
    reach: float | None = None

    def __str__(self) -> str:
        asked = [
            f"{name} {wanted:g}" for name, wanted in (("bar", self.bar), ("reach", self.reach)) if wanted
        ]
        return f"{self.name:<62}{self.value:>9.2f} {self.unit}   {', '.join(asked)}".rstrip()


def step_milliseconds(
    model: ModelConfig, size: int, leaves: int, device: torch.device, dtype: torch.dtype
) -> float:
    """Median time of an AR step of one sequence, of a model that `size` ranks share. leaves: see `EngineConfig.sum_leaves`."""
    engine = shape_engine(
        model,
        "ar",
        device,
        dtype,
        tensor_parallel_size=size,
        sum_leaves=leaves,
        kv_cache_tokens=2 * CONTEXT,
        max_model_len=2 * CONTEXT,
        max_num_seqs=1,
    )
    found = statistics.median(time_passes(engine, View.AR, 1, 1, CONTEXT, PASSES)) * 1e3
    del engine
    gc.collect()
    return found


def speed_up(
    model: ModelConfig, size: int, leaves: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, float, float]:
    """Milliseconds of an AR step on one rank and on `size`, with the same bits, and how many times faster the latter is."""
    alone, shared = (step_milliseconds(model, ranks, leaves, device, dtype) for ranks in (1, size))
    return alone, shared, alone / shared


def _steps(shape: str, size: int, bar: float, reach: float) -> list[Figure]:
    """A rank with one leaf has a program for each 64 outputs of a layer. With more leaves, more SMs of its GPU have work."""
    model, found = shape_config(shape, diffusion=False), []
    for leaves in sorted({size, min(2 * size, 8)}):
        alone, shared, ratio = speed_up(model, size, leaves, torch.device("cuda"), torch.bfloat16)
        name = f"{shape}, {leaves} leaves"
        found += [
            Figure(f"{name}: AR step, one GPU", alone, "ms"),
            Figure(f"{name}: AR step, {size} GPUs", shared, "ms"),
            Figure(f"{name}: {size} GPUs over one", ratio, "x", *_only_for_two(size, bar, reach)),
        ]
    return found


def _shape(shape: str, size: int, bars: bool) -> list[Figure]:
    options = ShapeBenchOptions(
        shape=shape,
        batches=BATCHES,
        rounds=2,
        tokens_per_cycle=(10.6,),
        mixed_batch=0,
        prompts=(),
        hugging_face=False,
        tensor_parallel=size,
    )
    report = shape_bench(options, progress=lambda line: print(line, file=sys.stderr))
    step = report.passes[0]
    figures = [
        Figure(
            f"{shape}, {size} GPUs: AR step at batch 1, share of the read roof",
            step.share_of_read,
            "",
            *((0.8, 0.88) if bars and size == 2 else (0.7, 0.7) if bars else ()),
        ),
        Figure(f"{shape}, {size} GPUs: AR step at batch 1", step.milliseconds, "ms"),
    ]
    for batch, reach in zip(BATCHES, (7.8, 8.0), strict=True):
        [speed] = [s for s in report.speeds if s.batch == batch and s.contestant.startswith("orthrus")]
        name = f"{shape}, {size} GPUs: Orthrus over AR at batch {batch}, {speed.tokens_per_cycle:.1f} tokens per cycle"
        asked = (None, reach) if bars else ()
        figures.append(Figure(name, speed.over_ar.median, "x", *asked))
    if not report.exact:
        raise AssertionError(f"{shape} on {size} GPUs: schedules gave different tokens")
    return figures


def _only_for_two(size: int, bar: float, reach: float) -> tuple[float, float] | tuple[()]:
    return (bar, reach) if size == 2 else ()


def _exchange(size: int) -> list[Figure]:
    from torch.multiprocessing.spawn import spawn

    with TemporaryDirectory() as folder:
        spawn(_time_exchange, (size, folder), nprocs=size)
        times = json.loads((Path(folder) / "times").read_text())
    return [
        Figure(
            f"exchange of {rows} rows x {WIDTH} among {size} GPUs",
            time,
            "us",
            *(_only_for_two(size, 9, 6) if rows == "32" else ()),
        )
        for rows, time in times.items()
    ]


def _time_exchange(rank: int, size: int, folder: str) -> None:
    from orthrus.kernels.linear.add_rms_norm import add_rms_norm
    from orthrus.kernels.ranks.peer_memory import PeerMemory

    device = torch.device("cuda", rank)
    peers = PeerMemory(rank, size, device, f"{folder}/ranks", PeerSizes(64, WIDTH, 8, 1024, 64))
    norm = torch.randn(WIDTH, device=device).bfloat16()
    times = {}
    for rows in (1, 32, 64):
        sums = torch.randn(1, rows, WIDTH, device=device)
        residual = torch.randn(rows, WIDTH, device=device).bfloat16()
        exchange = partial(add_rms_norm, sums, residual, norm, 1e-6, peers=peers)
        exchange()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(EXCHANGES):
                exchange()
        graph.replay()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(PASSES + 1)]
        for event in events:
            event.record()
            graph.replay()
        torch.cuda.synchronize()
        each = [before.elapsed_time(after) for before, after in pairwise(events)]
        times[rows] = statistics.median(each) * 1e3 / EXCHANGES
    assert int(peers.status[0]) == 0, "a rank was waited for in vain"
    if rank == 0:
        (Path(folder) / "times").write_text(json.dumps(times))


def parts(size: int) -> dict[str, Callable[[], list[Figure]]]:
    """The parts, by name. Each measures some figures."""
    return {
        "exchange": partial(_exchange, size),
        "8B": partial(_steps, "8B", size, 1.4, 1.65),
        "32B": partial(_steps, "32B", size, 1.7, 1.85),
        "72B": partial(_shape, "72B", size, True),
        "8B-ratio": partial(_shape, "8B", 1, False),
    }


def measure(size: int, names: Sequence[str]) -> list[Figure]:
    """Run the parts with these names, and print the figures of each as soon as they are measured."""
    found: list[Figure] = []
    for name in names:
        # A process for each part: memory that a graph or a frozen heap holds is freed with it.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            figures = process.submit(parts(size)[name]).result()
        print(*figures, sep="\n", flush=True)
        found += figures
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("size", type=int, choices=(2, 4, 8), help="GPUs that share a model")
    parser.add_argument("--part", nargs="+", choices=[*parts(2)], default=[*parts(2)], help="default: all")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    arguments = parser.parse_args()
    if torch.cuda.device_count() < arguments.size:
        parser.error(f"{arguments.size} GPUs are needed, and there are {torch.cuda.device_count()}")
    found = measure(arguments.size, arguments.part)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(figure) for figure in found], indent=2))


if __name__ == "__main__":
    main()
