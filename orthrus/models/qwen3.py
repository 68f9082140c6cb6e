"""Qwen3 (Yang et al., 2025), dense: the family that Orthrus was published for."""

from collections.abc import Mapping
from typing import Any, ClassVar

from orthrus.errors import ConfigError
from orthrus.models.config import ModelConfig
from orthrus.models.family import Family, HuggingFaceClasses


class Qwen3(Family):
    """Norms the queries and keys of each head before it rotates them."""

    model_types = ("qwen3", "orthrus")
    architecture = "Qwen3ForCausalLM"
    diffusion_model_type = "orthrus"
    defaults: ClassVar[Mapping[str, Any]] = {
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
    }
    qk_norm = True

    def hugging_face(self) -> HuggingFaceClasses:
        from transformers.models.qwen3.modeling_qwen3 import (
            Qwen3Config,
            Qwen3ForCausalLM,
            Qwen3RotaryEmbedding,
        )

        return HuggingFaceClasses(Qwen3Config, Qwen3ForCausalLM, Qwen3RotaryEmbedding)

    def check_supported(self, data: Mapping[str, Any]) -> None:
        if data.get("use_sliding_window") not in (None, False):
            raise ConfigError(
                "use_sliding_window is not supported: set it to false if the model was trained without it"
            )
        super().check_supported(data)

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        return super().write_config(config) | {"use_sliding_window": False}
