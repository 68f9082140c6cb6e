"""Self-distillation data: prompts continued by the model itself, many sequences at a time."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from orthrus.training.base import autocast
from orthrus.training.batches import TokenStream
from orthrus.training.model import TwoViewModel


@dataclass(frozen=True)
class DataConfig:
    """How many texts of `length` tokens to sample per temperature, each from `prompt_length` tokens of the corpus."""

    texts: int = 4096
    length: int = 1024
    prompt_length: int = 64
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    batch: int = 1024
    seed: int = 0


def generate(model: TwoViewModel, prompts: TokenStream, config: DataConfig) -> Tensor:
    """The model's own texts int32 [texts x temperatures, length], on the CPU."""
    parts = []
    for index, temperature in enumerate(config.temperatures):
        for start in range(0, config.texts, config.batch):
            step = index * config.texts + start
            rows = prompts.rows(
                min(config.batch, config.texts - start), config.prompt_length, config.seed + 1, step
            )
            parts.append(sample(model, rows, config.length, temperature, config.seed + 1 + step).int().cpu())
            print(f"sampled {step + len(rows)} texts", flush=True)
    return torch.cat(parts)


def gumbel(shape: tuple[int, ...], position: int, seed: int, device: torch.device) -> Tensor:
    """Standard Gumbel noise float32 of `shape`, a function of seed and position."""
    generator = torch.Generator(device).manual_seed((seed << 24) + position)
    uniform = torch.rand(shape, generator=generator, device=device).clamp_(1e-9, 1 - 6e-8)
    return uniform.log_().neg_().log_().neg_()


def pick(logits: Tensor, temperature: float, noise: Tensor | None) -> Tensor:
    """argmax(logits / T + noise) [...]; greedy at temperature 0."""
    if temperature == 0 or noise is None:
        return logits.argmax(-1)
    return (logits.float() / temperature + noise).argmax(-1)


@torch.no_grad()
def sample(model: TwoViewModel, prompts: Tensor, length: int, temperature: float, seed: int) -> Tensor:
    """Continue prompts int64 [batch, prompt] with the AR view up to `length` tokens. Returns int64 [batch, length].

    The pick at position p uses `gumbel(..., p, seed)`. End tokens don't stop a row: packed documents go on after them.
    """
    config, device = model.config, prompts.device
    batch, start = prompts.shape
    with autocast(device):
        hidden, first = model(prompts)
        shape = (batch, config.num_key_value_heads, length, config.head_dim)
        caches = [(layer[1].new_zeros(shape), layer[1].new_zeros(shape)) for layer in first]
        for cache, layer in zip(caches, first, strict=True):
            for whole, part in zip(cache, layer, strict=True):
                whole[:, :, :start] = part
        group = config.num_attention_heads // config.num_key_value_heads
        tokens = [prompts]
        hidden = hidden[:, -1:]
        for position in range(start, length):
            logits = model.logits(hidden[:, -1])
            noise = gumbel(tuple(logits.shape), position, seed, device) if temperature else None
            token = pick(logits, temperature, noise)[:, None]
            tokens.append(token)
            if position + 1 == length:
                break
            cos, sin = model.rope(torch.full((1, 1), position, device=device))
            hidden = model.model.embed_tokens(token)
            for layer_module, (keys, values) in zip(model.model.layers, caches, strict=True):
                attention = layer_module.self_attn
                query, key, value = attention.project(layer_module.input_layernorm(hidden), cos, sin)
                keys[:, :, position : position + 1] = key
                values[:, :, position : position + 1] = value
                # The query heads of a group share keys: as rows of one head they need no copy of them.
                attended = F.scaled_dot_product_attention(
                    query.view(batch, -1, group, config.head_dim),
                    keys[:, :, : position + 1],
                    values[:, :, : position + 1],
                )
                hidden = layer_module.add_mlp(hidden + attention.merge(attended.reshape(query.shape)))
            hidden = model.model.norm(hidden)
    return torch.cat(tokens, 1)
