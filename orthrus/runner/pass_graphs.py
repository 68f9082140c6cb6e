"""`PassGraphs`: the CUDA graphs that run a model's passes, and the memory that they read and write.

Graphs are captured for a few numbers of rows. A pass uses those for the next larger number. Everything else about a pass is in
its buffer on the device: tokens, positions, slots, block tables, and attention's work list (`PassFields`).

Where every row needs logits, as when decoding, one graph runs the layers and the head. There are two such graphs for each
number of rows: one without the kernel that merges divided rows of attention, for passes that have no such rows. All other
passes run a graph of the layers, and then a graph of the head for as many rows as need logits.

Where drafts have weights of their own, their passes have graphs of their own, of layers and head in one. The rows that need
logits are gathered between the two: a block's last row needs none.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from orthrus.cache.kv_cache import KVCache
from orthrus.kernels import workspace
from orthrus.kernels.attention import AttentionPlan, AttentionWork
from orthrus.kernels.attention.place_blocks import place_blocks
from orthrus.kernels.attention.work_list import header_of
from orthrus.kernels.rows.types import KVWrites
from orthrus.models.forward import LayerParallelForward
from orthrus.models.stack import LayerStack
from orthrus.plan import PassPlan
from orthrus.runner.pass_buffer import PassFields
from orthrus.runner.pass_tensors import RECORDS, PassTensors


class PassGraphs:
    """The graphs of one model over one cache. They are captured when this is made, which takes some seconds."""

    tensors: PassTensors
    """What the passes read and write."""

    def __init__(
        self,
        forward: LayerParallelForward,
        cache: KVCache,
        *,
        row_sizes: list[int],
        logit_sizes: list[int],
        draft_sizes: list[int],
        buffer_size: int,
        picks_ranks: bool,
    ) -> None:
        """row_sizes, logit_sizes: the numbers of rows, and of rows that need logits, to capture graphs for, in rising order.

        draft_sizes: the numbers of rows of passes that run on the drafts' own weights; ignored if there are none. picks_ranks:
        whether passes with rows of drafts write `PassTensors.further`.
        """
        self._forward, self._cache = forward, cache
        self._row_sizes, self._logit_sizes = row_sizes, logit_sizes
        self._draft_sizes = draft_sizes if forward.draft is not None else []
        self._max_logits = logit_sizes[-1]
        self._picks_ranks = picks_ranks
        self.tensors = PassTensors.allocate(forward, self._max_logits, buffer_size)
        # How many tokens of the vocabulary each rank has, if logits are gathered by a library. Else empty.
        self._widths = forward.shard.vocabulary_widths if forward.ranks.collective else []
        self._captures = torch.cuda.Stream(forward.device)
        self._pool = torch.cuda.graph_pool_handle()
        self._row_graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._head_graphs: dict[int, torch.cuda.CUDAGraph] = {}
        # Layers and head, by the number of rows and by whether attention may have divided rows.
        self._whole_graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        # The same on the drafts' own weights.
        self._draft_graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        # By number of rows, kept because making them takes longer than a launch.
        self._fields: dict[int, PassFields[Tensor]] = {}
        self._capture_all()

    def fields(self, num_rows: int = 0) -> PassFields[Tensor]:
        """The buffer's fields, for a pass of `num_rows` rows."""
        return PassFields.of(self.tensors.buffer, num_rows, self._max_logits)

    def replay(self, fields: PassFields[np.ndarray]) -> None:
        """Launch the pass that is in the buffer. fields: the host's view of the same numbers."""
        rows, count = int(fields.num_rows[0]), int(fields.num_logits[0])
        if copies := int(fields.num_copies[0]):
            self._copy_pages(rows, copies, int(fields.copies_at[0]))
        if moving := int(fields.num_moving[0]):
            self._place_blocks(rows, moving, int(fields.moving_at[0]))
        if self._draft_graphs and not fields.num_ar[0]:
            self._draft_graphs[rows, bool(header_of(fields.work)["num_divided"])].replay()
            return
        head_rows = next(size for size in self._logit_sizes if size >= count)
        if count and head_rows == rows and np.array_equal(fields.logit_rows[:count], np.arange(count)):
            self._whole_graphs[rows, bool(header_of(fields.work)["num_divided"])].replay()
            return
        self._row_graphs[rows].replay()
        if count:
            self._head_graphs[head_rows].replay()

    def gather_logits(self, count: int) -> None:
        """Where GPUs have no memory in common: fetch the other ranks' logits of the first `count` rows into `logits`."""
        parts = self._forward.ranks.gather(self.tensors.own_logits[:count], self._widths)
        self.tensors.logits[:count] = parts

    def _copy_pages(self, rows: int, count: int, list_at: int) -> None:
        """Copy the pages that a pass of `rows` rows has listed at `copies_at`."""
        self._cache.copy_pages(self._device_fields(rows).work[list_at:], count)

    def _device_fields(self, rows: int) -> PassFields[Tensor]:
        """`fields`, made once for each number of rows."""
        if rows not in self._fields:
            self._fields[rows] = self.fields(rows)
        return self._fields[rows]

    def _place_blocks(self, rows: int, count: int, list_at: int) -> None:
        """Move the blocks of a pass of `rows` rows to where the picks of the pass before put them. list_at: `moving_at`."""
        fields = self._device_fields(rows)
        place_blocks(
            fields.work[list_at:],
            count,
            self.tensors.picks,
            fields.tokens,
            fields.positions,
            fields.noise_keys,
            fields.work,
        )

    def _capture_all(self) -> None:
        rows, heads = self._row_sizes[::-1], self._logit_sizes[::-1]
        whole = [(size, divided) for size in heads if size in rows for divided in (True, False)]
        drafts = [(size, divided) for size in self._draft_sizes[::-1] for divided in (True, False)]
        total = len(rows) + len(heads) + len(whole) + len(drafts)
        bar = tqdm(total=total, desc="CUDA graphs", unit="graph", disable=None)
        with bar, workspace.kept_in_l2(self.tensors.results, self._captures):
            for size in rows:
                self._row_graphs[size] = self._capture(partial(self._run_rows, size), bar)
            for size in heads:
                self._head_graphs[size] = self._capture(partial(self._run_head, size), bar)
            for key in whole:
                self._whole_graphs[key] = self._capture(partial(self._run_whole, *key), bar)
            for key in drafts:
                self._draft_graphs[key] = self._capture(partial(self._run_draft, *key), bar)
        # Compiles the kernels. The buffer holds zeros: a block without rows, and a copy of nothing.
        self._place_blocks(rows[0], 1, 0)
        self._copy_pages(rows[0], 1, 0)
        # Graphs have memory of their own. Free what the runs before the captures took, for passes that adjust logits.
        torch.cuda.empty_cache()

    def _capture(self, run: Callable[[], None], bar: tqdm) -> torch.cuda.CUDAGraph:
        """Capture what `run` launches as a graph. It runs once before that, to compile its kernels. The buffer then holds zeros,
        which are rows of no group."""
        with workspace.results_in(self.tensors.results):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Not by torch.cuda.graph(), which collects garbage before every capture.
        with torch.cuda.stream(self._captures), workspace.results_in(self.tensors.results):
            # A thread of NCCL queries its events meanwhile, which a "global" capture would not allow.
            mode = "thread_local" if self._widths else "global"
            graph.capture_begin(pool=self._pool, capture_error_mode=mode)
            run()
            graph.capture_end()
        bar.update()
        return graph

    def _plan(self, rows: int, divided: bool = True) -> PassPlan:
        """The buffer as the plan of a pass of `rows` rows. divided: whether attention may have divided rows."""
        fields = self.fields(rows)
        work = AttentionWork(fields.work, RECORDS if divided else 0)
        return PassPlan(
            tokens=fields.tokens,
            positions=fields.positions,
            writes=KVWrites(fields.slots, fields.more_ends, fields.more_slots),
            num_ar=fields.num_ar,
            attention=AttentionPlan(
                (), self._cache.page_size, self._forward.heads_per_kv, self.tensors.buffer.device, work
            ),
            logit_rows=fields.logit_rows[:rows],
        )

    @torch.inference_mode()
    def _run_rows(self, rows: int) -> None:
        plan = self._plan(rows)
        hidden = self._forward.hidden_states(plan, self._cache, self.tensors.picks)
        torch.index_select(hidden, 0, plan.logit_rows, out=self.tensors.hidden[: plan.logit_rows.shape[0]])

    @torch.inference_mode()
    def _run_head(self, rows: int) -> None:
        self._pick(self.tensors.hidden[:rows], self._forward.exact)

    @torch.inference_mode()
    def _run_whole(self, rows: int, divided: bool) -> None:
        hidden = self._forward.hidden_states(self._plan(rows, divided), self._cache, self.tensors.picks)
        if self._forward.num_medusa_heads:
            self.tensors.hidden[:rows].copy_(hidden)
        self._pick(hidden, self._forward.exact)

    @torch.inference_mode()
    def _run_draft(self, rows: int, divided: bool) -> None:
        plan, stack = self._plan(rows, divided), self._forward.draft
        assert stack is not None
        hidden = self._forward.hidden_states(plan, self._cache, self.tensors.picks, stack)
        self._pick(torch.index_select(hidden, 0, plan.logit_rows, out=self.tensors.hidden[:rows]), stack)

    def _pick(self, hidden: Tensor, stack: LayerStack) -> None:
        """Pick from final hidden states [rows, hidden_size], and write their logits if the pass wants them."""
        rows = hidden.shape[0]
        fields = self.fields()
        drafts = stack is self._forward.draft or self._forward.draft is None
        further = self.tensors.further[:rows] if drafts and self._picks_ranks else None
        stack.head.linear_gumbel_argmax(
            hidden,
            self.tensors.own_logits[:rows],
            fields.wants_logits,
            fields.temperatures[:rows],
            fields.noise_keys[:rows],
            self.tensors.picks,
            fields.first_pick,
            further=further,
        )
