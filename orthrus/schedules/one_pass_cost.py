"""What decoding costs if a cycle is one pass, because no passes are needed to make the drafts."""

from dataclasses import dataclass

from orthrus.schedules.pass_cost import PassCost


@dataclass(frozen=True)
class OnePassCost:
    """Seconds of an AR step, and of the pass that verifies drafts: the common part of such a `CycleCost`."""

    step: PassCost
    """An AR pass, by the number of sequences. Nothing drafts in it."""
    verify: PassCost
    """A verify pass whose picks are waited for, by rows and sequences."""
    sampled_row: float = 0.0
    """Seconds that a row adds to a pass if its pick is sampled rather than greedy."""
    lead: None = None
    """There are no draft passes, and so no leads."""
    version: int = 0
    """These costs never change."""

    def ar(self, batch: int, greedy: bool) -> float:
        """Seconds of an AR step of `batch` sequences: one token each."""
        return self.step(batch) + (0.0 if greedy else batch * self.sampled_row)

    def verify_pass(self, rows: float, batch: int, greedy: bool) -> float:
        """Seconds of a verify pass of so many rows of `batch` sequences."""
        return self.verify(rows, batch) + (0.0 if greedy else rows * self.sampled_row)
