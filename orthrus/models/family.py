"""`Family`: what is specific to the models of one architecture.

A new architecture is a subclass of `Family` in a file of its own and an entry in `orthrus.models.families`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from orthrus.errors import ConfigError
from orthrus.files import one_line, shown
from orthrus.models.config import SIZES, ModelConfig, check_sizes, check_token
from orthrus.models.quantization import StoredPart, read_quantization
from orthrus.models.rope import check_rope, check_rope_numbers, check_rope_type, standard_rope, yarn_context
from orthrus.models.shard import Axis, Division

if TYPE_CHECKING:
    # Only for annotations. Reading a configuration must not import torch, which takes seconds.
    from torch import Tensor

    from orthrus.models.factors import Factors
    from orthrus.models.layer import DecoderLayer, LayerSplit

_OPTIONAL = (
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
)


_DIVIDED_OUTPUTS: dict[str, Axis] = {"q": "queries", "k": "keys", "v": "keys", "gate": "inner", "up": "inner"}
_DIVIDED_INPUTS: dict[str, Axis] = {"o": "queries", "down": "inner"}


@dataclass(frozen=True)
class HuggingFaceClasses:
    """A family's own classes in transformers."""

    config: Any
    # The causal language model.
    model: Any
    # The module that makes the rotary frequencies from a config.
    rotary: Any


class Family(ABC):
    """A decoder with the layout of Llama, as most open models have it. A family overrides what differs.

    A layer is an RMS norm, attention with rotary embeddings, a second RMS norm, and a gated MLP with SiLU. Where a checkpoint
    has a diffusion view, every attention weight exists a second time under a name with `_diff`.
    """

    model_types: ClassVar[tuple[str, ...]]
    """The `model_type`s of config.json that belong to this family. The first is the one that we write."""
    architecture: ClassVar[str]
    """The name of Hugging Face's class for a plain checkpoint."""
    diffusion_architecture: ClassVar[str] = "OrthrusLM"
    """The name of the class in config.json for a checkpoint that has a diffusion view."""
    diffusion_model_type: ClassVar[str | None] = None
    """The one of `model_types` for checkpoints with a diffusion view, if there is one."""
    embedding: ClassVar[str] = "model.embed_tokens.weight"
    """Name of the tensor of the token embeddings."""
    layer_prefix: ClassVar[str] = "model.layers"
    """What the names of a layer's tensors begin with, before the layer's index."""
    first_norm: ClassVar[str] = "input_layernorm.weight"
    """Name, within its layer, of the norm before attention."""
    last_norm: ClassVar[str] = "model.norm.weight"
    """Name of the norm after the last layer."""
    head: ClassVar[str] = "lm_head.weight"
    """Name of the LM head. Missing in a checkpoint whose head is tied to the embedding."""
    defaults: ClassVar[Mapping[str, Any]]
    """The values of Hugging Face's class for optional settings that config.json leaves out. If `head_dim` is missing here, it is
    hidden_size / num_attention_heads."""
    qk_norm: ClassVar[bool]
    """Whether each head's queries and keys are RMS-normed before they are rotated."""

    @abstractmethod
    def hugging_face(self) -> HuggingFaceClasses:
        """The classes in transformers. Importing them takes seconds."""

    def check_supported(self, data: Mapping[str, Any]) -> None:
        """Refuse a config.json whose model would load but compute something else. Raises ConfigError naming the setting."""
        layer_types = _list_of(data, "layer_types")
        other = sorted({shown(t).strip("'") for t in layer_types if t != "full_attention"})
        if other:
            raise ConfigError(f"layer_types {', '.join(other[:3])} is not supported: only full_attention is")
        activation = data.get("hidden_act", "silu")
        if activation != "silu":
            raise ConfigError(f"hidden_act {shown(activation)} is not supported: only silu is")
        # transformers reports missing settings of an unsupported type before it says that it is unsupported.
        for key in ("rope_scaling", "rope_parameters"):
            rope = {} if data.get(key) is None else data[key]
            if not isinstance(rope, Mapping):
                raise ConfigError(f"{key} must be an object with rope_type and rope_theta, got {shown(rope)}")
            check_rope_type(rope.get("rope_type", rope.get("type", "default")))
            check_rope_numbers(rope)
        has_diffusion = self.diffusion_architecture in _list_of(data, "architectures") or (
            self.diffusion_model_type is not None and data.get("model_type") == self.diffusion_model_type
        )
        if has_diffusion and data.get("block_size") is None:
            raise ConfigError(
                "block_size is missing from an Orthrus checkpoint: add the block_size and mask_token_id that it was "
                "trained with (the published models: 32 and 151669)"
            )

    def read_config(self, data: Mapping[str, Any], name: str = "") -> ModelConfig:
        """The config that the contents of a config.json describe, in the style of transformers 4 or 5.

        Raises ConfigError naming the setting that is missing, wrong or not supported.
        """
        self.check_supported(data)
        missing = [key for key in SIZES if data.get(key) is None]
        if missing:
            raise ConfigError(f"{', '.join(missing)} missing: add what the weights were made with")
        # A null is the same as leaving a key out.
        present = {key: data[key] for key in (*SIZES, *_OPTIONAL) if data.get(key) is not None}
        check_sizes(present)
        fields = {"head_dim": present["hidden_size"] // present["num_attention_heads"]}
        fields |= {**self.defaults, **present}
        rope = standard_rope(fields)
        check_rope(rope)
        dtype = next((data[key] for key in ("dtype", "torch_dtype") if data.get(key) is not None), "float32")
        block_size = data.get("block_size")
        plain = (*SIZES, "head_dim", "rms_norm_eps", "tie_word_embeddings", "attention_bias")
        config = ModelConfig(
            **{key: fields[key] for key in plain},
            max_position_embeddings=max(fields["max_position_embeddings"], yarn_context(rope)),
            rope_parameters=rope,
            eos_token_ids=token_ids(data.get("eos_token_id"), present["vocab_size"]),
            bos_token_id=data.get("bos_token_id"),
            pad_token_id=data.get("pad_token_id"),
            block_size=block_size,
            # Tokenizers of plain models may name a mask token too; without a block it means nothing here.
            mask_token_id=data.get("mask_token_id") if block_size is not None else None,
            dtype=dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype,
            model_type=self.model_types[0],
            quantization=read_quantization(data),
            name=name,
        )
        if config.quantization is not None:
            self.stored_parts(config)  # Raises if a weight can't be stored in this format.
        return config

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """The contents of a config.json, which transformers reads as the plain model (the AR view)."""
        eos = list(config.eos_token_ids)
        data: dict[str, Any] = {
            "architectures": [self.diffusion_architecture if config.has_diffusion else self.architecture],
            "attention_bias": config.attention_bias,
            "attention_dropout": 0.0,
            "bos_token_id": config.bos_token_id,
            "dtype": config.dtype,
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
            "head_dim": config.head_dim,
            "hidden_act": "silu",
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "max_position_embeddings": config.max_position_embeddings,
            "model_type": self.model_types[0],
            "num_attention_heads": config.num_attention_heads,
            "num_hidden_layers": config.num_hidden_layers,
            "num_key_value_heads": config.num_key_value_heads,
            "pad_token_id": config.pad_token_id,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_parameters": dict(config.rope_parameters),
            "tie_word_embeddings": config.tie_word_embeddings,
            "vocab_size": config.vocab_size,
        }
        if config.has_diffusion:
            data |= {"block_size": config.block_size, "mask_token_id": config.mask_token_id}
        if config.quantization is not None:
            data["quantization_config"] = dict(config.quantization.settings)
        return data

    def tensor_shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of a checkpoint, in the order in which the layers use them."""
        return {name: part.shape for name, part in self.stored_parts(config).items()}

    def stored_parts(self, config: ModelConfig) -> dict[str, StoredPart]:
        """Name, shape and possible dtypes of every tensor of a checkpoint. A quantised weight is stored as several tensors.

        Raises ConfigError if a weight can't be stored in the checkpoint's format.
        """
        how = config.quantization
        parts: dict[str, StoredPart] = {}
        for name, shape in self.dense_shapes(config).items():
            if how is not None and how.covers(name):
                parts |= how.parts(name, shape)
            else:
                parts[name] = StoredPart(shape)
        return parts

    def dense_shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the model as `tensor_shapes` gives them, if no weight is quantised."""
        hidden = config.hidden_size
        shapes: dict[str, tuple[int, ...]] = {self.embedding: (config.vocab_size, hidden)}
        layer = self.layer_shapes(config)
        for index in range(config.num_hidden_layers):
            shapes |= {f"{self.layer_prefix}.{index}.{name}": shape for name, shape in layer.items()}
        shapes[self.last_norm] = (hidden,)
        if not config.tie_word_embeddings:
            shapes[self.head] = (config.vocab_size, hidden)
        return shapes

    def layer_shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Name, within its layer, and shape of every tensor of one layer."""
        hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
        queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
        projections = {
            "q": (queries, hidden),
            "k": (keys, hidden),
            "v": (keys, hidden),
            "o": (hidden, queries),
        }
        shapes: dict[str, tuple[int, ...]] = {self.first_norm: (hidden,)}
        for view in config.view_suffixes:
            for name, shape in projections.items():
                shapes[f"self_attn.{name}_proj{view}.weight"] = shape
                if config.attention_bias:
                    shapes[f"self_attn.{name}_proj{view}.bias"] = shape[:1]
            if self.qk_norm:
                shapes |= {f"self_attn.{name}_norm{view}.weight": (dim,) for name in "qk"}
        return shapes | {
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }

    def division(self, name: str) -> Division | None:
        """How the tensor `name` is divided among ranks. None: every rank has all of it."""
        if name == self.head:
            return Division("vocabulary", 0)
        _, _, own = name.partition("self_attn.")
        kind = own.partition("_proj")[0] if own else name.partition("mlp.")[2].partition("_proj")[0]
        matrix = name.endswith(".weight")
        if kind in _DIVIDED_OUTPUTS:
            return Division(_DIVIDED_OUTPUTS[kind], 0)
        # If a layer's inputs are divided, every rank has its whole bias: it is added to the whole sum.
        return Division(_DIVIDED_INPUTS[kind], 1) if kind in _DIVIDED_INPUTS and matrix else None

    def layer(
        self,
        config: ModelConfig,
        tensors: MutableMapping[str, "Tensor"],
        index: int,
        weight_format: str,
        views: Sequence[str],
        split: "LayerSplit",
        shared: "DecoderLayer | None" = None,
    ) -> "DecoderLayer":
        """Layer `index`, packed for the kernels. Its tensors, and the norm behind it, are taken out of `tensors`.

        weight_format: a name that `pack_weight` (kernels/linear) knows. views: the suffixes of the views whose projections it
        has: all of `ModelConfig.view_suffixes`, or one. split: which part of the layer `tensors` hold; `config` is that of this
        part. shared: the same layer for the other view; what belongs to no single view is then shared with it.
        """
        from orthrus.models.layer import DecoderLayer

        prefix = f"{self.layer_prefix}.{index}"
        return DecoderLayer.pack(
            config,
            tensors,
            prefix,
            weight_format,
            views,
            split,
            shared,
            qk_norm=self.qk_norm,
            after_norm=self.norm_behind(config, index),
        )

    def factors(
        self, config: ModelConfig, tensors: Mapping[str, "Tensor"], index: int, norm: "Tensor"
    ) -> "Factors":
        """The factors for drafts in FP8 of layer `index`, to which its `with_factors` is applied.

        tensors: the layer's, by their names. norm: the weight of the norm before the layer.
        """
        from orthrus.models.factors import Factors

        return Factors.of(tensors, f"{self.layer_prefix}.{index}", norm, config.view_suffixes)

    def norm_before(self, index: int) -> str:
        """Name of the norm before the attention of layer `index`."""
        return f"{self.layer_prefix}.{index}.{self.first_norm}"

    def norm_behind(self, config: ModelConfig, index: int) -> str:
        """Name of the norm behind layer `index`."""
        last = index + 1 == config.num_hidden_layers
        return self.last_norm if last else self.norm_before(index + 1)

    def rotary(self, config: ModelConfig) -> tuple["Tensor", float]:
        """Rotary frequencies, float32 [head_dim / 2] on the CPU, and the factor on cos and sin.

        transformers' own code makes them. Raises ConfigError for rotary settings that give no frequencies.
        """
        import torch

        classes = self.hugging_face()
        known = {k: v for k, v in self.write_config(config).items() if k in (*SIZES, *_OPTIONAL)}
        try:
            with torch.device("cpu"):
                rotary = classes.rotary(classes.config(**known))
            frequencies, scaling = rotary.inv_freq.float(), float(rotary.attention_scaling)
        except (ValueError, ArithmeticError) as error:
            raise ConfigError(f"rope_parameters give no rotary embedding: {one_line(error)}") from error
        if not frequencies.isfinite().all():
            raise ConfigError(
                f"rope_parameters {shown(dict(config.rope_parameters))} give frequencies that are not finite numbers"
            )
        return frequencies, scaling


def token_ids(value: object, vocab_size: int) -> tuple[int, ...]:
    """The token ids in an `eos_token_id`: one, several, or none for null and an empty list. Raises ConfigError."""
    ids = () if value is None else value if isinstance(value, list) else (value,)
    for token in ids:
        check_token("eos_token_id", token, vocab_size)
    return tuple(dict.fromkeys(ids))


def _list_of(data: Mapping[str, Any], key: str) -> list[Any]:
    value = data.get(key)
    if value is not None and not isinstance(value, list):
        raise ConfigError(f"{key} must be a list, got {shown(value)}")
    return value or []
