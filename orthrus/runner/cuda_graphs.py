"""The model runner of GPUs: every pass is a replay of a CUDA graph, fed by one copy of the plan.

Graphs are captured for each of a few row counts, when the engine starts; a pass is filled up to the next one. Nothing else of
it is fixed: tokens, views, page tables and the work list of attention are numbers in one buffer on the device. Where all rows
need logits, as in the steps and blocks of decoding, one graph holds the layers and the head, and there is one without the
kernel that merges divided rows of attention, for passes that have none. Other passes replay a graph of layers, then one of
the head for as many rows as need logits. Picks stay on the device too, in a ring of two passes, and the plan of a pass may
refer to them: so it is uploaded and launched while the one before it still runs, and the host waits only for what it has to
know.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kernels import AttentionPlan, gumbel_argmax, upload, workspace
from kernels.attention import AttentionWork
from kernels.attention.gpu import attention_programs, shares_tiles, tile_rows
from kernels.attention.work_list import header_of, plan_work, work_size
from orthrus.cache.kv_cache import KVCache
from orthrus.models.forward import LayerParallelForward
from orthrus.plan import PassPlan, RowGroup, flatten
from orthrus.runner.pass_buffer import PassBuffer, PassFields, buffer_size
from orthrus.runner.protocol import LaunchedPass
from orthrus.runner.sampler import PickRows, adjust, follow_masks

_RECORDS = 4096
"""Rows x segments of attention whose partial results have room; what needs more is not divided."""
_GRAPH_BYTES = 1 << 30
"""Room for the graphs themselves, compiled kernels, and what else is not counted."""


def row_buckets(most: int) -> list[int]:
    """Row counts that graphs are captured for, up to one that holds `most` rows.

    From 64 on they fill the linear layers' tiles.
    """
    sizes = [8, 16, 32, 48, 64, 128, *range(256, 1 << 20, 256)]
    last = next(i for i, size in enumerate(sizes) if size >= most)
    return sizes[: last + 1]


@dataclass(frozen=True)
class _Launched:
    """A pass on its way: `done` when its picks are in `host`."""

    logits: Tensor
    first_pick: int
    rows: Sequence[PickRows]
    host: Tensor
    done: torch.cuda.Event

    def picks(self) -> list[list[int]]:
        self.done.synchronize()
        count = sum(group.count for group in self.rows)
        return follow_masks(self.logits, self.rows, self.host[:count].tolist())


def pass_bytes(forward: LayerParallelForward, page_size: int, max_rows: int, max_logits: int) -> int:
    """GPU memory that a runner of such passes needs besides weights and KV cache, by running its largest pass."""
    device, rows = forward.device, row_buckets(max_rows)[-1]
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    cache = KVCache.allocate(forward.config, 2, page_size, device, forward.dtype)
    zeros = torch.zeros(3, rows, dtype=torch.int32, device=device)
    num_ar = torch.tensor([rows], dtype=torch.int32, device=device)
    work = AttentionWork(zeros[0], _RECORDS)
    attention = AttentionPlan((), page_size, forward.heads_per_kv, device, work)
    plan = PassPlan(zeros[0], zeros[1], zeros[2], num_ar, attention, zeros[0])
    forward.hidden_states(plan, cache, zeros[0])
    peak = torch.cuda.max_memory_allocated(device) - before
    del cache, plan, attention, work, zeros
    torch.cuda.empty_cache()
    head = row_buckets(max_logits)[-1] * (4 * forward.config.vocab_size + 2 * forward.config.hidden_size)
    return peak + head + _GRAPH_BYTES


class CudaGraphRunner:
    """Runs passes of up to `max_rows` rows, of which up to `max_logits` need logits.

    hidden: the final hidden states of the last pass with graphs for layers and head apart, as far as they need logits.
    """

    feeds_tokens = True

    def __init__(
        self,
        forward: LayerParallelForward,
        cache: KVCache,
        *,
        max_rows: int,
        max_logits: int,
        max_pages: int,
    ) -> None:
        """max_pages: of the page tables of one pass. Captures all graphs, which takes some seconds."""
        self._forward, self._cache = forward, cache
        device = forward.device
        self._tile_rows = tile_rows(forward.heads_per_kv, forward.dtype)
        self._shares_tiles = shares_tiles(forward.dtype, forward.config.head_dim)
        self._programs = max(1, attention_programs(device) // forward.config.num_key_value_heads)
        self._row_buckets = row_buckets(max_rows)
        self._head_buckets = row_buckets(max_logits)
        most_logits = self.max_logits = self._head_buckets[-1]
        most_rows = self._row_buckets[-1]
        max_work = work_size(rows=most_rows, programs=self._programs, capacity=_RECORDS, pages=max_pages)
        size = buffer_size(max_rows=most_rows, max_logits=most_logits, max_work=max_work)
        self._buffer = torch.zeros(size, dtype=torch.int32, device=device)
        # For two passes: the one that runs, and the one that is written meanwhile.
        self._host_buffers = [PassBuffer(size, most_logits, pinned=True) for _ in range(2)]
        self._picks = torch.zeros(2 * most_logits, dtype=torch.int32, device=device)
        self._host_picks = [torch.zeros(most_logits, dtype=torch.int32, pin_memory=True) for _ in range(2)]
        self.hidden = torch.zeros(most_logits, forward.config.hidden_size, device=device, dtype=forward.dtype)
        self._logits = torch.zeros(most_logits, forward.config.vocab_size, device=device, dtype=torch.float32)
        self._results = torch.empty(workspace.BYTES, device=device, dtype=torch.uint8)
        self._zero = torch.zeros(1, dtype=torch.int32, device=device)
        self._turn = 0
        # Where picks go to the host, so that the next pass does not wait for that.
        self._downloads = torch.cuda.Stream(device)
        self._captures = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._row_graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._head_graphs: dict[int, torch.cuda.CUDAGraph] = {}
        # Layers and head, by rows and whether attention has divided rows.
        self._whole_graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._capture_all()

    def launch(self, groups: Sequence[RowGroup], rows: Sequence[PickRows]) -> LaunchedPass:
        most = self.max_logits
        self._turn ^= 1
        first_pick = self._turn * most
        wants_logits = any(group.reads_logits for group in rows)
        count = self._start(groups, rows, first_pick, wants_logits)
        if wants_logits and not all(group.plain for group in rows):
            self._pick_elsewhere(rows, first_pick)
        host = self._host_picks[self._turn]
        self._downloads.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._downloads):
            host[:count].copy_(self._picks[first_pick : first_pick + count], non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        return _Launched(self._logits, first_pick, rows, host, done)

    def logits(self, groups: Sequence[RowGroup]) -> Tensor:
        count = self._start(groups, (), self._turn * self.max_logits, wants_logits=True)
        logits = self._logits[:count].clone()
        torch.cuda.current_stream().synchronize()  # The next pass's plan goes to the same page-locked memory.
        return logits

    def _start(
        self, groups: Sequence[RowGroup], rows: Sequence[PickRows], first_pick: int, wants_logits: bool
    ) -> int:
        """Upload the plan and replay its graphs. Returns how many rows need logits."""
        flat = flatten(groups, self._cache.page_size)
        bucket = next(size for size in self._row_buckets if size >= len(flat.tokens))
        work = plan_work(
            flat.groups,
            tile_rows=self._tile_rows,
            shared=self._shares_tiles,
            programs=self._programs,
            capacity=_RECORDS,
        )
        buffer = self._host_buffers[self._turn]
        fields = buffer.fill(
            flat, rows, work, num_rows=bucket, first_pick=first_pick, wants_logits=wants_logits
        )
        used = int(fields.num_used[0])
        upload(buffer.numbers[:used], self._buffer[:used])
        self._replay(fields)
        return len(flat.logit_rows)

    def _replay(self, fields: PassFields[np.ndarray]) -> None:
        """Run the graphs of a pass whose buffer is on the device. fields: the host's view of the same numbers."""
        rows, count = int(fields.num_rows[0]), int(fields.num_logits[0])
        head_rows = next(size for size in self._head_buckets if size >= count)
        if count and head_rows == rows and np.array_equal(fields.logit_rows[:count], np.arange(count)):
            self._whole_graphs[rows, bool(header_of(fields.work)["num_divided"])].replay()
            return
        self._row_graphs[rows].replay()
        if count:
            self._head_graphs[head_rows].replay()

    def _pick_elsewhere(self, rows: Sequence[PickRows], first_pick: int) -> None:
        """Replace the picks of groups that don't pick from the logits as they are."""
        fields = self._fields(0)
        temperatures, keys = fields.temperatures, fields.noise_keys
        start = 0
        for plain, members in itertools.groupby(rows, key=lambda group: group.plain):
            groups = list(members)
            end = start + sum(group.count for group in groups)
            if not plain:
                adjusted = adjust(self._logits[start:end], groups)
                gumbel_argmax(
                    adjusted,
                    temperatures[start:end],
                    keys[start:end],
                    self._picks[first_pick + start :],
                    self._zero,
                )
            start = end

    def _fields(self, rows: int) -> PassFields[Tensor]:
        """The fields in the device's buffer, of a pass of `rows` rows."""
        return PassFields.of(self._buffer, rows, self.max_logits)

    # --- capture

    def _capture_all(self) -> None:
        rows, heads = self._row_buckets[::-1], self._head_buckets[::-1]
        whole = [(size, divided) for size in heads if size in rows for divided in (True, False)]
        bar = tqdm(total=len(rows) + len(heads) + len(whole), desc="CUDA graphs", unit="graph", disable=None)
        with bar, workspace.kept_in_l2(self._results, self._captures):
            for size in rows:
                self._row_graphs[size] = self._capture(partial(self._run_rows, size), bar)
            for size in heads:
                self._head_graphs[size] = self._capture(partial(self._run_head, size), bar)
            for key in whole:
                self._whole_graphs[key] = self._capture(partial(self._run_whole, *key), bar)

    def _capture(self, run: Callable[[], None], bar: tqdm) -> torch.cuda.CUDAGraph:
        """Capture `run`, after a first run that compiles its kernels. The buffer is all zero: rows of no group."""
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph(): it collects garbage before each of many captures.
        with torch.cuda.stream(self._captures), workspace.results_in(self._results):
            graph.capture_begin(pool=self._pool)
            run()
            graph.capture_end()
        bar.update()
        return graph

    def _plan(self, rows: int, divided: bool = True) -> PassPlan:
        """The buffer as a plan for `rows` rows. divided: attention may have divided rows."""
        fields = self._fields(rows)
        work = AttentionWork(fields.work, _RECORDS if divided else 0)
        return PassPlan(
            tokens=fields.tokens,
            positions=fields.positions,
            slots=fields.slots,
            num_ar=fields.num_ar,
            attention=AttentionPlan(
                (), self._cache.page_size, self._forward.heads_per_kv, self._buffer.device, work
            ),
            logit_rows=fields.logit_rows[:rows],
        )

    @torch.inference_mode()
    def _run_rows(self, rows: int) -> None:
        plan = self._plan(rows)
        hidden = self._forward.hidden_states(plan, self._cache, self._picks)
        torch.index_select(hidden, 0, plan.logit_rows, out=self.hidden[: plan.logit_rows.shape[0]])

    @torch.inference_mode()
    def _run_head(self, rows: int) -> None:
        self._score(self.hidden[:rows])

    @torch.inference_mode()
    def _run_whole(self, rows: int, divided: bool) -> None:
        self._score(self._forward.hidden_states(self._plan(rows, divided), self._cache, self._picks))

    def _score(self, hidden: Tensor) -> None:
        """Picks of final hidden states, and their logits if the pass wants them."""
        rows = hidden.shape[0]
        fields = self._fields(0)
        self._forward.head.linear_gumbel_argmax(
            hidden,
            self._logits[:rows],
            fields.wants_logits,
            fields.temperatures[:rows],
            fields.noise_keys[:rows],
            self._picks,
            fields.first_pick,
        )
