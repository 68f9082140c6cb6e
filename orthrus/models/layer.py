"""A decoder layer over paged keys and values, for rows of one view, or of both over one read of the weights."""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from orthrus.cache.kv_format import KVLayer
from orthrus.kernels.linear import OUTSIDE_MLP, Parameters, Split, Weight, pack_weight
from orthrus.kernels.ranks import Ranks
from orthrus.kernels.rounding import Rounding
from orthrus.models.config import ModelConfig
from orthrus.models.factors import Factors
from orthrus.models.shard import Shard
from orthrus.plan import PassPlan


@dataclass(frozen=True)
class LayerSplit:
    """How the linear layers are divided among ranks, the same in all decoder layers."""

    outputs: Split
    """The split of layers whose outputs are divided: queries, keys and values, gate and up, and the LM head."""
    out: Split
    """The split of the attention's output projection, whose inputs are divided."""
    down: Split
    """The split of the MLP's last layer, whose inputs are divided."""

    @staticmethod
    def of(shard: Shard, ranks: Ranks) -> "LayerSplit":
        """The split for a rank with this shard."""
        out, down = (Split(ranks, shard.leaves(axis)) for axis in ("queries", "inner"))
        return LayerSplit(Split(ranks), out, down)


@dataclass(frozen=True)
class DecoderLayer:
    """The weights of one layer, packed for the kernels. Calling it runs the layer."""

    # Queries, keys and values as one projection, for every view.
    qkv: Weight
    # [views of the model, heads + kv_heads, head_dim]: the norm weight of each query and key head. None in a family without
    # these norms.
    qk_norm: Tensor | None
    # The attention's output projection, for every view.
    out: Weight
    mlp_norm: Tensor
    gate_up: Weight
    down: Weight
    # The norm behind the layer: the first one of the next layer, or the model's last.
    after_norm: Tensor
    head_dim: int
    eps: float

    @property
    def rounding(self) -> Rounding | None:
        """How the norm before the layer may store the layer's inputs."""
        return self.qkv.rounding

    @property
    def nbytes(self) -> int:
        """Bytes of the weights of the layer's linear layers."""
        return self.qkv.nbytes + self.out.nbytes + self.gate_up.nbytes + self.down.nbytes

    def with_factors(self, factors: Factors) -> "DecoderLayer":
        """The layer, whose inputs of linear layers are rounded with these factors, if their format has fixed ones."""
        return replace(
            self,
            qkv=self.qkv.with_factor(factors.normed),
            out=self.out.with_factor(factors.attended),
            gate_up=self.gate_up.with_factor(factors.mlp_normed),
            down=self.down.with_factor(factors.gated),
        )

    def rough(self) -> "DecoderLayer":
        """The layer for drafts, with `Weight.rough` of the weights that both views share."""
        return replace(self, gate_up=self.gate_up.rough(), down=self.down.rough())

    @classmethod
    def pack(
        cls,
        config: ModelConfig,
        tensors: MutableMapping[str, Tensor],
        prefix: str,
        weight_format: str,
        views: Sequence[str],
        split: "LayerSplit",
        shared: "DecoderLayer | None" = None,
        *,
        qk_norm: bool,
        after_norm: str,
    ) -> "DecoderLayer":
        """A layer of a checkpoint in the usual layout. Its tensors are taken out of `tensors`, so that packing never holds
        two copies of the model.

        prefix: what the names of the layer's tensors begin with, without the dot behind it.
        weight_format: a name that `pack_weight` (kernels/linear) knows. views: the suffixes of the views whose projections it
        has: all of `ModelConfig.view_suffixes`, or one. With one, all rows of a pass are of that view. It has the norms of
        queries and keys of all the model's views in any case.
        split: which part of the layer `tensors` hold; `config` is that of this part.
        shared: the same layer for the other view, if this one is to share its MLP and norms. Their tensors are then not needed.
        qk_norm: whether the layer norms queries and keys. after_norm: the name of the norm behind the layer.
        """

        def take(name: str) -> Tensor:
            return tensors.pop(f"{prefix}.{name}")

        def projection(name: str) -> Parameters:
            start = f"{prefix}.{name}."
            return {
                key.removeprefix(start): tensors.pop(key) for key in list(tensors) if key.startswith(start)
            }

        def attention(*names: str) -> Weight:
            """The projections `names` as one layer, with every view's weights."""
            projections = [[projection(f"self_attn.{name}_proj{view}") for name in names] for view in views]
            part = split.out if names == ("o",) else split.outputs
            return pack_weight(projections, OUTSIDE_MLP.get(weight_format, weight_format), split=part)

        return cls(
            qkv=attention("q", "k", "v"),
            qk_norm=_take_qk_norms(config, tensors, prefix) if qk_norm else None,
            out=attention("o"),
            mlp_norm=shared.mlp_norm if shared else take("post_attention_layernorm.weight"),
            gate_up=shared.gate_up
            if shared
            else pack_weight(
                [[projection("mlp.gate_proj"), projection("mlp.up_proj")]],
                weight_format,
                gated=True,
                split=split.outputs,
            ),
            down=shared.down
            if shared
            else pack_weight([[projection("mlp.down_proj")]], weight_format, split=split.down),
            after_norm=shared.after_norm if shared else tensors.pop(after_norm),
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
        )

    def __call__(
        self,
        hidden: Tensor,
        normed: Tensor,
        cos: Tensor,
        sin: Tensor,
        plan: PassPlan,
        kv: KVLayer,
        rounding: Rounding | None,
    ) -> tuple[Tensor, Tensor]:
        """Run the layer on all rows of a pass. Writes the AR rows' keys and values to the cache.

        hidden, normed [rows, hidden_size]: the residual stream, and the same after the layer's first norm. cos, sin
        [rows, 1, head_dim]: the rows' rotary angles. kv: this layer's part of the cache. rounding: that of the next layer.
        Returns the residual stream behind the layer, and the same after `after_norm`.
        """
        qkv = self.qkv.linear(normed, plan.num_ar).unflatten(1, (-1, self.head_dim))
        kv.write(qkv, self.qk_norm, cos, sin, self.eps, plan.num_ar, plan.writes)
        attended = kv.attend(qkv, plan.attention, self.head_dim**-0.5, self.out.rounding)
        hidden, normed = self.out.linear_add_rms_norm(
            attended, hidden, self.mlp_norm, self.eps, plan.num_ar, self.gate_up.rounding
        )
        gated = self.gate_up.linear_silu_mul(normed, plan.num_ar, self.down.rounding)
        return self.down.linear_add_rms_norm(gated, hidden, self.after_norm, self.eps, plan.num_ar, rounding)


def _take_qk_norms(config: ModelConfig, tensors: MutableMapping[str, Tensor], prefix: str) -> Tensor:
    """See `DecoderLayer.qk_norm`. In `tensors`, a view has one norm for its queries and one for its keys; they are taken out."""
    heads = (("q", config.num_attention_heads), ("k", config.num_key_value_heads))
    views = [
        torch.cat(
            [
                tensors.pop(f"{prefix}.self_attn.{name}_norm{view}.weight").expand(count, -1)
                for name, count in heads
            ]
        )
        for view in config.view_suffixes
    ]
    return torch.stack(views)
