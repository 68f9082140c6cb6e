"""`LayerParallelForward`: the AR view and the diffusion view of all rows of a pass, layer by layer, over one shared cache.

At every layer both views run side by side: each has its own attention projections, everything else (norms, MLP, embedding,
head) is read once for all rows. AR keys and values are written to the cache before attention; both views read them there.
Formulas: Qwen3 (Yang et al., 2025), Orthrus (arXiv 2605.12825, section 3).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import (
    PackedLinear,
    linear,
    pack_linear,
    paged_attention,
    qk_norm_rope,
    rms_norm,
    silu_mul,
)
from orthrus.config import ModelConfig
from orthrus.kv_cache import KVCache
from orthrus.plan import PassPlan, View


@dataclass(frozen=True)
class ViewWeights:
    """One view's attention projections in one layer. qk_norm [heads + kv_heads, head_dim]: the norm weight of each head."""

    qkv: PackedLinear
    out: PackedLinear
    qk_norm: Tensor


@dataclass(frozen=True)
class LayerWeights:
    """One layer: the two views' projections (diffusion None without a draft head) and what they share."""

    ar: ViewWeights
    diffusion: ViewWeights | None
    attention_norm: Tensor
    mlp_norm: Tensor
    gate_up: PackedLinear
    down: PackedLinear


def _layer_weights(config: ModelConfig, tensors: dict[str, Tensor], prefix: str) -> LayerWeights:
    """Take one layer's tensors out of `tensors`, so that packing never holds two copies of the model."""

    def take(name: str) -> Tensor:
        return tensors.pop(f"{prefix}.{name}")

    def fuse(*names: str) -> PackedLinear:
        weight = torch.cat([take(f"{n}.weight") for n in names])
        has_bias = f"{prefix}.{names[0]}.bias" in tensors
        return pack_linear(weight, torch.cat([take(f"{n}.bias") for n in names]) if has_bias else None)

    def view(suffix: str) -> ViewWeights:
        norms = [
            take(f"self_attn.{name}_norm{suffix}.weight").expand(count, -1)
            for name, count in (("q", config.num_attention_heads), ("k", config.num_key_value_heads))
        ]
        return ViewWeights(
            qkv=fuse(*(f"self_attn.{n}_proj{suffix}" for n in "qkv")),
            out=fuse(f"self_attn.o_proj{suffix}"),
            qk_norm=torch.cat(norms),
        )

    return LayerWeights(
        ar=view(""),
        diffusion=view("_diff") if config.has_diffusion else None,
        attention_norm=take("input_layernorm.weight"),
        mlp_norm=take("post_attention_layernorm.weight"),
        gate_up=fuse("mlp.gate_proj", "mlp.up_proj"),
        down=fuse("mlp.down_proj"),
    )


class LayerParallelForward:
    """The model: turns a pass plan into logits, and writes the plan's AR keys and values to the cache.

    `tensors` are a checkpoint's, by their Hugging Face names, on one device in one dtype; the dict is emptied.
    """

    def __init__(self, config: ModelConfig, tensors: dict[str, Tensor]) -> None:
        self.config = config
        self._embedding = tensors.pop("model.embed_tokens.weight")
        self._final_norm = tensors.pop("model.norm.weight")
        self._head = pack_linear(
            self._embedding if config.tie_word_embeddings else tensors.pop("lm_head.weight")
        )
        tensors.pop("lm_head.weight", None)
        self._layers = [
            _layer_weights(config, tensors, f"model.layers.{i}") for i in range(config.num_hidden_layers)
        ]
        self.device = self._embedding.device
        self.dtype = self._embedding.dtype
        inv_freq, self._rope_scaling = config.rotary()
        self._inv_freq = inv_freq.to(self.device)

    @property
    def heads_per_kv(self) -> int:
        return self.config.num_attention_heads // self.config.num_key_value_heads

    def _rope_tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [rows, 1, head_dim] as `apply_rope` takes them, from positions int64 [rows]."""
        angles = positions.to(torch.float32)[:, None] * self._inv_freq
        cos, sin = angles.cos() * self._rope_scaling, angles.sin() * self._rope_scaling
        return (
            torch.cat([cos, cos], -1).unsqueeze(1).to(self.dtype),
            torch.cat([-sin, sin], -1).unsqueeze(1).to(self.dtype),
        )

    def _attend(
        self,
        index: int,
        layer: LayerWeights,
        hidden: Tensor,
        plan: PassPlan,
        cache: KVCache,
        rope: dict[View, tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Both views' attention blocks [rows, hidden_size] for the normed `hidden` of all rows; `rope`: each view's tables."""
        heads, dim = self.config.num_attention_heads, self.config.head_dim
        num_ar = plan.num_ar
        eps, scale = self.config.rms_norm_eps, dim**-0.5
        keys, values = cache.layers[index]
        attended = torch.zeros(plan.num_rows, heads * dim, device=hidden.device, dtype=hidden.dtype)
        if num_ar:
            qkv = linear(hidden[:num_ar], layer.ar.qkv).view(num_ar, -1, dim)
            place = plan.slots[:num_ar], *cache.slots[index]
            ar_qk = qk_norm_rope(qkv, layer.ar.qk_norm, *rope[View.AR], eps, *place)
        if num_ar < plan.num_rows:
            assert layer.diffusion is not None, (
                "the plan has diffusion rows, the checkpoint has no diffusion view"
            )
            df_qkv = linear(hidden[num_ar:], layer.diffusion.qkv).view(plan.num_rows - num_ar, -1, dim)
            df_qk = qk_norm_rope(df_qkv, layer.diffusion.qk_norm, *rope[View.DIFFUSION], eps)
        for batch in plan.attention:
            shape = (*batch.limits.shape, -1, dim)
            if batch.diffusion:
                rows = slice(batch.rows.start - num_ar, batch.rows.stop - num_ar)
                own = df_qk[rows].view(shape)
                block_v = df_qkv[rows, df_qk.shape[1] :].unflatten(0, batch.limits.shape)
                out = paged_attention(
                    own[:, :, :heads], keys, values, batch, scale, own[:, :, heads:], block_v
                )
            else:
                query = ar_qk[batch.rows].view(shape)[:, :, :heads]
                out = paged_attention(query, keys, values, batch, scale)
            attended[batch.rows] = out.reshape(-1, heads * dim)
        outputs = []
        if num_ar:
            outputs.append(linear(attended[:num_ar], layer.ar.out))
        if num_ar < plan.num_rows:
            assert layer.diffusion is not None
            outputs.append(linear(attended[num_ar:], layer.diffusion.out))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    @torch.inference_mode()
    def __call__(self, plan: PassPlan, cache: KVCache) -> Tensor:
        """Run the pass. Returns logits float32 (float64 for a float64 model) [plan.num_logits, vocab_size]."""
        eps = self.config.rms_norm_eps
        hidden = F.embedding(plan.tokens, self._embedding)
        rope = {
            View.AR: self._rope_tables(plan.positions[: plan.num_ar]),
            View.DIFFUSION: self._rope_tables(plan.positions[plan.num_ar :]),
        }
        for index, layer in enumerate(self._layers):
            normed = rms_norm(hidden, layer.attention_norm, eps)
            hidden = hidden + self._attend(index, layer, normed, plan, cache, rope)
            gated = silu_mul(linear(rms_norm(hidden, layer.mlp_norm, eps), layer.gate_up))
            hidden = hidden + linear(gated, layer.down)
        last = rms_norm(hidden[plan.logit_rows], self._final_norm, eps)
        logits = linear(last, self._head)[: plan.num_logits]
        return logits if logits.dtype == torch.float64 else logits.float()
