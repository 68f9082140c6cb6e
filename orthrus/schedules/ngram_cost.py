"""What it costs to verify n-gram drafts: they come from a lookup, so a cycle is one pass."""

from dataclasses import dataclass

from orthrus.schedules.ar import STEP
from orthrus.schedules.blocks import VERIFY
from orthrus.schedules.decode_cost import step_shape, verify_shape
from orthrus.schedules.one_pass_cost import OnePassCost
from orthrus.schedules.pass_cost import PassCost, PassTimer


@dataclass(frozen=True)
class NgramCost(OnePassCost):
    """Seconds of an AR step, and of a cycle that verifies n-gram drafts."""

    @staticmethod
    def measured(timer: PassTimer, step: PassCost | None = None) -> "NgramCost":
        """Time the passes on this machine. step: what AR steps cost, if they have been timed already."""
        verify = verify_shape(ahead=False)
        curves = timer.curves([verify] if step is not None else [step_shape(verify), verify])
        return NgramCost(step or curves[STEP], curves[VERIFY], timer.sampled_row(verify))

    def cycle(
        self, block_rows: float, batch: int, greedy: bool, lead: bool = False, tree_rows: int = 0
    ) -> float:
        """Seconds of a cycle of `batch` sequences, one of which verifies `block_rows` rows, as they count for that sequence.

        It is not known how many of the other sequences find drafts. So they are assumed to have AR steps, and this sequence is
        charged the time that all of them lose. If others draft too, the pass gains even more.
        """
        rows = batch - 1 + block_rows
        step = self.ar(batch, greedy)
        seconds = self.verify_pass(rows, batch, greedy)
        return step + batch * max(0.0, seconds - step)
