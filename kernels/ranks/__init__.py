"""The ranks that share a model under tensor parallelism, and what they exchange in a pass."""

from orthrus.kernels.ranks.ranks import ONE_RANK, RankError, Ranks, add_pairwise

__all__ = ["ONE_RANK", "RankError", "Ranks", "add_pairwise"]
