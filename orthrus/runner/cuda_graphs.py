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
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kernels import AttentionPlan, gumbel_argmax, upload, workspace
from kernels.attention.triton import attention_programs, shares_tiles, tile_rows
from kernels.attention.work import DIVIDED_ROWS, AttentionWork, plan_work, work_size
from orthrus.cache.kv_cache import KVCache
from orthrus.models.forward import LayerParallelForward
from orthrus.plan import PassPlan, RowGroup, flatten
from orthrus.runner.protocol import LaunchedPass
from orthrus.runner.sampler import PickRows, adjust, follow_masks, row_keys, row_temperatures

_RECORDS = 4096
"""Rows x segments of attention whose partial results have room; what needs more is not divided."""
_GRAPH_BYTES = 1 << 30
"""Room for the graphs themselves, compiled kernels, and what else is not counted."""
_NUM_AR, _FIRST_PICK, _WANTS_LOGITS = 0, 1, 2
_BEFORE_HEAD = 8
_HEAD_FIELDS = 4
_ROW_FIELDS = 3


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


@dataclass
class _Upload:
    """A plan's numbers in page-locked memory, as a tensor and as the same array; see `CudaGraphRunner` for their order."""

    size: int
    tensor: Tensor = field(init=False)
    array: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.tensor = torch.zeros(self.size, dtype=torch.int32, pin_memory=True)
        self.array = self.tensor.numpy()


def pass_bytes(forward: LayerParallelForward, page_size: int, max_rows: int, max_logits: int) -> int:
    """GPU memory that a runner of such passes needs besides weights and KV cache, by running its largest pass."""
    device, rows = forward.device, row_buckets(max_rows)[-1]
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    cache = KVCache.allocate(forward.config, 2, page_size, device, forward.dtype)
    zeros = torch.zeros(_ROW_FIELDS, rows, dtype=torch.int32, device=device)
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

    The buffer of a pass, int32: number of AR rows, place of the first pick, whether logits are wanted; for the head: rows that
    need logits, temperatures (float32), noise keys (two each), each with room for `max_logits`; then for each row of the
    bucket: tokens, positions, slots; then attention's work list.
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
        self._rows_at = _BEFORE_HEAD + _HEAD_FIELDS * most_logits
        most_rows = self._row_buckets[-1]
        size = self._rows_at + _ROW_FIELDS * most_rows
        size += work_size(rows=most_rows, programs=self._programs, capacity=_RECORDS, pages=max_pages)
        self._buffer = torch.zeros(size, dtype=torch.int32, device=device)
        self._uploads = [_Upload(size), _Upload(size)]
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
        used = len(flat.tokens)
        bucket = next(size for size in self._row_buckets if size >= used)
        count = len(flat.logit_rows)
        work = plan_work(
            flat.groups,
            tile_rows=self._tile_rows,
            shared=self._shares_tiles,
            programs=self._programs,
            capacity=_RECORDS,
        )
        staged = self._uploads[self._turn]
        array = staged.array
        # Rows that fill the bucket up are of the view that comes last.
        array[_NUM_AR] = flat.num_ar if flat.num_ar < used else bucket
        array[_FIRST_PICK] = first_pick
        array[_WANTS_LOGITS] = wants_logits
        most = self.max_logits
        logit_rows, temperatures, keys = np.split(array[_BEFORE_HEAD : self._rows_at], [most, 2 * most])
        logit_rows[:count] = flat.logit_rows
        logit_rows[count:] = 0
        if rows:
            temperatures[:count] = row_temperatures(rows).view(np.int32)
            keys[: 2 * count] = row_keys(rows).ravel()
        fields = array[self._rows_at : self._rows_at + _ROW_FIELDS * bucket].reshape(_ROW_FIELDS, bucket)
        for row, values in zip(fields, (flat.tokens, flat.positions, flat.slots), strict=True):
            row[: len(values)] = values
            row[len(values) :] = 0
        end = self._rows_at + _ROW_FIELDS * bucket + len(work)
        array[end - len(work) : end] = work
        upload(staged.tensor[:end], self._buffer[:end])
        head_bucket = next(size for size in self._head_buckets if size >= count)
        if count and head_bucket == bucket and np.array_equal(flat.logit_rows, np.arange(count)):
            self._whole_graphs[bucket, bool(work[DIVIDED_ROWS])].replay()
        else:
            self._row_graphs[bucket].replay()
            if count:
                self._head_graphs[head_bucket].replay()
        return count

    def _pick_elsewhere(self, rows: Sequence[PickRows], first_pick: int) -> None:
        """Replace the picks of groups that don't pick from the logits as they are."""
        temperatures, keys = self._pick_settings()
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

    def _pick_settings(self) -> tuple[Tensor, Tensor]:
        """Temperatures [max_logits] and noise keys [max_logits, 2] in the buffer."""
        most = self.max_logits
        temperatures, keys = self._buffer[_BEFORE_HEAD + most : self._rows_at].split([most, 2 * most])
        return temperatures.view(torch.float32), keys.view(-1, 2)

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
        first = self._rows_at
        fields = self._buffer[first : first + _ROW_FIELDS * rows].view(_ROW_FIELDS, rows)
        tokens, positions, slots = fields.unbind()
        num_ar = self._buffer[_NUM_AR : _NUM_AR + 1]
        work = AttentionWork(self._buffer[first + _ROW_FIELDS * rows :], _RECORDS if divided else 0)
        most = self.max_logits
        return PassPlan(
            tokens=tokens,
            positions=positions,
            slots=slots,
            num_ar=num_ar,
            attention=AttentionPlan(
                (), self._cache.page_size, self._forward.heads_per_kv, self._buffer.device, work
            ),
            logit_rows=self._buffer[_BEFORE_HEAD : _BEFORE_HEAD + min(rows, most)],
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
        temperatures, keys = self._pick_settings()
        self._forward.head.linear_gumbel_argmax(
            hidden,
            self._logits[:rows],
            self._buffer[_WANTS_LOGITS : _WANTS_LOGITS + 1],
            temperatures[:rows],
            keys[:rows],
            self._picks,
            self._buffer[_FIRST_PICK : _FIRST_PICK + 1],
        )
