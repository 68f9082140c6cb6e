"""`ModelConfig`: the shape of a plain or Orthrus-accelerated Qwen3, read from and written to Hugging Face's config.json."""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import Qwen3Config

from orthrus.errors import ConfigError

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
MODEL_TYPES = ("qwen3", "orthrus")
ROPE_TYPES = ("default", "yarn")
DTYPES = ("float32", "bfloat16", "float16", "float64")

# Without these a file says nothing about its weights; everything else has a default that Hugging Face agrees on.
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
_OPTIONAL = (
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@dataclass(frozen=True)
class ModelConfig:
    """What the weights of a Qwen3 look like, and how its two views use them.

    rope_parameters: rotary settings by their transformers-5 names, `rope_type` "default" or "yarn".
    eos_token_ids: generation_config.json's, or config.json's where it names none. block_size: rows of a full
    diffusion block, newest token included, None without a diffusion view; mask_token_id: what the rows after the
    first hold. dtype: the one that the checkpoint is saved in. name: for people, not part of equality.
    Raises ConfigError for values that no such model can have.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    rope_parameters: Mapping[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 1_000_000.0}, hash=False
    )
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    block_size: int | None = None
    mask_token_id: int | None = None
    dtype: str = "float32"
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for key in (*_REQUIRED, "head_dim", "max_position_embeddings"):
            value = getattr(self, key)
            if not _is_int(value) or value < 1:
                raise ConfigError(f"{key} must be a positive integer, got {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if not _is_number(self.rms_norm_eps) or self.rms_norm_eps < 0:
            raise ConfigError(f"rms_norm_eps must be a number of at least 0, got {self.rms_norm_eps!r}")
        if self.dtype not in DTYPES:
            raise ConfigError(
                f"dtype {self.dtype!r} is not supported: save the weights in one of {', '.join(DTYPES)}"
            )
        self._check_rope()
        self._check_tokens()

    def _check_rope(self) -> None:
        rope = self.rope_parameters
        rope_type = rope.get("rope_type")
        _check_rope_type(rope_type)
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError("partial_rotary_factor is not supported: remove it (Qwen3 rotates whole heads)")
        required = ("rope_theta", "factor", "original_max_position_embeddings")
        for key in required if rope_type == "yarn" else required[:1]:
            value = rope.get(key)
            if not _is_number(value) or value < 1:
                raise ConfigError(
                    f"{key} of rope_type {rope_type!r} must be a number of at least 1, got {value!r}"
                )

    def _check_tokens(self) -> None:
        if (self.block_size is None) != (self.mask_token_id is None):
            missing = "mask_token_id" if self.mask_token_id is None else "block_size"
            raise ConfigError(
                f"{missing} is missing: a diffusion view needs both block_size and mask_token_id"
            )
        if self.block_size is not None and (not _is_int(self.block_size) or self.block_size < 2):
            raise ConfigError(f"block_size must be an integer of at least 2, got {self.block_size!r}")
        named = [("eos_token_id", token) for token in self.eos_token_ids]
        named += [(key, getattr(self, key)) for key in ("bos_token_id", "pad_token_id", "mask_token_id")]
        for key, token in named:
            if token is not None and (not _is_int(token) or not 0 <= token < self.vocab_size):
                raise ConfigError(
                    f"{key} must be a token id from 0 to vocab_size - 1 = {self.vocab_size - 1}, got {token!r}"
                )

    @property
    def has_diffusion(self) -> bool:
        """Whether the checkpoint has a diffusion view (`*_diff` weights)."""
        return self.block_size is not None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, name: str = "") -> "ModelConfig":
        """The config that a config.json's contents describe, in the style of transformers 4 or 5.

        Raises ConfigError naming the setting for a model that isn't a supported Qwen3.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"expected a JSON object, found {type(data).__name__}")
        _check_supported(data)
        missing = [key for key in _REQUIRED if data.get(key) is None]
        if missing:
            raise ConfigError(f"{', '.join(missing)} missing: add what the weights were made with")
        # transformers fills in the dicts that it is given, hence the copy. A null is the same as leaving a key out.
        known = {k: copy.deepcopy(data[k]) for k in (*_REQUIRED, *_OPTIONAL) if data.get(k) is not None}
        try:
            hf = Qwen3Config(**known)
        except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"transformers rejects it as a Qwen3 config: {_one_line(error)}") from error
        dtype = data.get("dtype") or data.get("torch_dtype") or "float32"
        block_size = data.get("block_size")
        return cls(
            **{key: getattr(hf, key) for key in _REQUIRED},
            head_dim=hf.head_dim,
            rms_norm_eps=hf.rms_norm_eps,
            max_position_embeddings=hf.max_position_embeddings,
            tie_word_embeddings=hf.tie_word_embeddings,
            attention_bias=hf.attention_bias,
            rope_parameters=_plain_rope(hf.rope_parameters),
            eos_token_ids=_token_ids(hf.eos_token_id),
            bos_token_id=hf.bos_token_id,
            pad_token_id=hf.pad_token_id,
            block_size=block_size,
            # Tokenizers of plain models may name a mask token too; without a block it means nothing here.
            mask_token_id=data.get("mask_token_id") if block_size is not None else None,
            dtype=str(dtype).removeprefix("torch."),
            name=name,
        )

    @classmethod
    def from_dir(cls, path: str | Path) -> "ModelConfig":
        """Read `path`/config.json, and the end-of-sequence ids from generation_config.json where there is one.

        Raises ConfigError naming the file and the setting.
        """
        path = Path(path)
        file = path / CONFIG_FILE
        data = read_json(file)
        generation_file = path / GENERATION_CONFIG_FILE
        if generation_file.is_file():
            generation = read_json(generation_file)
            for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
                # What the text ends with is for generation_config to say; the others only fill gaps.
                if generation.get(key) is not None and (key == "eos_token_id" or data.get(key) is None):
                    data[key] = generation[key]
        try:
            return cls.from_dict(data, name=_display_name(path))
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json in the official format, which transformers reads as a Qwen3 (the AR view)."""
        eos = list(self.eos_token_ids)
        data: dict[str, Any] = {
            "architectures": ["OrthrusLM" if self.has_diffusion else "Qwen3ForCausalLM"],
            "attention_bias": self.attention_bias,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "dtype": self.dtype,
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "model_type": "qwen3",
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "pad_token_id": self.pad_token_id,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": dict(self.rope_parameters),
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_sliding_window": False,
            "vocab_size": self.vocab_size,
        }
        if self.has_diffusion:
            data |= {"block_size": self.block_size, "mask_token_id": self.mask_token_id}
        return data

    def rotary(self) -> tuple[Tensor, float]:
        """Rotary frequencies, float32 [head_dim / 2] on CPU, and the factor on cos and sin, by transformers' own code."""
        # Here, since it takes two seconds and only an engine needs it: an ingress is to start fast.
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

        known = {k: v for k, v in self.to_dict().items() if k in (*_REQUIRED, *_OPTIONAL)}
        with torch.device("cpu"):
            rotary = Qwen3RotaryEmbedding(Qwen3Config(**known))
        return rotary.inv_freq.float(), float(rotary.attention_scaling)


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises ConfigError naming the file when it can't be read or holds something else."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file} is missing: give a directory in Hugging Face format") from None
    except OSError as error:
        raise ConfigError(f"{file} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file} isn't valid JSON ({error}): download or save it again") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: expected a JSON object, found {type(data).__name__}")
    return data


def _check_supported(data: Mapping[str, Any]) -> None:
    """Refuse what would load but run as a different model."""
    model_type = data.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ConfigError(
            f"model_type {model_type!r} is not supported: use a model of type {' or '.join(MODEL_TYPES)}"
        )
    if data.get("quantization_config") is not None:
        raise ConfigError("quantization_config is not supported: use the unquantised checkpoint")
    if data.get("use_sliding_window"):
        raise ConfigError(
            "use_sliding_window is not supported: set it to false if the model was trained without it"
        )
    layer_types = data.get("layer_types") or ()
    other = sorted({str(t) for t in layer_types if t != "full_attention"})
    if other:
        raise ConfigError(f"layer_types {', '.join(other)} is not supported: only full_attention is")
    activation = data.get("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f"hidden_act {activation!r} is not supported: only silu is")
    # Before transformers reads them: it would ask for the settings that the unsupported type needs.
    rope = data.get("rope_scaling") or data.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"rope_parameters must be an object with rope_type and rope_theta, got {rope!r}")
    _check_rope_type(rope.get("rope_type", rope.get("type", "default")))
    is_orthrus = model_type == "orthrus" or "OrthrusLM" in (data.get("architectures") or ())
    if is_orthrus and data.get("block_size") is None:
        raise ConfigError(
            "block_size is missing from an Orthrus checkpoint: add the block_size and mask_token_id that it was "
            "trained with (the published models: 32 and 151669)"
        )


def _check_rope_type(rope_type: object) -> None:
    if rope_type not in ROPE_TYPES:
        raise ConfigError(f"rope_type {rope_type!r} is not supported: use one of {', '.join(ROPE_TYPES)}")


def _plain_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings without nulls and without the transformers-4 name of `rope_type`."""
    return {key: value for key, value in rope.items() if value is not None and key != "type"}


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _display_name(path: Path) -> str:
    """A directory's name, or the hub id of a snapshot in the hub cache (models--ORG--NAME/snapshots/REVISION)."""
    path = path.resolve()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
