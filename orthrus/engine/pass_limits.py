"""The largest pass of an engine, and what the GPUs that share a model exchange in it. Free of torch."""

from dataclasses import dataclass

from orthrus.engine.config import EngineConfig
from orthrus.kernels.peer_sizes import PeerSizes
from orthrus.models.config import ModelConfig
from orthrus.runner.graph_sizes import graph_sizes
from orthrus.runner.pass_memory import PassRoom

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


def pass_room(config: EngineConfig, model: ModelConfig) -> PassRoom:
    """The largest pass on a GPU, which has graphs for some numbers of rows only."""
    limits = PassLimits.of(config)
    return PassRoom(
        rows=graph_sizes(limits.max_rows)[-1],
        logit_rows=graph_sizes(limits.max_logits)[-1],
        group_rows=config.draft_length or model.block_size or 1,
        sequences=config.max_num_seqs,
        positions=config.max_model_len or model.max_position_embeddings,
    )


def max_pages(config: EngineConfig, max_groups: int, context: int, page_size: int) -> int:
    """Most pages of all block tables of a pass. max_groups: of a sequence. context: the context limit in tokens."""
    return max_groups * config.max_num_seqs * -(-context // page_size)


def exchange_sizes(config: EngineConfig, model: ModelConfig) -> PeerSizes:
    """What the ranks of `model` exchange in the largest pass, but for the picks: of these only the runner knows how many."""
    room = pass_room(config, model)
    return PeerSizes(room.rows, model.hidden_size, room.logit_rows, model.vocab_size, 0)
