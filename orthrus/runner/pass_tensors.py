"""`PassTensors`: what passes read and write on a GPU besides weights and KV cache, allocated once, before the first pass."""

from dataclasses import dataclass

import torch
from torch import Tensor

from orthrus.kernels import workspace
from orthrus.kernels.attention.gpu import scratch_bytes
from orthrus.models.forward import LayerParallelForward
from orthrus.plan import MAX_RANKS

RECORDS = 4096
"""Room for so many partial results of attention (rows x records of each). A tile that would need more is not divided."""


@dataclass(frozen=True)
class PassTensors:
    """The tensors that the graphs of one model have in common. `runner/pass_memory.py` counts them before they are made."""

    buffer: Tensor
    """int32 [size]: the pass to run, as `PassFields`."""
    picks: Tensor
    """int32 [2 * MAX_RANKS * max_logits]: the picks of the last two passes. Those of the current pass begin at
    `PassFields.first_pick`: the token of each row that needs logits, and then the picks of further ranks."""
    further: Tensor
    """int32 [max_logits, MAX_RANKS - 1]: for each row that needs logits, the second best token and so on, or `NO_TOKEN`. Passes
    with rows of drafts write it if the runner `picks_ranks`. They apply temperature and noise, and no other adjustment."""
    results: Tensor
    """uint8: a layer's results, and behind them partial results of attention: see `kernels/workspace.py`."""
    hidden: Tensor
    """[max_logits, hidden_size]: final hidden states of the rows that need logits. Passes of the drafts' own weights write it,
    passes that run layers and head as two graphs, and all passes of a model with Medusa heads."""
    own_logits: Tensor
    """float32 [max_logits, tokens of this rank's LM head]: of the rows that need them, if the last pass wanted logits."""
    logits: Tensor
    """float32 [max_logits, vocab_size]: the same with the tokens of all ranks. On rank 0 only."""

    @staticmethod
    def allocate(
        forward: LayerParallelForward, max_logits: int, buffer_size: int, device: torch.device | None = None
    ) -> "PassTensors":
        """Allocate all of them as zeros. max_logits: most rows that need logits. buffer_size: numbers of the pass buffer.

        device: None for that of the model. On the device "meta" they take no memory, but tell how much they would take.
        """
        config, ranks, device = forward.config, forward.ranks, device or forward.device

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        records = scratch_bytes(
            RECORDS, config.num_attention_heads, config.head_dim, forward.dtype, forward.device
        )
        own = zeros(max_logits, forward.shard.vocabulary_widths[ranks.rank], dtype=torch.float32)
        logits = own if ranks.peers is None else ranks.peers.logits
        if ranks.collective:
            logits = zeros(max_logits, config.vocab_size, dtype=torch.float32)
        return PassTensors(
            buffer=zeros(buffer_size, dtype=torch.int32),
            picks=zeros(2 * MAX_RANKS * max_logits, dtype=torch.int32),
            further=zeros(max_logits, MAX_RANKS - 1, dtype=torch.int32),
            results=zeros(workspace.BYTES + records, dtype=torch.uint8),
            hidden=zeros(max_logits, config.hidden_size, dtype=forward.dtype),
            own_logits=own,
            logits=logits,
        )

    @property
    def plan_bytes(self) -> int:
        """Bytes of what describes a pass, its picks, and a layer's results: of all but logits and hidden states."""
        return sum(tensor.nbytes for tensor in (self.buffer, self.picks, self.further, self.results))
