"""`PeerSizes`: how much the GPUs of a model exchange in a pass, and the memory for that on each GPU. Does not import torch."""

from dataclasses import dataclass

_ALIGNMENT = 256


@dataclass(frozen=True)
class PeerSizes:
    """How much the ranks exchange in a pass, at most."""

    rows: int
    """Rows of a pass."""
    width: int
    """Numbers of a row: the model's hidden_size."""
    logit_rows: int
    """Rows that need logits."""
    vocabulary: int
    """Logits of such a row."""
    picks: int
    """The most tokens that are sent at once."""

    def layout(self, ranks: int) -> tuple[dict[str, int], int]:
        """Where each part of a rank's memory begins, in bytes, and how many bytes there are in all."""
        parts = {
            "logits": 4 * self.logit_rows * self.vocabulary,
            "picks_box": 4 * self.picks,
            "sums": 8 * ranks * self.rows * self.width,
            "sum_flags": 4 * ranks * self.rows,
            "best": 16 * ranks * self.logit_rows,
            "best_flags": 4 * ranks * self.logit_rows,
            "picks_flag": 4,
        }
        end, places = 0, {}
        for name, count in parts.items():
            places[name] = end
            end += -(-count // _ALIGNMENT) * _ALIGNMENT
        return places, end
