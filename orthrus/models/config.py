"""`ModelConfig`: the shape of a model, plain or Orthrus-accelerated."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orthrus.errors import ConfigError
from orthrus.files import is_int, is_number, shown
from orthrus.models.quantization import Quantization
from orthrus.models.rope import MOST_POSITIONS, check_rope

DTYPE_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
"""The dtypes that models run in, and the bytes of one number."""
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
"""The settings that the weights' shapes depend on. They have no default."""

# Far beyond any existing model, and small enough that nothing derived from these numbers takes long or much memory.
_LARGEST = {
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


@dataclass(frozen=True)
class ModelConfig:
    """What a model's weights look like, and how its views use them. Raises ConfigError for values that no model can have.

    Fields without a comment have Hugging Face's names and meaning.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    # Positions that the model was trained for, or that YaRN extends it to.
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    # Rotary settings by their transformers 5 names; `rope_type` is "default" or "yarn".
    rope_parameters: Mapping[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 1_000_000.0}, hash=False
    )
    # The end-of-sequence ids of generation_config.json, or of config.json if that file names none.
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    # Rows of a full diffusion block, the newest token included. None for a model without a diffusion view.
    block_size: int | None = None
    # The token that the other rows of a diffusion block hold.
    mask_token_id: int | None = None
    # The dtype that the checkpoint is saved in.
    dtype: str = "float32"
    # Which `Family` the model belongs to: the first of the family's `model_types`.
    model_type: str = "qwen3"
    # Into how many leaves the sums that go into the residual stream are cut. It is a setting of the engine
    # (`EngineConfig.sum_leaves`), not of the file. Another number gives other last bits. None: see `num_leaves`.
    sum_leaves: int | None = None
    # How the linear layers' weights are stored, if they are quantised.
    quantization: Quantization | None = None
    # The model's name in messages.
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for key in (*SIZES, "head_dim", "max_position_embeddings"):
            check_size(key, getattr(self, key))
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
            check_size("block_size", self.block_size, least=2)
        named = [("eos_token_id", token) for token in self.eos_token_ids]
        named += [(key, getattr(self, key)) for key in ("bos_token_id", "pad_token_id", "mask_token_id")]
        for key, token in named:
            if token is not None:
                check_token(key, token, self.vocab_size)

    @property
    def has_diffusion(self) -> bool:
        """Whether the checkpoint has a diffusion view (`*_diff` weights)."""
        return self.block_size is not None

    @property
    def view_suffixes(self) -> tuple[str, ...]:
        """What the names of each view's attention weights end in, the AR view's first."""
        return ("", "_diff") if self.has_diffusion else ("",)


def check_sizes(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for a size in config.json's `settings` that no model has. Missing sizes pass."""
    for key in _LARGEST.keys() & settings.keys():
        check_size(key, settings[key])


def check_size(key: str, value: object, least: int = 1) -> None:
    """Raise ConfigError unless `value` is a possible size for the setting `key`."""
    if not is_int(value) or value < least:
        wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ConfigError(f"{key} must be {wanted}, got {shown(value)}")
    if value > _LARGEST[key]:
        raise ConfigError(f"{key} must be at most {_LARGEST[key]}, got {shown(value)}")


def check_token(key: str, token: object, vocab_size: int) -> None:
    """Raise ConfigError unless `token`, the setting `key`, is a token id of the vocabulary."""
    if not is_int(token) or not 0 <= token < vocab_size:
        raise ConfigError(
            f"{key} must be a token id from 0 to vocab_size - 1 = {vocab_size - 1}, got {shown(token)}"
        )
