"""What passes cost on this machine, measured when the engine starts. A schedule says which shapes of passes matter to it."""

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from orthrus.plan import RowGroup

_ROWS = (2, 4, 8, 16, 32, 64, 128)
"""Passes of one sequence with so many rows are timed."""
_SPREAD = (2, 4)
"""Passes larger than one sequence are timed with so many sequences, each with the largest number of rows."""
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Passes of so many sequences of one row each are timed."""
_SEQUENCES, _SEQUENCE_ROWS = 8, 4
"""The number of sequences, and the rows of each, that are timed to learn what one more sequence costs."""
_CONTEXT = 256
"""Position, in tokens, up to which the rows of timed passes reach."""
_SECONDS = 0.5
"""Seconds for the measurements of each kind of pass. The first round is measured even if it takes longer."""
_FIRST_ROUND_SECONDS = 2.0
"""If the passes of the first round take longer than this together, the largest of them are left out, but at most half of all.
On a GPU, three passes run for each that counts. A larger pass than any that was measured is assumed to cost in proportion to the
largest one. That is mostly far too much."""


@dataclass(frozen=True)
class PassCost:
    """Seconds of a pass as a function of its size."""

    sizes: tuple[int, ...]
    """Sizes that were measured, ascending: rows of one sequence, or sequences of one row."""
    seconds: tuple[float, ...]
    """Seconds at each of `sizes`."""
    seconds_per_sequence: float = 0.0
    """Seconds that each sequence after the first adds to a pass of the same number of rows."""
    filled_to: tuple[int, ...] = ()
    """Numbers of rows that the runner pads passes to, ascending. Empty if it does not pad them."""

    def __call__(self, size: float, sequences: int = 1) -> float:
        """Seconds of a pass of this size with so many sequences. Interpolated; in proportion to the size beyond the last one."""
        # The last size was measured with its padding.
        size = max(size, min(self.padded(size), self.sizes[-1]))
        extra = self.seconds_per_sequence * (sequences - 1)
        if size >= self.sizes[-1] or len(self.sizes) == 1:
            return self.seconds[-1] * max(1.0, size / self.sizes[-1]) + extra
        right = max(1, bisect_left(self.sizes, size))
        (r0, r1), (s0, s1) = self.sizes[right - 1 : right + 1], self.seconds[right - 1 : right + 1]
        return s0 + (s1 - s0) * max(0, size - r0) / (r1 - r0) + extra

    def padded(self, size: float) -> float:
        """The size that the runner pads a pass of this size to."""
        return next((filled for filled in self.filled_to if filled >= size), size)


@dataclass(frozen=True)
class PassShape:
    """A kind of pass that a schedule wants timed. All sequences of the pass have the same number of rows."""

    kind: str
    groups: Callable[[int, int, list[int]], Sequence[RowGroup]]
    """The groups of one sequence, from its number of rows, its start position and its block table."""
    one_row: bool = False
    """Whether a sequence has only one row. The cost is then a function of the number of sequences, else of rows."""
    ahead: bool = False
    """Whether the engine launches the next pass before it reads the picks of such a pass."""


_Size = tuple[PassShape, int, int]
"""Shape, rows of each sequence, sequences."""


class PassTimer:
    """Times passes on an idle engine."""

    def __init__(
        self,
        run: Callable[[list[RowGroup], float, bool], float],
        *,
        context: int,
        page_size: int,
        num_pages: int,
        max_batch: int,
        max_rows: int,
        filled_to: tuple[int, ...],
    ) -> None:
        """run(groups, temperature, ahead): runs such a pass, and returns its seconds. ahead: whether several are run, each of
        which is launched before the picks of the last one are read. context: the context limit in tokens.

        num_pages: pages of the cache, the padding page 0 included. Pages 1 to num_pages - 1 are overwritten. max_batch: most
        sequences of a pass. max_rows: most rows of a pass. filled_to: as in `PassCost`.
        """
        self._run = run
        self.page_size = page_size
        self._max_batch, self._max_rows = max_batch, max_rows
        self._filled_to = filled_to
        self._end = min(context, _CONTEXT, (num_pages - 1) * page_size)
        self._pages_each = -(-self._end // page_size)
        # If the cache has pages for fewer sequences, they share pages. That costs the same.
        self._distinct = max(1, (num_pages - 1) // self._pages_each)

    def curves(self, shapes: Sequence[PassShape]) -> dict[str, PassCost]:
        """The cost of each kind of pass. Takes half a second each, more for a slow model."""
        row_counts = [r for r in _ROWS if r < min(self._end, self._max_rows + 1)]
        batches = [b for b in _BATCHES if b <= self._max_batch]
        blocks = [shape for shape in shapes if not shape.one_row]
        sizes: list[_Size] = [
            *((shape, 1, batch) for shape in shapes if shape.one_row for batch in batches),
            *((shape, rows, 1) for rows in row_counts for shape in blocks),
            *((shape, min(_SEQUENCE_ROWS, row_counts[-1]), _SEQUENCES) for shape in blocks),
            *(
                (shape, row_counts[-1], n)
                for n in _SPREAD
                if self._fits(row_counts[-1], n)
                for shape in blocks
            ),
        ]
        sizes.sort(key=lambda size: size[1] * size[2])
        best = _best_times(self._time, sizes, _SECONDS * len(shapes))
        curves = {
            shape.kind: (_batch_curve if shape.one_row else _rows_curve)(best, shape) for shape in shapes
        }
        return {kind: replace(curve, filled_to=self._filled_to) for kind, curve in curves.items()}

    def _fits(self, rows: int, sequences: int) -> bool:
        """Whether a pass may have so many sequences of so many rows."""
        return sequences <= self._max_batch and rows * sequences <= self._max_rows

    def sampled_row(self, shape: PassShape) -> float:
        """Seconds that a row of `shape` adds to a pass if its pick is sampled at temperature 1 rather than greedy."""
        groups = self._groups((shape, _SEQUENCE_ROWS, 1))
        greedy, sampled = (min(self._run(groups, t, shape.ahead) for _ in range(8)) for t in (0.0, 1.0))
        return max(0.0, sampled - greedy) / _SEQUENCE_ROWS

    def _groups(self, size: _Size) -> list[RowGroup]:
        shape, rows, sequences = size
        groups: list[RowGroup] = []
        for index in range(sequences):
            first = 1 + index % self._distinct * self._pages_each
            groups += shape.groups(rows, self._end - rows, list(range(first, first + self._pages_each)))
        return groups

    def _time(self, size: _Size) -> float:
        return self._run(self._groups(size), 0.0, size[0].ahead)


def _best_times(
    time_pass: Callable[[_Size], float], sizes: Sequence[_Size], budget: float
) -> dict[_Size, float]:
    """The best time of each size, in seconds. The largest sizes are left out if one pass of each takes too long.

    The best time counts, because other work of the machine can only add time. The sizes take turns, so that a disturbance does
    not affect one size alone. The next pass is always of the size with the least total time so far: so short passes, whose times
    are the least certain, are timed most often. budget: seconds for all measurements.
    """
    times: dict[_Size, list[float]] = {}
    began = time.perf_counter()
    time_pass(sizes[0])
    for size in sizes:
        if len(times) >= len(sizes) // 2 and sum(map(sum, times.values())) > _FIRST_ROUND_SECONDS:
            break
        times[size] = [time_pass(size)]
    while time.perf_counter() - began < budget:
        size = min(times, key=lambda s: sum(times[s]))
        times[size].append(time_pass(size))
    return {size: min(seconds) for size, seconds in times.items()}


def _batch_curve(best: dict[_Size, float], shape: PassShape) -> PassCost:
    """Cost by the number of sequences."""
    by_batch = {sequences: seconds for (s, _, sequences), seconds in best.items() if s is shape}
    return _curve(by_batch)


def _rows_curve(best: dict[_Size, float], shape: PassShape) -> PassCost:
    """Cost by rows, as if they were all of one sequence, and what further sequences add."""
    found = {(rows, n): seconds for (s, rows, n), seconds in best.items() if s is shape}
    alone = _curve({rows: seconds for (rows, n), seconds in found.items() if n == 1})
    seconds_per_sequence = 0.0
    for (rows, n), seconds in found.items():
        if n == _SEQUENCES:
            seconds_per_sequence = max(0.0, (seconds - alone(rows * n)) / (n - 1))
    by_rows = {
        rows * n: seconds - seconds_per_sequence * (n - 1)
        for (rows, n), seconds in found.items()
        if n != _SEQUENCES
    }
    together = _curve(by_rows)
    return PassCost(together.sizes, together.seconds, seconds_per_sequence)


def _curve(seconds: dict[int, float]) -> PassCost:
    sizes = tuple(sorted(seconds))
    # A pass of more rows never costs less: what says otherwise is noise.
    return PassCost(sizes, tuple(min(seconds[size] for size in sizes[i:]) for i in range(len(sizes))))
