"""`LayerParallelForward`: the AR view and the diffusion view of all rows of a pass, layer by layer, over one shared cache.

At every layer both views run side by side. Each has its own attention projections. Everything else (norms, MLP, embedding,
head) is shared and read once for all rows. AR keys and values are written to the cache before attention, and both views read
them there.
Formulas of the views: Orthrus (arXiv 2605.12825, section 3). What is inside a layer: `orthrus.models.layer`.
"""

import torch
from torch import Tensor

from orthrus.cache.kv_cache import KVCache
from orthrus.kernels.linear import pack_weight
from orthrus.kernels.rows.embedding import embed
from orthrus.kernels.workspace import start_layer
from orthrus.models.config import ModelConfig
from orthrus.models.families import family_of
from orthrus.plan import PassPlan


class LayerParallelForward:
    """The model: turns a pass plan into hidden states and logits, and writes the plan's AR keys and values to the cache.

    It knows the rotary angles of position 0 only, until `use_context` gives it more.
    """

    def __init__(self, config: ModelConfig, tensors: dict[str, Tensor], weight_format: str = "plain") -> None:
        """tensors: a checkpoint's, by their Hugging Face names, on one device in one dtype. The dict is emptied.

        weight_format: how the linear layers keep their weights, by a name that `pack_weight` (kernels/linear) knows.
        """
        self.config = config
        family = family_of(config)
        self._embedding = tensors.pop(family.embedding)
        head = tensors.pop(family.head, None)
        # The LM head: final hidden states to logits.
        self.head = pack_weight(
            [[{"weight": self._embedding if head is None else head}]],
            weight_format,
            head=True,
        )
        self._first_norm = tensors.pop(family.norm_before(0))
        self._layers = [
            family.layer(config, tensors, i, weight_format) for i in range(config.num_hidden_layers)
        ]
        self.device = self._embedding.device
        self.dtype = self._embedding.dtype
        self._inv_freq, self._rope_scaling = family.rotary(config)
        self.use_context(1)

    @property
    def heads_per_kv(self) -> int:
        return self.config.num_attention_heads // self.config.num_key_value_heads

    def use_context(self, positions: int) -> None:
        """Make rotary angles for `positions` positions: as many as the cache holds, often far fewer than the model allows.

        Must not be called once passes have been captured as CUDA graphs.
        """
        place = torch.arange(positions, dtype=torch.float32, device=self.device)
        angles = place[:, None] * self._inv_freq.to(self.device)
        scaling = self._rope_scaling
        # cos and sin [positions, head_dim / 2].
        self._cos, self._sin = (
            (angles.cos() * scaling).to(self.dtype),
            (angles.sin() * scaling).to(self.dtype),
        )

    @torch.inference_mode()
    def hidden_states(self, plan: PassPlan, cache: KVCache, picks: Tensor) -> Tensor:
        """Run the layers. Returns the final, normed hidden states [rows, hidden_size] of all rows.

        picks: int32, what earlier passes picked. The plan may take tokens from there, see `embed` (kernels/rows/embedding).
        """
        eps = self.config.rms_norm_eps
        start = embed(
            plan.tokens, plan.positions, picks, self._embedding, self._first_norm, eps, self._cos, self._sin
        )
        hidden, normed = start.hidden, start.normed
        for layer, kv in zip(self._layers, cache.layers, strict=True):
            start_layer()
            hidden, normed = layer(hidden, normed, start.cos, start.sin, plan, kv)
        return normed

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of final hidden states [rows, hidden_size]: float32 (float64 for a float64 model) [rows, vocab_size].

        Those of a 16-bit model are rounded to 16 bits first.
        """
        logits = self.head.linear(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
