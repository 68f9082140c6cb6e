"""A tree of drafts as groups of rows: how nodes become runs, which pages the runs have, and how a verified tree is read.

A *run* is a path of nodes without a branch. Each run but the first branches off from another run, and has pages of its own from
the page on in which it begins. `tree_chances` chooses the nodes of a tree. `tree_drafts` calls the functions here.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from orthrus.cache.page_pool import PagePool
from orthrus.kernels.attention.moving_blocks import VerifiedTree
from orthrus.kernels.rows.types import NO_TOKEN
from orthrus.plan import MORE_SLOTS, RowGroup, Verifying, View
from orthrus.requests.sequence import SequenceState
from orthrus.schedules.tree_chances import Node

MAX_RUNS = 17
"""Most runs of a tree."""
_NO_DRAFT = -2
"""Stands for a node without a token, where the drafts are shorter than the tree. No pick equals it."""


@dataclass
class Run:
    """Nodes that follow one another: one group of the verify turn."""

    parent: int
    """The run that it branches off from; -1 for the first one, which begins with the newest token."""
    first_depth: int
    """Depth of its first node; -1 for the newest token."""
    ranks: list[int]
    """The rank of each of its nodes; 0 for the newest token. The first run, the *chain*, has rank 0 throughout."""

    @property
    def end_depth(self) -> int:
        """The depth after that of its last node."""
        return self.first_depth + len(self.ranks)


@dataclass(frozen=True)
class DraftTree:
    """A tree that a verify turn computes. Its runs are the turn's groups."""

    runs: list[Run]
    tables: list[list[int]]
    """The block table of each run."""
    first_page: int
    """Place in these tables of the page that holds the newest token."""

    @property
    def chain_length(self) -> int:
        """How many drafts of rank 0 follow the newest token."""
        return self.runs[0].end_depth

    def groups(
        self, candidates: Sequence[Sequence[int]], newest_token: int, start: int
    ) -> tuple[RowGroup, ...]:
        """The turn's rows. candidates: the tokens of each depth, by rank. start: position of the newest token."""
        groups: list[RowGroup] = []
        for run, table in zip(self.runs, self.tables, strict=True):
            tokens = [
                candidates[depth][rank] if depth >= 0 else newest_token
                for depth, rank in enumerate(run.ranks, run.first_depth)
            ]
            parent = groups[run.parent] if run.parent >= 0 else None
            first = start + 1 + run.first_depth
            groups.append(RowGroup(View.AR, tokens, first, table, 0, len(tokens), parent))
        return tuple(groups)

    def verifying(self, candidates: Sequence[Sequence[int]], first_pick: int) -> Verifying:
        """What the block behind this tree has to know of it, when its verify turn has been launched.

        candidates: as in `groups`, but never placeholders. first_pick: see `Verifying`.
        """
        drafts: list[int] = []
        parents: list[int] = []
        groups: list[int] = []
        firsts: list[int] = []  # The place of each run's first node, where the newest token has place 0.
        for index, run in enumerate(self.runs):
            firsts.append(len(drafts) + 1 if index else 0)
            for place, rank in enumerate(run.ranks):
                if (depth := run.first_depth + place) < 0:
                    continue
                before = firsts[index] + place - 1
                if place == 0:
                    before = firsts[run.parent] + depth - 1 - self.runs[run.parent].first_depth
                drafts.append(candidates[depth][rank] if depth < len(candidates) else _NO_DRAFT)
                parents.append(before - 1)
                groups.append(index)
        width = max(len(table) for table in self.tables) - self.first_page
        pages = [[*table[self.first_page :], *[0] * width][:width] for table in self.tables]
        return Verifying(drafts, first_pick, VerifiedTree(parents, groups, self.first_page, pages))


@dataclass(frozen=True)
class Verified:
    """What the AR view's picks say of a tree."""

    tokens: list[int]
    """The tokens to commit: the right drafts and the pick behind them."""
    rows: list[int]
    """The row of each pick, counted over all groups."""
    run: int
    """The run of the last right draft."""
    ranks: list[int | None]
    """The rank of the right token at each depth, up to and including the depth at which `follow` stopped. None: no candidate was
    right."""


def runs_of(
    nodes: Sequence[Node], start: int, page_size: int, missing: Collection[tuple[int, int]] = ()
) -> list[Run]:
    """A tree's nodes as runs. start: position of the newest token. missing: depths and ranks for which no token was picked.

    A node is left out, with all nodes after it, if it has no token, or would need too many runs or too many copies of other rows'
    keys.
    """
    runs = [Run(-1, -1, [0])]
    places: list[tuple[int, int] | None] = []  # Of each node: its run and its depth.
    more_slots = 0
    for node in nodes:
        place = (0, -1) if node.parent < 0 else places[node.parent]
        if place is None or (node.depth, node.rank) in missing:
            places.append(None)
            continue
        index, run = place[0], runs[place[0]]
        if run.end_depth == node.depth and (index > 0 or node.rank == 0):
            run.ranks.append(node.rank)
            places.append((index, node.depth))
            continue
        position = start + 1 + node.depth
        copies = min(position % page_size, position - start)
        num_rows = sum(len(run.ranks) for run in runs) + 1
        if len(runs) == MAX_RUNS or more_slots + copies > MORE_SLOTS * num_rows:
            places.append(None)
            continue
        more_slots += copies
        runs.append(Run(index, node.depth, [node.rank]))
        places.append((len(runs) - 1, node.depth))
    return runs


def follow(
    runs: Sequence[Run], candidates: Sequence[Sequence[int]], picks: Sequence[Sequence[int]]
) -> Verified:
    """Follow a tree's drafts as far as the AR view's picks agree with them.

    picks: those of each run's rows. candidates: as in `DraftTree.groups`. They may be shorter than the tree: deeper nodes then
    count as wrong.
    """
    firsts = [0]
    for run in runs:
        firsts.append(firsts[-1] + len(run.ranks))
    at, depth = 0, -1
    tokens: list[int] = []
    rows: list[int] = []
    ranks: list[int | None] = []
    while True:
        place = depth - runs[at].first_depth
        token = picks[at][place]
        tokens.append(token)
        rows.append(firsts[at] + place)
        depth += 1
        if depth >= len(candidates) or token == NO_TOKEN:
            break
        rank = candidates[depth].index(token) if token in candidates[depth] else None
        ranks.append(rank)
        if rank is None:
            break
        if depth < runs[at].end_depth and runs[at].ranks[depth - runs[at].first_depth] == rank:
            continue
        branch = _branch(runs, at, depth, rank)
        if branch is None:
            break
        at = branch
    return Verified(tokens, rows, at, ranks)


def _branch(runs: Sequence[Run], parent: int, depth: int, rank: int) -> int | None:
    """The run that branches off from run `parent` at `depth` with a node of rank `rank`."""
    for index, run in enumerate(runs):
        if (run.parent, run.first_depth, run.ranks[0]) == (parent, depth, rank):
            return index
    return None


class BranchPages:
    """Gives a tree's runs pages, and takes back those that no right draft has used."""

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self._pool = pool
        self.page_size = page_size

    def open(self, sequence: SequenceState, runs: Sequence[Run]) -> DraftTree | None:
        """Take pages for the runs. Returns the tree, or None if too few pages are to spare; then nothing is taken.

        A run has pages of its own, the first of which holds the position where it branches off from its parent.
        """
        size, n = self.page_size, sequence.newest_position
        main = sequence.block_table
        starts = [(n + 1 + run.first_depth) // size for run in runs]
        starts[0] = len(main)
        counts = [
            max(0, -(-(n + 1 + run.end_depth) // size) - s) for run, s in zip(runs, starts, strict=True)
        ]
        if sum(counts) > self._pool.spare or (pages := self._pool.allocate(sum(counts))) is None:
            return None
        taken = iter(pages)
        tables: list[list[int]] = []
        for run, start, count in zip(runs, starts, counts, strict=True):
            own = [next(taken) for _ in range(count)]
            if run.parent < 0:
                main += own
                tables.append(main)
                continue
            sequence.branches.append(own)
            tables.append(tables[run.parent][:start] + own)
        return DraftTree(list(runs), tables, n // size)

    def close(self, sequence: SequenceState, table: list[int]) -> None:
        """Make the block table of one run the sequence's own, and give up the pages of all others."""
        here = sequence.newest_position // self.page_size
        owned = [*sequence.block_table[here:], *(page for pages in sequence.branches for page in pages)]
        kept = table[here:]
        self._pool.release([page for page in owned if page not in kept])
        sequence.block_table[here:] = kept
        sequence.branches = []
