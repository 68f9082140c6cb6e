"""The runner of GPUs: it writes each pass into a buffer, copies that to the device, and replays graphs (`PassGraphs`).

The picks of the last two passes stay on the device, and the tokens of the next pass may refer to them. So a pass can be launched
while the one before it still runs. The host waits only for picks that it has to know.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from orthrus.cache.kv_cache import KVCache
from orthrus.kernels import workspace
from orthrus.kernels.attention import AttentionPlan, AttentionWork
from orthrus.kernels.attention.gpu import attention_programs, shares_tiles, tile_rows
from orthrus.kernels.attention.work_list import plan_work, work_size
from orthrus.kernels.ranks import RankError, Ranks
from orthrus.kernels.ranks.peer_triton import receive_picks, send_picks
from orthrus.kernels.rows.sampling import best_tokens, gumbel_argmax
from orthrus.kernels.rows.types import KVWrites
from orthrus.kernels.rows.upload import upload
from orthrus.loading import stages
from orthrus.models.forward import LayerParallelForward
from orthrus.plan import MAX_RANKS, PassPlan, RowGroup, flatten
from orthrus.runner.graph_sizes import graph_sizes
from orthrus.runner.head_picks import head_picks
from orthrus.runner.pass_buffer import PassBuffer, PassFields, buffer_size
from orthrus.runner.pass_graphs import PassGraphs
from orthrus.runner.pass_memory import PassMemory, PassRoom
from orthrus.runner.pass_tensors import RECORDS, PassTensors
from orthrus.runner.protocol import LaunchedPass, RunnerLimits
from orthrus.runner.sampler import PickRows, adjust, runs

_POLL_SECONDS = 50e-6


@dataclass(frozen=True)
class _Launched:
    """See `LaunchedPass`."""

    logits: Tensor
    first_pick: int
    host: Tensor
    """int32 [rows that need logits], in page-locked memory: the picks, once `done` has happened."""
    done: torch.cuda.Event
    ranks: Ranks
    host_status: Tensor
    """`PeerMemory.status` in page-locked memory, once `done` has happened; zeros where there is one rank."""

    def picks(self) -> list[int]:
        _wait(self.done, self.ranks)
        _check(self.host_status, self.ranks)
        return self.host.tolist()


def _check(host_status: Tensor, ranks: Ranks) -> None:
    """Raise RankError if a rank did not take part in a pass. host_status: see `_Launched`."""
    if late := int(host_status[0]):
        ranks.check()  # Raises a more exact error if the rank has ended.
        raise RankError(f"rank {late - 1} of the model did not take part in a pass: see its log")


def _wait(event: torch.cuda.Event, ranks: Ranks) -> None:
    """Wait for an event of this GPU. NCCL would wait for a rank forever, so with NCCL RankError is raised if one has ended."""
    while ranks.collective and not event.query():
        ranks.check()
        time.sleep(_POLL_SECONDS)
    event.synchronize()


@dataclass(frozen=True)
class RunBuffer:
    """Rank 0's message for a pass: the numbers of its buffer that the pass uses."""

    numbers: bytes


@dataclass(frozen=True)
class ReceivePicks:
    """Rank 0's message after it has picked again: it has sent the other ranks `count` picks, from place `first` on."""

    first: int
    count: int


def _programs(forward: LayerParallelForward) -> int:
    """How many programs share the work list of one key head."""
    return max(1, attention_programs(forward.device) // forward.config.num_key_value_heads)


def _buffer_size(forward: LayerParallelForward, max_rows: int, max_logits: int, max_pages: int) -> int:
    """Numbers of the pass buffer. max_rows, max_logits: numbers that graphs are captured for; max_pages: as in `build`."""
    work = work_size(rows=max_rows, programs=_programs(forward), capacity=RECORDS, pages=max_pages)
    return buffer_size(max_rows=max_rows, max_logits=max_logits, max_work=work)


class CudaGraphRunner:
    """See `ModelRunner`."""

    graphs: PassGraphs
    feeds_tokens = True

    def __init__(self, forward: LayerParallelForward, cache: KVCache, limits: RunnerLimits) -> None:
        """Capture all graphs, which takes some seconds.

        limits: numbers of rows are rounded up to those that graphs are captured for.
        """
        device, dtype, config = forward.device, forward.dtype, forward.config
        self._page_size = cache.page_size
        self._tile_rows = tile_rows(forward.heads_per_kv, dtype)
        self._shares_tiles = shares_tiles(dtype, config.head_dim)
        self._programs = _programs(forward)
        self.row_sizes, logit_sizes = tuple(graph_sizes(limits.max_rows)), graph_sizes(limits.max_logits)
        self.max_logits = logit_sizes[-1]
        self._max_picks = MAX_RANKS * self.max_logits
        size = _buffer_size(forward, self.row_sizes[-1], self.max_logits, limits.max_pages)
        # For two passes: the one that runs, and the one that is written meanwhile.
        self._host_buffers = [PassBuffer(size, self.max_logits, pinned=True) for _ in range(2)]
        self._host_picks = [
            torch.zeros(self._max_picks, dtype=torch.int32, pin_memory=True) for _ in range(2)
        ]
        # Which of the two the last pass used.
        self._side = 0
        # Picks go to the host on a stream of their own, so that the next pass does not wait for them.
        self._downloads = torch.cuda.Stream(device)
        self._zero = torch.zeros(1, dtype=torch.int32, device=device)
        self._ranks, self._peers = forward.ranks, forward.ranks.peers
        # Picking several tokens for a row is cheap on one GPU only: several GPUs would have to exchange logits.
        self._shared = forward.ranks.size > 1
        self.picks_ranks = limits.wants_ranks and not self._shared
        self._host_status = torch.zeros(2, dtype=torch.int64, pin_memory=True)
        # On ranks other than 0: done when each host buffer has been copied to the device.
        self._uploaded = [torch.cuda.Event() for _ in range(2)]
        self.graphs = PassGraphs(
            forward,
            cache,
            row_sizes=list(self.row_sizes),
            logit_sizes=logit_sizes,
            draft_sizes=[size for size in self.row_sizes if size in logit_sizes],
            buffer_size=size,
            picks_ranks=self.picks_ranks,
        )
        self._forward, self._tensors = forward, self.graphs.tensors
        # The fields whose place does not depend on the number of rows. Making them for each pass would take time.
        self._head = self.graphs.fields()
        # Compiles the kernels that pick from adjusted logits: the graphs may have none of them.
        self._pick_from(self._tensors.logits[:1], slice(0, 1), 0)
        if self._shared:
            self._meet_ranks()

    def _meet_ranks(self) -> None:
        """Compile the kernels that exchange picks, and wait for the other ranks."""
        self._exchange_picks(0, 1)
        torch.cuda.synchronize(self._forward.device)
        self._ranks.least(0)
        if self._peers is not None:
            self._peers.start()

    @staticmethod
    def build(forward: LayerParallelForward, cache: KVCache, limits: RunnerLimits) -> "CudaGraphRunner":
        """See `RunnerFactory`."""
        stages.info("capturing CUDA graphs")
        return CudaGraphRunner(forward, cache, limits)

    @staticmethod
    def pass_memory(
        forward: LayerParallelForward, page_size: int, kv_format: str, room: PassRoom, max_pages: int
    ) -> PassMemory:
        """See `RunnerFactory`. Runs the layers of the largest pass, without its graph."""
        device, rows, logit_rows = (
            forward.device,
            graph_sizes(room.rows)[-1],
            graph_sizes(room.logit_rows)[-1],
        )
        size = _buffer_size(forward, rows, logit_rows, max_pages)
        tensors = PassTensors.allocate(forward, logit_rows, size, torch.device("meta"))
        # Results go here, as in a captured pass. They are a part of `plans`, so `layers` must not count them.
        results = torch.empty_like(tensors.results, device=device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        cache = KVCache.allocate(forward.config, 2, page_size, device, forward.dtype, kv_format)
        zeros = torch.zeros(3, rows, dtype=torch.int32, device=device)
        num_ar = torch.tensor([rows], dtype=torch.int32, device=device)
        work = AttentionWork(zeros[0], RECORDS)
        attention = AttentionPlan((), page_size, forward.heads_per_kv, device, work)
        plan = PassPlan(zeros[0], zeros[1], KVWrites.single(zeros[2]), num_ar, attention, zeros[0])
        with workspace.results_in(results):
            forward.hidden_states(plan, cache, zeros[0])
        peak = torch.cuda.max_memory_allocated(device) - before
        del cache, plan, attention, work, zeros, results
        torch.cuda.empty_cache()
        return PassMemory.of(
            forward.shard,
            replace(room, rows=rows, logit_rows=logit_rows),
            forward.dtype.itemsize,
            medusa_heads=forward.num_medusa_heads,
            collective=forward.ranks.collective,
            layers=peak,
            plans=tensors.plan_bytes,
        )

    def launch(self, groups: Sequence[RowGroup], rows: Sequence[PickRows]) -> LaunchedPass:
        self._side ^= 1
        first_pick = self._side * self._max_picks
        # Where `picks_ranks`, further tokens of a row are picked without stored logits, unless these are adjusted.
        wants_logits = any(group.reads_logits or (group.ranks > 1 and not self.picks_ranks) for group in rows)
        count = self._start(groups, rows, first_pick, wants_logits)
        num_picks = count + self._pick_further_ranks(rows, first_pick + count)
        adjusted = wants_logits and not all(group.unadjusted for group in rows)
        if adjusted:
            self._pick_adjusted(rows, first_pick)
        if self._shared and (adjusted or num_picks > count):
            self._exchange_picks(first_pick, num_picks)
            self._ranks.tell(ReceivePicks(first_pick, num_picks))
        if any(group.heads for group in rows):
            num_picks += self._pick_by_heads(rows, first_pick, count, num_picks)
        host = self._host_picks[self._side][:num_picks]
        self._downloads.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._downloads):
            host.copy_(self._tensors.picks[first_pick : first_pick + num_picks], non_blocking=True)
            if self._peers is not None:
                self._host_status.copy_(self._peers.status, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        return _Launched(self._tensors.logits, first_pick, host, done, self._ranks, self._host_status)

    def follow(self, message: object) -> None:
        if isinstance(message, ReceivePicks):
            self._exchange_picks(message.first, message.count)
            return
        assert isinstance(message, RunBuffer)
        self._side ^= 1
        _wait(self._uploaded[self._side], self._ranks)
        _check(self._host_status, self._ranks)
        fields = self._host_buffers[self._side].load(message.numbers)
        self._run(fields)
        if self._peers is not None:
            self._host_status.copy_(self._peers.status, non_blocking=True)
        self._uploaded[self._side].record()

    def _exchange_picks(self, first: int, count: int) -> None:
        """Send rank 0's picks to the other ranks, whose own picks are from unadjusted logits. Every rank calls this."""
        if self._peers is None:
            own = self._tensors.picks[first : first + count]
            own.copy_(self._ranks.exchange(own)[0])
            return
        exchange = send_picks if self._peers.rank == 0 else receive_picks
        exchange(self._peers, self._tensors.picks, first, count)

    def logits(self, groups: Sequence[RowGroup]) -> Tensor:
        count = self._start(groups, (), self._side * self._max_picks, wants_logits=True)
        logits = self._tensors.logits[:count].clone()
        # Wait, because the next pass is written to the same host buffer.
        _wait(torch.cuda.current_stream().record_event(), self._ranks)
        if self._peers is not None:
            _check(self._peers.status.cpu(), self._ranks)
        return logits

    def _start(
        self, groups: Sequence[RowGroup], rows: Sequence[PickRows], first_pick: int, wants_logits: bool
    ) -> int:
        """Copy the pass to the device and launch its graphs. Returns how many rows need logits."""
        flat = flatten(groups, self._page_size)
        self._forward.stack_for(ar=flat.num_ar > 0, diffusion=flat.num_ar < len(flat.tokens))
        num_rows = next(size for size in self.row_sizes if size >= len(flat.tokens))
        work = plan_work(
            flat.groups,
            tile_rows=self._tile_rows,
            shared=self._shares_tiles,
            programs=self._programs,
            capacity=RECORDS,
        )
        buffer = self._host_buffers[self._side]
        fields = buffer.fill(
            flat, rows, work, num_rows=num_rows, first_pick=first_pick, wants_logits=wants_logits
        )
        if self._shared:
            self._ranks.tell(RunBuffer(buffer.dump(fields)))
        self._run(fields)
        return len(flat.logit_rows)

    def _run(self, fields: PassFields[np.ndarray]) -> None:
        """Launch the pass that is in the current host buffer."""
        used = int(fields.num_used[0])
        upload(self._host_buffers[self._side].numbers[:used], self._tensors.buffer[:used])
        self.graphs.replay(fields)
        if self._ranks.collective and fields.wants_logits[0] and (count := int(fields.num_logits[0])):
            self.graphs.gather_logits(count)

    def _pick_further_ranks(self, rows: Sequence[PickRows], first_place: int) -> int:
        """Pick the further ranks of the groups that ask for them, from place `first_place` of the picks on.

        Returns their number.
        """
        place, begin = first_place, 0
        # Neighbouring groups with the same numbers are picked together.
        for (ranks, count), members in itertools.groupby(rows, key=lambda group: (group.ranks, group.count)):
            alike = list(members)
            for span, run in runs(alike):
                if ranks == 1:
                    continue
                tokens = self._further_ranks(slice(begin + span.start, begin + span.stop), run)
                further = tokens.reshape(len(run), count, ranks - 1).transpose(1, 2)
                goal = self._tensors.picks[place : place + further.numel()]
                goal.view(further.shape).copy_(further)
                place += further.numel()
            begin += count * len(alike)
        return place - first_place

    def _further_ranks(self, rows: slice, run: list[PickRows]) -> Tensor:
        """The picks of ranks 1 and up at the rows of `run`: int32 [rows, ranks - 1]."""
        ranks = run[0].ranks
        if run[0].unadjusted and self.picks_ranks:
            return self._tensors.further[rows, : ranks - 1]
        return best_tokens(
            adjust(self._tensors.logits[rows], run),
            self._head.temperatures[rows],
            self._head.noise_keys[rows],
            ranks,
        )[:, 1:]

    def _pick_by_heads(self, rows: Sequence[PickRows], first_pick: int, count: int, num_picks: int) -> int:
        """Draft with Medusa heads from the pass's `count` rows. The drafts are stored after its `num_picks` picks.

        Returns their number.
        """
        picks = self._tensors.picks[first_pick : first_pick + count]
        drafts = head_picks(self._forward, self._tensors.hidden[:count], picks, rows)
        self._tensors.picks[first_pick + num_picks : first_pick + num_picks + drafts.numel()] = drafts
        return drafts.numel()

    def _pick_adjusted(self, rows: Sequence[PickRows], first_pick: int) -> None:
        """Pick again for the groups whose logits have to be adjusted: the graphs have picked from unadjusted logits."""
        for place, run in runs(rows):
            if not run[0].unadjusted:
                self._pick_from(adjust(self._tensors.logits[place], run), place, first_pick)

    def _pick_from(self, logits: Tensor, rows: slice, first_pick: int) -> None:
        """Pick from the logits of some rows, whose picks begin at place `first_pick` + `rows.start`."""
        picks = self._tensors.picks[first_pick + rows.start :]
        gumbel_argmax(logits, self._head.temperatures[rows], self._head.noise_keys[rows], picks, self._zero)
