"""How much GPU memory passes take besides weights, KV cache, and what ranks exchange. Does not import torch.

The KV cache gets the memory that is left. `orthrus config check` computes this before anything is loaded. It counts everything
that a pass allocates and that grows with the vocabulary or the number of rows. `tests/engine/test_memory_plan.py` compares it
with what passes of each schedule allocate.
"""

from dataclasses import asdict, astuple, dataclass

from orthrus.models.shard import Shard

ADJUSTED_ROWS = 32
"""Rows whose logits are adjusted (`adjust` in `runner/sampler.py`) at a time, unless one group has more."""
_ADJUSTED_BYTES = 64
"""Bytes that adjusting takes for each logit. Copies, sorted scores, and their sums in 64 bits (`_cut_top_p`) take 36 at a time,
and a GPU's sort needs further memory."""
_GRAPH_BYTES = 1 << 30
"""The graphs themselves, compiled kernels, the pass buffer, and whatever else is small."""
_ATTENTION_BYTES = 160 << 20
"""Partial results of attention, and results that stay in the L2 cache (`kernels/workspace.py`)."""


@dataclass(frozen=True)
class PassRoom:
    """The largest pass that a runner has room for."""

    rows: int
    logit_rows: int
    """Rows that need logits."""
    group_rows: int
    """Of these, the most of one group."""
    sequences: int
    """Sequences that take part."""
    positions: int
    """The context limit in tokens."""


@dataclass(frozen=True)
class PassMemory:
    """Bytes on the GPU of one rank, by what they are for."""

    logits: int
    """The logits and the final hidden states of all rows that need logits."""
    adjusting: int
    """Copies of some rows' logits, for filters, penalties, masks and log-probabilities."""
    medusa: int
    """Logits of all Medusa heads."""
    angles: int
    """Cosines and sines of all positions."""
    layers: int
    """Results of the layers in the largest pass."""
    plans: int = 0
    """What describes a pass, its picks, results of a layer and partial results of attention: `PassTensors.plan_bytes`. 0 before
    that is known: `graphs` and `layers` have room for it."""
    graphs: int = _GRAPH_BYTES

    @staticmethod
    def of(
        shard: Shard,
        room: PassRoom,
        item_bytes: int,
        *,
        medusa_heads: int = 0,
        collective: bool = False,
        widens: bool = False,
        layers: int | None = None,
        plans: int = 0,
    ) -> "PassMemory":
        """item_bytes: bytes of one number of the model. medusa_heads: how many the model has. collective: whether ranks exchange
        through a library. widens: whether layers in 12 bits are written out in full for many rows. layers, plans: the fields, if
        they are known; otherwise `layers` is estimated.
        """
        model, logit_bytes = shard.model, max(item_bytes, 4)
        width = shard.vocabulary_widths[shard.rank]
        # A library gathers the ranks' logits in buffers of its own: padded ones, those of all ranks, and these side by side.
        columns = 2 * width + 3 * model.vocab_size if collective else width
        # Rows that only score prompts are not adjusted, and take less than that.
        adjusted = max(ADJUSTED_ROWS, room.group_rows) * model.vocab_size
        drafts = room.sequences * medusa_heads * model.vocab_size
        return PassMemory(
            logits=room.logit_rows * (columns * logit_bytes + model.hidden_size * item_bytes),
            adjusting=adjusted * _ADJUSTED_BYTES,
            # They are computed in the model's dtype, and then copied to float32 if that is wider.
            medusa=drafts * (item_bytes + logit_bytes if item_bytes < logit_bytes else item_bytes),
            angles=room.positions * model.head_dim * item_bytes,
            layers=_layer_bytes(shard, room.rows, item_bytes, widens) if layers is None else layers,
            plans=plans,
        )

    @property
    def total(self) -> int:
        """The sum of all fields."""
        return sum(astuple(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {count / (1 << 20):.0f}" for name, count in asdict(self).items())
        return f"{self.total / (1 << 20):.0f} MiB ({parts})"


def _layer_bytes(shard: Shard, rows: int, item_bytes: int, widens: bool) -> int:
    """About what `rows` rows take in the layers, where it has not been measured."""
    part = shard.config
    queries = part.num_attention_heads * part.head_dim
    keys = part.num_key_value_heads * part.head_dim
    # The residual stream and its norm before and behind a layer, and float32 sums of up to four parts.
    stream = part.hidden_size * (4 * item_bytes + 4 * 4)
    row = stream + item_bytes * (2 * queries + 2 * keys + part.intermediate_size)
    widened = 2 * part.intermediate_size * part.hidden_size * item_bytes if widens else 0
    return rows * row + widened + _ATTENTION_BYTES
