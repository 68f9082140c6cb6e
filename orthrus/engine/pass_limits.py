"""The largest pass of an engine, and what the GPUs that share a model exchange in it. Free of torch."""

from dataclasses import dataclass

from orthrus.engine.config import EngineConfig
from orthrus.kernels.peer_sizes import PeerSizes
from orthrus.models.config import ModelConfig
from orthrus.runner.graph_sizes import graph_sizes

DECODE_ROWS = 512
"""Most rows of decoding sequences in a pass: beyond it, a row costs a GPU more than a draft brings. One each, at least."""
SCORE_ROWS = 64
"""Rows that can score prompts while decoding sequences fill a pass: memory for so many more logits is laid out."""


@dataclass(frozen=True)
class PassLimits:
    """The largest pass."""

    decode_rows: int
    """Most rows of decoding sequences."""
    max_rows: int
    """Most rows in all."""
    max_logits: int
    """Most rows that need logits: all of decoding sequences, one of each prompt that ends, and those that score prompts."""

    @staticmethod
    def of(config: EngineConfig) -> "PassLimits":
        decode_rows = max(DECODE_ROWS, config.max_num_seqs)
        return PassLimits(
            decode_rows,
            max_rows=config.prefill_chunk + decode_rows,
            max_logits=decode_rows + config.max_num_seqs + SCORE_ROWS,
        )


def exchange_sizes(config: EngineConfig, model: ModelConfig) -> PeerSizes:
    """What the ranks of `model` exchange in the largest pass, but for the picks: of these only the runner knows how many."""
    limits = PassLimits.of(config)
    rows, logit_rows = graph_sizes(limits.max_rows)[-1], graph_sizes(limits.max_logits)[-1]
    return PeerSizes(rows, model.hidden_size, logit_rows, model.vocab_size, 0)
