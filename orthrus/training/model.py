"""The trainable model with two views: plain dense PyTorch, with the checkpoint's parameter names.

`orthrus.models.forward` serves the same weights from a paged cache.
"""

from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from orthrus.models.checkpoint import load_weights, with_own_head
from orthrus.models.config import ModelConfig
from orthrus.models.dense import dequantised
from orthrus.models.families import family_of, load_config
from orthrus.training.attention import KeysValues, draft_attention
from orthrus.training.blocks import DraftBlocks


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [batch, heads, rows, head_dim] by cos, sin [batch or 1, 1, rows, head_dim / 2]."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Attention(nn.Module):
    """The projections of both views. Names of the diffusion view's parameters contain `_diff`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        bias = config.attention_bias
        qk_norm = family_of(config).qk_norm
        for suffix in config.view_suffixes:
            for name, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
                self.add_module(
                    f"{name}_proj{suffix}", nn.Linear(config.hidden_size, heads * self.dim, bias=bias)
                )
            self.add_module(
                f"o_proj{suffix}", nn.Linear(self.heads * self.dim, config.hidden_size, bias=bias)
            )
            for name in "qk":
                # A family without these norms only rotates.
                norm = RMSNorm(self.dim, config.rms_norm_eps) if qk_norm else nn.Identity()
                self.add_module(f"{name}_norm{suffix}", norm)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor, suffix: str = "") -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values [batch, heads, rows, head_dim], normed and rotated, of x [batch, rows, hidden_size]."""

        def heads(name: str) -> Tensor:
            projected: Tensor = getattr(self, f"{name}_proj{suffix}")(x)
            return projected.unflatten(-1, (-1, self.dim)).transpose(1, 2)

        value = heads("v")
        # Under autocast some versions of torch return norms in float32, but attention takes one dtype.
        query, key = (
            rotate(getattr(self, f"{n}_norm{suffix}")(heads(n)), cos, sin).to(value.dtype) for n in "qk"
        )
        return query, key, value

    def merge(self, attended: Tensor, suffix: str = "") -> Tensor:
        """The output projection of attended [batch, heads, rows, head_dim]."""
        merged: Tensor = getattr(self, f"o_proj{suffix}")(attended.transpose(1, 2).flatten(2))
        return merged


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One decoder layer; its norms and MLP serve both views."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def add_mlp(self, hidden: Tensor) -> Tensor:
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def autoregressive(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, KeysValues]:
        query, key, value = self.self_attn.project(self.input_layernorm(hidden), cos, sin)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.add_mlp(hidden + self.self_attn.merge(attended)), (key, value)

    def diffusion(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, cache: KeysValues, blocks: DraftBlocks
    ) -> Tensor:
        query, *own = self.self_attn.project(self.input_layernorm(hidden), cos, sin, "_diff")
        attended = draft_attention(query, cache, (own[0], own[1]), blocks)
        return self.add_mlp(hidden + self.self_attn.merge(attended, "_diff"))


class Decoder(nn.Module):
    """Embedding, layers and final norm (`model.` in the checkpoint)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = cast(
            "list[Layer]", nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class TwoViewModel(nn.Module):
    """A model with an autoregressive view and, where the config has a block size, a diffusion view."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.inv_freq: Tensor
        inv_freq, self._rope_scaling = family_of(config).rotary(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self._autoregressive, self._diffusion = Layer.autoregressive, Layer.diffusion

    def compile_layers(self) -> None:
        """Compile the passes of one layer for all layers. Compiling the whole model would take ten times as long."""
        self._autoregressive = torch.compile(Layer.autoregressive, fullgraph=True)
        self._diffusion = torch.compile(Layer.diffusion, fullgraph=True)

    @property
    def head_weight(self) -> Tensor:
        """The language model head [vocab_size, hidden_size]."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def diffusion_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if "_diff." in name}

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [batch, 1, rows, head_dim / 2] for positions [batch, rows], in the compute dtype."""
        angles = positions[:, None, :, None].float() * self.inv_freq
        device = positions.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.head_weight.dtype
        return (angles.cos() * self._rope_scaling).to(dtype), (angles.sin() * self._rope_scaling).to(dtype)

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[KeysValues]]:
        """The AR view of tokens int64 [batch, rows] at positions 0, 1, ...

        Returns the final hidden states [batch, rows, hidden_size] and every layer's keys and values
        [batch, kv_heads, rows, head_dim].
        """
        cos, sin = self.rope(torch.arange(tokens.shape[1], device=tokens.device)[None])
        # The residual stream is in the compute dtype, as in serving.
        hidden = self.model.embed_tokens(tokens).to(cos.dtype)
        cache = []
        for layer in self.model.layers:
            hidden, keys_values = self._autoregressive(layer, hidden, cos, sin)
            cache.append(keys_values)
        return self.model.norm(hidden), cache

    def diffuse(self, blocks: DraftBlocks, cache: list[KeysValues], recompute: bool = False) -> Tensor:
        """The diffusion view of the rows of `blocks` over the AR view's `cache`; hidden states [batch, rows, hidden_size].

        recompute: keep only each layer's input, and run the layer again in the backward pass.
        """
        cos, sin = self.rope(blocks.positions)
        hidden = self.model.embed_tokens(blocks.tokens).to(cos.dtype)
        for layer, keys_values in zip(self.model.layers, cache, strict=True):
            if recompute:
                hidden = checkpoint(
                    self._diffusion,
                    *(layer, hidden, cos, sin, keys_values, blocks),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                hidden = self._diffusion(layer, hidden, cos, sin, keys_values, blocks)
        final: Tensor = self.model.norm(hidden)
        return final

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab_size] of hidden [..., hidden_size], in its dtype."""
        return F.linear(hidden, self.head_weight.to(hidden.dtype))


def initialise(model: TwoViewModel, seed: int) -> None:
    """Random weights, without a diffusion view: normal with deviation 0.02, but 0 for projections into the residual stream."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                continue
            if name.split(".")[-2] in ("o_proj", "down_proj"):
                parameter.zero_()
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def load_frozen(folder: Path, block_size: int, mask_token_id: int, device: torch.device) -> TwoViewModel:
    """The checkpoint in `folder` with a diffusion view to train. It starts as the checkpoint's own, or as a copy of the AR view.

    Frozen weights are bfloat16 on an accelerator and float32 on a CPU: quantised ones are dequantised. The diffusion view is
    float32.
    """
    stored, tensors = _load_in_full(folder, device)
    with torch.device("meta"):
        model = TwoViewModel(replace(stored, block_size=block_size, mask_token_id=mask_token_id))
    for name in model.diffusion_parameters():
        start = tensors[name if stored.has_diffusion else name.replace("_diff.", ".")]
        tensors[name] = start.to(torch.float32, copy=True)
    model.load_state_dict(tensors, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("_diff." in name)
    return model.to(device)


def load_ar_view(folder: Path, device: torch.device) -> TwoViewModel:
    """The AR view of the checkpoint in `folder`, all of it frozen, in the dtype of `load_frozen`."""
    stored, tensors = _load_in_full(folder, device)
    with torch.device("meta"):
        model = TwoViewModel(replace(stored, block_size=None, mask_token_id=None))
    model.load_state_dict({name: t for name, t in tensors.items() if "_diff." not in name}, assign=True)
    return model.requires_grad_(False).to(device)


def _load_in_full(folder: Path, device: torch.device) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The checkpoint in `folder`, dequantised: in bfloat16 on an accelerator, and in float32 on a CPU."""
    stored = load_config(folder)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    tensors = load_weights(folder, stored, device, dtype)
    stored = with_own_head(stored, tensors)
    if stored.quantization is not None:
        tensors, stored = dequantised(tensors, dtype), replace(stored, quantization=None)
    return stored, tensors
