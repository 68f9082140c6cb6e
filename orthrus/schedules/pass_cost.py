"""What the passes of decoding cost on this machine, measured when the engine starts."""

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from orthrus.plan import RowGroup, View

_ROWS = (2, 4, 8, 16, 32, 64, 128, 256)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_GROUPS = 8
_GROUP_ROWS = 4
_CONTEXT = 256
_SECONDS = 2.0
"""Time for all measurements, as far as one round of the smaller shapes allows."""


@dataclass(frozen=True)
class PassCost:
    """Seconds of a pass: `seconds[i]` at `sizes[i]` rows of one sequence, `per_group` more for every further sequence."""

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    per_group: float = 0.0

    def __call__(self, size: int, groups: int = 1) -> float:
        """Interpolated between measurements; beyond the last in proportion to it."""
        extra = self.per_group * (groups - 1)
        if size >= self.sizes[-1] or len(self.sizes) == 1:
            return self.seconds[-1] * max(1.0, size / self.sizes[-1]) + extra
        right = max(1, bisect_left(self.sizes, size))
        (r0, r1), (s0, s1) = self.sizes[right - 1 : right + 1], self.seconds[right - 1 : right + 1]
        return s0 + (s1 - s0) * max(0, size - r0) / (r1 - r0) + extra


@dataclass(frozen=True)
class DecodeCost:
    """step: an AR pass, by the number of sequences; draft, verify: the two passes of a cycle, by rows and sequences.

    lead: a draft pass with a lead, by the rows of the blocks alone. sampled_row: more for every row that is sampled rather
    than greedy.
    """

    step: PassCost
    draft: PassCost
    verify: PassCost
    lead: PassCost
    sampled_row: float = 0.0

    def ar(self, batch: int, greedy: bool) -> float:
        """Seconds of an AR step of `batch` sequences: one token each."""
        return self.step(batch) + (0.0 if greedy else batch * self.sampled_row)

    def cycle(self, block_rows: int, batch: int, greedy: bool, lead: bool = False) -> float:
        """Seconds of a draft pass and a verify pass of `batch` sequences with `block_rows` rows each."""
        rows = block_rows * batch
        seconds = (self.lead if lead else self.draft)(rows, batch) + self.verify(rows, batch)
        # Without a lead, the draft pass picks one token less than it has rows; with one, a token more.
        return seconds + (0.0 if greedy else (2 * rows + (batch if lead else -batch)) * self.sampled_row)


class _Kind(Enum):
    STEP = "step"
    DRAFT = "draft"
    VERIFY = "verify"
    LEAD = "lead"


_Shape = tuple[_Kind, int, int]
"""Kind of pass, rows of each sequence (of its block), sequences."""


def measure_decode_cost(
    run: Callable[[list[RowGroup], float], None],
    *,
    context: int,
    page_size: int,
    num_pages: int,
    max_batch: int,
    max_rows: int,
    mask_token_id: int,
) -> DecodeCost:
    """Time `run(groups, temperature)`, a pass with its picks, on shapes of decoding; two seconds, more for a slow model.

    context: the model's context limit. max_rows: of a pass. Pages 1 to num_pages - 1 are written to, so nothing may be in
    them yet.
    """
    length = min(context, _CONTEXT, (num_pages - 1) * page_size)
    pages_each = -(-length // page_size)
    most_sequences = max(1, (num_pages - 1) // pages_each)

    def groups(kind: _Kind, rows: int, index: int) -> list[RowGroup]:
        first = 1 + index % most_sequences * pages_each
        pages, start = list(range(first, first + pages_each)), length - rows
        if kind in (_Kind.STEP, _Kind.VERIFY):
            return [RowGroup(View.AR, [0] * rows, start, pages, 0, rows)]
        block = [0, *[mask_token_id] * (rows - 1)]
        if kind is _Kind.DRAFT:
            return [RowGroup(View.DIFFUSION, block, start, pages, 0, rows - 1)]
        return [
            RowGroup(View.AR, [0], start, pages, 0, 1),
            RowGroup(View.DIFFUSION, block, start, pages, 0, rows),
        ]

    def time_pass(shape: _Shape) -> float:
        kind, rows, sequences = shape
        planned = [group for i in range(sequences) for group in groups(kind, rows, i)]
        return _seconds(lambda: run(planned, 0.0))

    sizes = [r for r in _ROWS if r < min(length, max_rows + 1)]
    batches = [b for b in _BATCHES if b <= max_batch]
    blocks = (_Kind.DRAFT, _Kind.VERIFY, _Kind.LEAD)
    shapes: list[_Shape] = [
        *((_Kind.STEP, 1, batch) for batch in batches),
        *((kind, rows, 1) for rows in sizes for kind in blocks),
        *((kind, min(_GROUP_ROWS, sizes[-1]), _GROUPS) for kind in blocks),
    ]
    best = _best_times(time_pass, sorted(shapes, key=lambda s: s[1] * s[2]))
    step_batches = [b for b in batches if (_Kind.STEP, 1, b) in best]
    sampled = groups(_Kind.VERIFY, _GROUP_ROWS, 0)
    return DecodeCost(
        step=_curve(step_batches, [best[_Kind.STEP, 1, b] for b in step_batches]),
        draft=_rows_curve(best, _Kind.DRAFT),
        verify=_rows_curve(best, _Kind.VERIFY),
        lead=_rows_curve(best, _Kind.LEAD),
        sampled_row=_sampling_seconds(lambda temperature: run(sampled, temperature)) / _GROUP_ROWS,
    )


def _best_times(time_pass: Callable[[_Shape], float], shapes: Sequence[_Shape]) -> dict[_Shape, float]:
    """The best time of each shape; the largest ones are left out where measuring all of them once takes too long.

    The best, and in turns: what else the machine does only ever adds time, and should not meet one shape alone. Next is always
    the shape that has had the least time so far: so short passes, whose times are the least certain, are seen most often.
    """
    times: dict[_Shape, list[float]] = {}
    began = time.perf_counter()
    time_pass(shapes[0])
    for shape in shapes:
        if len(times) >= len(shapes) // 2 and time.perf_counter() - began > _SECONDS / 2:
            break
        times[shape] = [time_pass(shape)]
    while time.perf_counter() - began < _SECONDS:
        shape = min(times, key=lambda s: sum(times[s]))
        times[shape].append(time_pass(shape))
    return {shape: min(seconds) for shape, seconds in times.items()}


def _rows_curve(best: dict[_Shape, float], kind: _Kind) -> PassCost:
    sizes = sorted(rows for k, rows, sequences in best if k is kind and sequences == 1)
    alone = _curve(sizes, [best[kind, rows, 1] for rows in sizes])
    crowded = [(shape, seconds) for shape, seconds in best.items() if shape[0] is kind and shape[2] > 1]
    if not crowded:
        return alone
    (_, rows, sequences), seconds = crowded[0]
    return PassCost(
        alone.sizes, alone.seconds, max(0.0, (seconds - alone(rows * sequences)) / (sequences - 1))
    )


def _curve(sizes: Sequence[int], seconds: Sequence[float]) -> PassCost:
    # A pass of more rows never costs less: what says otherwise is noise.
    return PassCost(tuple(sizes), tuple(min(seconds[i:]) for i in range(len(sizes))))


def _sampling_seconds(run: Callable[[float], None]) -> float:
    """Seconds that a pass takes longer at temperature 1 than with greedy picks."""
    greedy, sampled = (min(_seconds(lambda t=t: run(t)) for _ in range(8)) for t in (0.0, 1.0))  # type: ignore[misc]
    return max(0.0, sampled - greedy)


def _seconds(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
