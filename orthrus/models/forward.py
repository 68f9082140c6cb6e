"""`LayerParallelForward`: the AR view and the diffusion view of all rows of a pass, layer by layer, over one shared cache.

At every layer both views run side by side: each has its own attention projections, everything else (norms, MLP, embedding,
head) is read once for all rows. AR keys and values are written to the cache before attention; both views read them there.
Formulas: Qwen3 (Yang et al., 2025), Orthrus (arXiv 2605.12825, section 3).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import Parameters, Weight, embed, pack_weight, paged_attention, qk_norm_rope, start_layer
from orthrus.cache.kv_cache import KVCache
from orthrus.models.config import ModelConfig
from orthrus.plan import PassPlan

_HEAD_SEGMENT = 192
"""Most inputs in one sum of the LM head on a CPU: of what it rounds away, nothing is normed away afterwards."""


@dataclass(frozen=True)
class LayerWeights:
    """One layer. qkv, out: the attention projections, of both views where there is a draft head.

    qk_norm [views, heads + kv_heads, head_dim]: the norm weight of each head. after_norm: the norm behind the layer, which is the
    next layer's first, or the model's last.
    """

    qkv: Weight
    qk_norm: Tensor
    out: Weight
    mlp_norm: Tensor
    gate_up: Weight
    down: Weight
    after_norm: Tensor


def _layer_weights(
    config: ModelConfig, tensors: dict[str, Tensor], index: int, weight_format: str
) -> LayerWeights:
    """Take one layer's tensors out of `tensors`, so that packing never holds two copies of the model."""
    prefix = f"model.layers.{index}"
    views = ("", "_diff") if config.has_diffusion else ("",)

    def take(name: str) -> Tensor:
        return tensors.pop(f"{prefix}.{name}")

    def projection(name: str) -> Parameters:
        start = f"{prefix}.{name}."
        return {key.removeprefix(start): tensors.pop(key) for key in list(tensors) if key.startswith(start)}

    def attention(*names: str) -> Weight:
        """The projections `names` as one layer, with every view's weights."""
        projections = [[projection(f"self_attn.{name}_proj{view}") for name in names] for view in views]
        return pack_weight(projections, weight_format)

    norms = [
        take(f"self_attn.{name}_norm{view}.weight").expand(count, -1)
        for view in views
        for name, count in (("q", config.num_attention_heads), ("k", config.num_key_value_heads))
    ]
    last = index + 1 == config.num_hidden_layers
    following = "model.norm.weight" if last else f"model.layers.{index + 1}.input_layernorm.weight"
    return LayerWeights(
        qkv=attention("q", "k", "v"),
        qk_norm=torch.cat(norms).unflatten(0, (len(views), -1)),
        out=attention("o"),
        mlp_norm=take("post_attention_layernorm.weight"),
        gate_up=pack_weight(
            [[projection("mlp.gate_proj"), projection("mlp.up_proj")]], weight_format, gated=True
        ),
        down=pack_weight([[projection("mlp.down_proj")]], weight_format),
        after_norm=tensors.pop(following),
    )


class LayerParallelForward:
    """The model: turns a pass plan into hidden states and logits, and writes the plan's AR keys and values to the cache.

    `tensors` are a checkpoint's, by their Hugging Face names, on one device in one dtype; the dict is emptied. head: the LM
    head, which makes logits of final hidden states. It has position 0 only until `use_context` gives it more.
    """

    def __init__(self, config: ModelConfig, tensors: dict[str, Tensor], weight_format: str = "plain") -> None:
        """weight_format: how the linear layers keep their weights, by a name that `kernels.pack_weight` knows."""
        self.config = config
        self._embedding = tensors.pop("model.embed_tokens.weight")
        head = tensors.pop("lm_head.weight", None)
        self.head = pack_weight(
            [[{"weight": self._embedding if head is None else head}]],
            weight_format,
            longest_sum=_HEAD_SEGMENT,
        )
        self._first_norm = tensors.pop("model.layers.0.input_layernorm.weight")
        self._layers = [
            _layer_weights(config, tensors, i, weight_format) for i in range(config.num_hidden_layers)
        ]
        self.device = self._embedding.device
        self.dtype = self._embedding.dtype
        self._inv_freq, self._rope_scaling = config.rotary()
        self.use_context(1)

    @property
    def heads_per_kv(self) -> int:
        return self.config.num_attention_heads // self.config.num_key_value_heads

    def use_context(self, positions: int) -> None:
        """Have rotary angles for so many positions: what the cache holds, which may be far less than the model allows.

        Not for a forward whose passes have been captured.
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

        picks: int32, the runner's picks, for tokens that the plan takes from there.
        """
        config = self.config
        eps, dim = config.rms_norm_eps, config.head_dim
        start = embed(
            plan.tokens, plan.positions, picks, self._embedding, self._first_norm, eps, self._cos, self._sin
        )
        hidden, normed = start.hidden, start.normed
        for index, layer in enumerate(self._layers):
            start_layer()
            qkv = layer.qkv.linear(normed, plan.num_ar).unflatten(1, (-1, dim))
            qk_norm_rope(
                qkv, layer.qk_norm, start.cos, start.sin, eps, plan.num_ar, plan.slots, *cache.slots[index]
            )
            attended = paged_attention(qkv, *cache.layers[index], plan.attention, dim**-0.5)
            hidden, normed = layer.out.linear_add_rms_norm(attended, hidden, layer.mlp_norm, eps, plan.num_ar)
            gated = layer.gate_up.linear_silu_mul(normed)
            hidden, normed = layer.down.linear_add_rms_norm(gated, hidden, layer.after_norm, eps)
        return normed

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of final hidden states [rows, hidden_size]: float32 (float64 for a float64 model) [rows, vocab_size].

        A 16-bit model's are rounded to 16 bits first.
        """
        logits = self.head.linear(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
