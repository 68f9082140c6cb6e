"""Builders of tiny random checkpoints, written by Hugging Face's own code rather than by ours."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")


def make_checkpoint(
    path: Path,
    *,
    diffusion: bool = True,
    seed: int = 0,
    vocab_size: int = 128,
    hidden_size: int = 64,
    intermediate_size: int = 128,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    max_position_embeddings: int = 512,
    tie: bool = True,
    bias: bool = False,
    yarn: bool = False,
    block_size: int = 8,
    correlated: bool = True,
    noise: float = 0.05,
    initializer_range: float = 0.15,
    eos_token_id: int | list[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a random Qwen3, with a diffusion view unless `diffusion` is off, to `path`, and return it.

    correlated: the diffusion weights are the AR ones plus `noise` times as much noise, so that drafts are right now
    and then; else they are drawn on their own. mask_token_id is the last id; eos_token_id the last but one, unless
    given.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _save_base(
            path,
            dtype,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_position_embeddings,
            tie_word_embeddings=tie,
            attention_bias=bias,
            rope_parameters=_rope(yarn, max_position_embeddings),
            initializer_range=initializer_range,
            bos_token_id=None,
            eos_token_id=vocab_size - 2 if eos_token_id is None else eos_token_id,
        )
        if diffusion:
            add_diffusion(path, correlated, noise, initializer_range)
            edit_json(
                path / "config.json",
                architectures=["OrthrusLM"],
                block_size=block_size,
                mask_token_id=vocab_size - 1,
            )
    return path


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON object in place; a value of None removes the key."""
    data = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def _rope(yarn: bool, max_position_embeddings: int) -> dict[str, Any]:
    if not yarn:
        return {"rope_type": "default", "rope_theta": 10000.0}
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": max_position_embeddings // 4,
    }


def _save_base(path: Path, dtype: torch.dtype, **settings: Any) -> None:
    model = Qwen3ForCausalLM(Qwen3Config(**settings))
    # Hugging Face starts biases at 0 and norms at 1: random ones, or a mix-up of two would go unnoticed.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0.0, 0.1)
            elif "norm" in name:
                parameter.normal_(1.0, 0.1)
    model.to(dtype).save_pretrained(path)


def add_diffusion(
    path: Path, correlated: bool = True, noise: float = 0.05, initializer_range: float = 0.15
) -> None:
    """Add `*_diff` weights to the checkpoint at `path`. Arguments: see `make_checkpoint`."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    added = {}
    for name, tensor in tensors.items():
        for projection in PROJECTIONS:
            if f".self_attn.{projection}." not in name:
                continue
            random = torch.randn(tensor.shape)
            if correlated:
                spread = tensor.float().std().item() if tensor.numel() > 1 else 0.0
                weight = tensor.float() + noise * spread * random
            elif "norm" in projection:
                weight = 1.0 + 0.1 * random
            else:
                weight = initializer_range * random
            added[name.replace(projection, f"{projection}_diff")] = weight.to(tensor.dtype)
    # load_file maps the file: rewrite it through copies.
    save_file({k: v.clone() for k, v in (tensors | added).items()}, file, metadata={"format": "pt"})
