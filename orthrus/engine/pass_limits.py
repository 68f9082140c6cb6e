"""The largest pass of an engine, and what the GPUs that share a model exchange in it. Does not import torch."""

from dataclasses import dataclass

from orthrus.engine.config import EngineConfig
from orthrus.kernels.peer_sizes import PeerSizes
from orthrus.models.config import ModelConfig
from orthrus.runner.graph_sizes import graph_sizes
from orthrus.runner.pass_memory import PassRoom

DECODE_ROWS = 512
"""Most rows of decoding sequences in a pass, or `max_num_seqs` if that is more. A further row would cost a GPU more time than
a draft gains."""
SCORE_ROWS = 64
"""Rows that can score prompts even while decoding sequences fill a pass. Memory for their logits is reserved."""


@dataclass(frozen=True)
class PassLimits:
    """The largest pass."""

    decode_rows: int
    """Most rows of decoding sequences."""
    max_rows: int
    """Most rows in all."""
    max_logits: int
    """Most rows that need logits: those of decoding sequences, the last row of each prompt, and rows that score prompts."""

    @staticmethod
    def of(config: EngineConfig) -> "PassLimits":
        decode_rows = max(DECODE_ROWS, config.max_num_seqs)
        return PassLimits(
            decode_rows,
            max_rows=config.prefill_chunk + decode_rows,
            max_logits=decode_rows + config.max_num_seqs + SCORE_ROWS,
        )


def pass_room(config: EngineConfig, model: ModelConfig) -> PassRoom:
    """The largest pass on a GPU. Its numbers of rows are rounded up to those that have a CUDA graph."""
    limits = PassLimits.of(config)
    return PassRoom(
        rows=graph_sizes(limits.max_rows)[-1],
        logit_rows=graph_sizes(limits.max_logits)[-1],
        group_rows=config.draft_length or model.block_size or 1,
        sequences=config.max_num_seqs,
        positions=config.max_model_len or model.max_position_embeddings,
    )


def max_pages(config: EngineConfig, max_groups: int, context: int, page_size: int) -> int:
    """Most pages in all block tables of a pass. max_groups: most groups of a sequence. context: the context limit in tokens."""
    return max_groups * config.max_num_seqs * -(-context // page_size)


def exchange_sizes(config: EngineConfig, model: ModelConfig) -> PeerSizes:
    """What the ranks of `model` exchange in the largest pass, without the picks (0): their number depends on the runner."""
    room = pass_room(config, model)
    return PeerSizes(room.rows, model.hidden_size, room.logit_rows, model.vocab_size, 0)
