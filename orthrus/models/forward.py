"""`LayerParallelForward`: the forward pass of all rows of a pass, of both views, over one shared cache.

"Layer-parallel" means that at every layer both views run side by side. The layers run one after the other: it is neither pipeline
nor tensor parallelism. Each view has its own attention projections. Everything else (norms, MLP, embedding, head) is read once
for all rows. AR keys and values are written to the cache before attention, and both views read them there.

Drafts may have weights of their own: rounded copies of all weights of a draft pass. Then a pass has rows of one view only. The
formulas of the views are in the Orthrus paper (arXiv 2605.12825, section 3). `orthrus.models.layer` has the layers.
"""

from collections.abc import MutableMapping

import torch
from torch import Tensor

from orthrus.cache.kv_cache import KVCache
from orthrus.errors import ConfigError
from orthrus.kernels.ranks import ONE_RANK, Ranks
from orthrus.kernels.rows.embedding import embed
from orthrus.kernels.workspace import start_layer
from orthrus.models.config import ModelConfig
from orthrus.models.families import family_of
from orthrus.models.layer import LayerSplit
from orthrus.models.medusa import MedusaHeads
from orthrus.models.shard import Shard
from orthrus.models.stack import LayerStack
from orthrus.plan import PassPlan


class LayerParallelForward:
    """The model, or a rank's part of it.

    It turns a pass plan into hidden states and logits, and writes the plan's AR keys and values to the cache.

    Call `use_context` before the first pass: at first there are rotary angles for position 0 only.
    """

    exact: LayerStack
    """The weights as the checkpoint has them: of both views, or of the AR view alone if drafts have their own."""
    draft: LayerStack | None
    """The drafts' own weights, if they have any."""
    draft_format: str | None
    """The weight format of `draft`."""
    ranks: Ranks
    """The ranks that share the model."""
    shard: Shard
    """This rank's part of the model: all of it if there is one rank."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: MutableMapping[str, Tensor],
        weight_format: str = "plain",
        draft_format: str | None = None,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        """tensors: a checkpoint's, by their Hugging Face names, and those of Medusa heads if it has any (`load_medusa`), on one
        device in one dtype. All are taken out. If several ranks share the model, `config` is that of the whole model, and the
        tensors are this rank's (`Shard.part`).

        weight_format: how the linear layers keep their weights, by a name that `pack_weight` (kernels/linear) knows.
        draft_format: the same for the drafts' own weights; None: both views run side by side on `weight_format`.
        """
        self.ranks, self.shard = ranks, Shard(config, ranks.rank, ranks.size)
        self.config = config = self.shard.config
        family = family_of(config)
        self.draft, self.draft_format = None, draft_format
        # Each layer takes the norm behind it, so the norm before the first layer is left.
        self._first_norm = tensors.pop(family.norm_before(0))
        split, tokens = LayerSplit.of(self.shard, ranks), slice(*self.shard.span("vocabulary"))
        try:
            if draft_format is None:
                self.exact = LayerStack.pack(config, tensors, weight_format, split, tokens)
            else:
                self.exact, self.draft = LayerStack.pack_apart(
                    config, tensors, weight_format, draft_format, split, tokens, self._first_norm
                )
        except ConfigError:
            raise
        except ValueError as error:
            # Kernels don't know the configuration, and raise ValueError for weights that they can't store or run.
            raise ConfigError(f"{config.name}: {error}") from error
        self._embedding = tensors.pop(family.embedding)
        self._medusa = MedusaHeads.take(tensors)
        self.device = self._embedding.device
        self.dtype = self._embedding.dtype
        self._inv_freq, self._rope_scaling = family.rotary(config)
        self.use_context(1)

    @property
    def heads_per_kv(self) -> int:
        return self.config.num_attention_heads // self.config.num_key_value_heads

    @property
    def num_medusa_heads(self) -> int:
        return 0 if self._medusa is None else self._medusa.num_heads

    @property
    def num_medusa_weights(self) -> int:
        """How many numbers the weights of the Medusa heads have."""
        return 0 if self._medusa is None else self._medusa.num_weights

    def use_context(self, positions: int) -> None:
        """Compute rotary angles for `positions` positions. The cache often holds far fewer than the model allows.

        Must not be called after passes have been captured as CUDA graphs.
        """
        place = torch.arange(positions, dtype=torch.float32, device=self.device)
        angles = place[:, None] * self._inv_freq.to(self.device)
        scaling = self._rope_scaling
        # cos and sin [positions, head_dim / 2].
        self._cos, self._sin = (
            (angles.cos() * scaling).to(self.dtype),
            (angles.sin() * scaling).to(self.dtype),
        )

    def stack_for(self, *, ar: bool, diffusion: bool) -> LayerStack:
        """The weights of a pass. ar, diffusion: whether it has rows of these views. Raises ValueError if no weights run both."""
        if self.draft is None or not diffusion:
            return self.exact
        if ar:
            raise ValueError(
                "drafts have weights of their own, so a pass can't have rows of both views: plan two passes"
            )
        return self.draft

    @torch.inference_mode()
    def hidden_states(
        self, plan: PassPlan, cache: KVCache, picks: Tensor, stack: LayerStack | None = None
    ) -> Tensor:
        """Run the layers. Returns the final, normed hidden states [rows, hidden_size] of all rows.

        stack: the weights, from `stack_for`; None for `exact`.
        picks: int32, the picks of earlier passes. The plan's tokens may refer to them: see `embed` (kernels/rows/embedding).
        """
        eps = self.config.rms_norm_eps
        start = embed(
            plan.tokens, plan.positions, picks, self._embedding, self._first_norm, eps, self._cos, self._sin
        )
        hidden, normed = start.hidden, start.normed
        layers = (stack or self.exact).layers
        behind = [*(layer.rounding for layer in layers[1:]), None]
        for layer, kv, rounding in zip(layers, cache.layers, behind, strict=True):
            start_layer()
            hidden, normed = layer(hidden, normed, start.cos, start.sin, plan, kv, rounding)
        return normed

    @torch.inference_mode()
    def logits(self, hidden: Tensor, stack: LayerStack | None = None) -> Tensor:
        """Logits of final hidden states [rows, hidden_size]: float32 (float64 for a float64 model) [rows, vocab_size].

        Those of a 16-bit model are rounded to 16 bits first. stack: as in `hidden_states`.
        """
        logits = (stack or self.exact).head.linear(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return self.ranks.gather(logits, self.shard.vocabulary_widths)

    @torch.inference_mode()
    def medusa_logits(self, hidden: Tensor) -> Tensor:
        """Logits of all Medusa heads from final hidden states [rows, hidden_size]: float32 or wider [rows, heads, vocab_size]."""
        assert self._medusa is not None, "the model has heads"
        logits = self._medusa.logits(hidden, self.exact.head)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
