"""`ModelConfig`: the shape of a plain or Orthrus-accelerated Qwen3, read from and written to Hugging Face's config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthrus.errors import ConfigError
from orthrus.files import is_int, is_number, one_line, read_json, shown
from orthrus.models.rope import (
    MOST_POSITIONS,
    check_rope,
    check_rope_numbers,
    check_rope_type,
    standard_rope,
    yarn_context,
)

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
MODEL_TYPES = ("qwen3", "orthrus")
DTYPE_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
"""Bytes of a number, by the dtypes that models are run in."""

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
)

# Far beyond any model there is, and small enough that nothing made from these numbers alone takes long or much memory.
_MOST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "max_position_embeddings": MOST_POSITIONS,
    "block_size": 1 << 10,
}


# Those of Hugging Face's Qwen3Config.
_DEFAULTS = {
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
}


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
            _check_size(key, getattr(self, key))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if not isinstance(self.rms_norm_eps, float) or not is_number(self.rms_norm_eps, 0.0, 1.0):
            raise ConfigError(
                f"rms_norm_eps must be a decimal number from 0 to 1, got {shown(self.rms_norm_eps)}"
            )
        for key in ("tie_word_embeddings", "attention_bias"):
            if not isinstance(getattr(self, key), bool):
                raise ConfigError(f"{key} must be true or false, got {shown(getattr(self, key))}")
        if not isinstance(self.dtype, str) or self.dtype not in DTYPE_SIZES:
            raise ConfigError(
                f"dtype {shown(self.dtype)} is not supported: save the weights in one of {', '.join(DTYPE_SIZES)}"
            )
        check_rope(self.rope_parameters)
        self._check_tokens()

    def _check_tokens(self) -> None:
        if (self.block_size is None) != (self.mask_token_id is None):
            missing = "mask_token_id" if self.mask_token_id is None else "block_size"
            raise ConfigError(
                f"{missing} is missing: a diffusion view needs both block_size and mask_token_id"
            )
        if self.block_size is not None:
            _check_size("block_size", self.block_size, least=2)
        named = [("eos_token_id", token) for token in self.eos_token_ids]
        named += [(key, getattr(self, key)) for key in ("bos_token_id", "pad_token_id", "mask_token_id")]
        for key, token in named:
            if token is not None:
                _check_token(key, token, self.vocab_size)

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
        # A null is the same as leaving a key out.
        present = {key: data[key] for key in (*_REQUIRED, *_OPTIONAL) if data.get(key) is not None}
        for key in _MOST.keys() & present.keys():
            _check_size(key, present[key])
        dtype = next((data[key] for key in ("dtype", "torch_dtype") if data.get(key) is not None), "float32")
        block_size = data.get("block_size")
        fields = _DEFAULTS | present
        rope = standard_rope(fields)
        check_rope(rope)
        return cls(
            **{key: fields[key] for key in (*_REQUIRED, *_DEFAULTS) if key != "max_position_embeddings"},
            max_position_embeddings=max(fields["max_position_embeddings"], yarn_context(rope)),
            rope_parameters=rope,
            eos_token_ids=_token_ids(data.get("eos_token_id"), present["vocab_size"]),
            bos_token_id=data.get("bos_token_id"),
            pad_token_id=data.get("pad_token_id"),
            block_size=block_size,
            # Tokenizers of plain models may name a mask token too; without a block it means nothing here.
            mask_token_id=data.get("mask_token_id") if block_size is not None else None,
            dtype=dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype,
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
        try:
            config = cls.from_dict(data, name=_display_name(path))
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error
        generation_file = path / GENERATION_CONFIG_FILE
        if not generation_file.exists():
            return config
        generation = read_json(generation_file)
        try:
            return replace(config, **_generation_tokens(generation, config))
        except ConfigError as error:
            raise ConfigError(f"{generation_file}: {error}") from error

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

    def rotary(self) -> tuple["Tensor", float]:
        """Rotary frequencies, float32 [head_dim / 2] on CPU, and the factor on cos and sin, by transformers' own code."""
        # Here, since they take seconds and only an engine needs them: `config check` and an ingress are to start fast.
        import torch
        from transformers import Qwen3Config
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

        known = {k: v for k, v in self.to_dict().items() if k in (*_REQUIRED, *_OPTIONAL)}
        try:
            with torch.device("cpu"):
                rotary = Qwen3RotaryEmbedding(Qwen3Config(**known))
            frequencies, scaling = rotary.inv_freq.float(), float(rotary.attention_scaling)
        except (ValueError, ArithmeticError) as error:
            raise ConfigError(f"rope_parameters give no rotary embedding: {one_line(error)}") from error
        if not frequencies.isfinite().all():
            raise ConfigError(
                f"rope_parameters {shown(dict(self.rope_parameters))} give frequencies that are no numbers"
            )
        return frequencies, scaling


def _check_supported(data: Mapping[str, Any]) -> None:
    """Refuse what would load but run as a different model."""
    model_type = data.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ConfigError(
            f"model_type {shown(model_type)} is not supported: use a model of type {' or '.join(MODEL_TYPES)}"
        )
    if data.get("quantization_config") is not None:
        raise ConfigError("quantization_config is not supported: use the unquantised checkpoint")
    if data.get("use_sliding_window") not in (None, False):
        raise ConfigError(
            "use_sliding_window is not supported: set it to false if the model was trained without it"
        )
    layer_types = _list_of(data, "layer_types")
    other = sorted({shown(t).strip("'") for t in layer_types if t != "full_attention"})
    if other:
        raise ConfigError(f"layer_types {', '.join(other[:3])} is not supported: only full_attention is")
    activation = data.get("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f"hidden_act {shown(activation)} is not supported: only silu is")
    # Before transformers reads them: it would ask for the settings that the unsupported type needs.
    for key in ("rope_scaling", "rope_parameters"):
        rope = {} if data.get(key) is None else data[key]
        if not isinstance(rope, Mapping):
            raise ConfigError(f"{key} must be an object with rope_type and rope_theta, got {shown(rope)}")
        check_rope_type(rope.get("rope_type", rope.get("type", "default")))
        check_rope_numbers(rope)
    is_orthrus = model_type == "orthrus" or "OrthrusLM" in _list_of(data, "architectures")
    if is_orthrus and data.get("block_size") is None:
        raise ConfigError(
            "block_size is missing from an Orthrus checkpoint: add the block_size and mask_token_id that it was "
            "trained with (the published models: 32 and 151669)"
        )


def _list_of(data: Mapping[str, Any], key: str) -> list[Any]:
    value = data.get(key)
    if value is not None and not isinstance(value, list):
        raise ConfigError(f"{key} must be a list, got {shown(value)}")
    return value or []


def _check_size(key: str, value: object, least: int = 1) -> None:
    if not is_int(value) or value < least:
        wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ConfigError(f"{key} must be {wanted}, got {shown(value)}")
    if value > _MOST[key]:
        raise ConfigError(f"{key} must be at most {_MOST[key]}, got {shown(value)}")


def _check_token(key: str, token: object, vocab_size: int) -> None:
    if not is_int(token) or not 0 <= token < vocab_size:
        raise ConfigError(
            f"{key} must be a token id from 0 to vocab_size - 1 = {vocab_size - 1}, got {shown(token)}"
        )


def _token_ids(value: object, vocab_size: int) -> tuple[int, ...]:
    """An eos_token_id as token ids: one, several or, for null and an empty list, none."""
    ids = () if value is None else value if isinstance(value, list) else (value,)
    for token in ids:
        _check_token("eos_token_id", token, vocab_size)
    return tuple(dict.fromkeys(ids))


def _generation_tokens(generation: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The fields of `config` that a generation_config.json decides.

    What ends the text is for it to say; the other special tokens only fill gaps.
    """
    changes: dict[str, Any] = {}
    if (eos := generation.get("eos_token_id")) is not None:
        changes["eos_token_ids"] = _token_ids(eos, config.vocab_size)
    for key in ("bos_token_id", "pad_token_id"):
        if generation.get(key) is not None and getattr(config, key) is None:
            changes[key] = generation[key]
    return changes


def _display_name(path: Path) -> str:
    """A directory's name, or the hub id of a snapshot in the hub cache (models--ORG--NAME/snapshots/REVISION)."""
    path = path.resolve()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name
