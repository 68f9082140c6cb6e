"""`LayerStack`: the layers and the LM head of one view or of both, in one weight format."""

from collections.abc import MutableMapping
from dataclasses import dataclass, replace

from torch import Tensor

from orthrus.kernels.linear import FIXED_FORMATS, OUTSIDE_MLP, ROUGH_FORMATS, Weight, pack_weight
from orthrus.models.config import ModelConfig
from orthrus.models.dense import dequantised
from orthrus.models.factors import norm_factor
from orthrus.models.families import family_of
from orthrus.models.layer import DecoderLayer, LayerSplit


@dataclass(frozen=True)
class LayerStack:
    """The layers and the head."""

    layers: tuple[DecoderLayer, ...]
    head: Weight
    """Final hidden states to logits."""

    @property
    def nbytes(self) -> int:
        """Bytes of the weights of all linear layers."""
        return self.head.nbytes + sum(layer.nbytes for layer in self.layers)

    @staticmethod
    def pack(
        config: ModelConfig,
        tensors: MutableMapping[str, Tensor],
        weight_format: str,
        split: LayerSplit,
        tokens: slice,
    ) -> "LayerStack":
        """One stack for both views. tensors: a checkpoint's, by their Hugging Face names.

        All but the embedding are taken out of `tensors`. weight_format: a name that `pack_weight` (kernels/linear) knows. split:
        which part of the model the tensors hold; `config` is that of this part. tokens: those of this part's LM head.
        """
        family = family_of(config)
        [head] = _pack_heads(config, tensors, split, tokens, weight_format)
        layers = [
            family.layer(config, tensors, index, weight_format, config.view_suffixes, split)
            for index in range(config.num_hidden_layers)
        ]
        return LayerStack(tuple(layers), head)

    @staticmethod
    def pack_apart(
        config: ModelConfig,
        tensors: MutableMapping[str, Tensor],
        weight_format: str,
        draft_format: str,
        split: LayerSplit,
        tokens: slice,
        first_norm: Tensor,
    ) -> "tuple[LayerStack, LayerStack]":
        """A stack of the AR view, and one of the diffusion view in `draft_format`, which has copies of what the views share.

        If both formats can use the same memory, the stacks share it, and there are no copies. Copies are made layer by layer, so
        that the memory of what they replace is freed at once. The parameters are those of `pack`. first_norm: the weight of the
        norm before the first layer.
        """
        family = family_of(config)
        share = draft_format in (weight_format, ROUGH_FORMATS.get(weight_format))
        formats = (weight_format,) if share else (weight_format, draft_format)
        heads = _pack_heads(config, tensors, split, tokens, *formats)
        ar, diffusion = config.view_suffixes

        def pack(index: int, norm: Tensor) -> tuple[DecoderLayer, DecoderLayer, Tensor]:
            """The layers of both stacks, and the norm behind them. norm: the one before them."""
            # A dictionary for the drafts, because packing takes tensors out of it.
            own = _layer(config, tensors, index)
            behind = own[family.norm_behind(config, index)]
            factors = family.factors(config, own, index, norm) if draft_format in FIXED_FORMATS else None
            if not share and config.quantization is not None:
                own = dequantised(own, tensors[family.embedding].dtype)
            exact = family.layer(config, tensors, index, weight_format, (ar,), split)
            shared = exact.rough() if share else None
            draft = family.layer(config, own, index, draft_format, (diffusion,), split, shared)
            for name in _names(config, tensors, index):
                del tensors[name]  # The diffusion view's, which are left.
            return exact, draft if factors is None else draft.with_factors(factors), behind

        exact: list[DecoderLayer] = []
        drafts: list[DecoderLayer] = []
        norm = first_norm
        for index in range(config.num_hidden_layers):
            exact_layer, draft_layer, norm = pack(index, norm)
            exact.append(exact_layer)
            drafts.append(draft_layer)
        draft_head = heads[0].rough() if share else heads[-1]
        draft_head = draft_head.with_factor(norm_factor(norm))
        return LayerStack(tuple(exact), heads[0]), LayerStack(tuple(drafts), draft_head)


def _layer(config: ModelConfig, tensors: MutableMapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """The tensors of layer `index`, and the norm behind it. They stay in `tensors` too."""
    behind = family_of(config).norm_behind(config, index)
    return {name: tensors[name] for name in (*_names(config, tensors, index), behind)}


def _names(config: ModelConfig, tensors: MutableMapping[str, Tensor], index: int) -> list[str]:
    """The names of the tensors of layer `index` that are left."""
    prefix = f"{family_of(config).layer_prefix}.{index}."
    return [name for name in tensors if name.startswith(prefix)]


def _pack_heads(
    config: ModelConfig, tensors: MutableMapping[str, Tensor], split: LayerSplit, tokens: slice, *formats: str
) -> list[Weight]:
    """The LM head in each of `formats`. It is tied to the embedding where the checkpoint has no other."""
    family = family_of(config)
    tied = tensors[family.embedding][tokens]
    weight = tensors.pop(family.head, tied)
    part = replace(split.outputs, first_output=tokens.start)
    names = [OUTSIDE_MLP.get(name, name) for name in formats]
    return [pack_weight([[{"weight": weight}]], name, head=True, split=part) for name in names]
