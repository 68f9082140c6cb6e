"""`LayerStack`: what a model multiplies for the rows of some views, from the first layer to the LM head, in one weight format."""

from dataclasses import dataclass, replace

from torch import Tensor

from orthrus.kernels.linear import ROUGH_FORMATS, Weight, pack_weight
from orthrus.models.config import ModelConfig
from orthrus.models.dense import dequantised
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
        config: ModelConfig, tensors: dict[str, Tensor], weight_format: str, split: LayerSplit, tokens: slice
    ) -> "LayerStack":
        """One stack for both views. What it needs is taken out of `tensors`, a checkpoint's by their Hugging Face names.

        The embedding stays there. weight_format: a name that `pack_weight` (kernels/linear) knows. split: which part of the
        model the tensors hold; `config` is that of this part. tokens: those of this part's head.
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
        tensors: dict[str, Tensor],
        weight_format: str,
        draft_format: str,
        split: LayerSplit,
        tokens: slice,
    ) -> "tuple[LayerStack, LayerStack]":
        """A stack of the AR view, and one of the diffusion view in `draft_format`, which has copies of what the views share.

        If one memory serves both formats, the stacks share it instead. Else as `pack`. Copies are made layer by layer, so that
        what they replace is given back at once.
        """
        family = family_of(config)
        share = draft_format in (weight_format, ROUGH_FORMATS.get(weight_format))
        formats = (weight_format,) if share else (weight_format, draft_format)
        heads = _pack_heads(config, tensors, split, tokens, *formats)
        ar, diffusion = config.view_suffixes
        exact: list[DecoderLayer] = []
        drafts: list[DecoderLayer] = []
        for index in range(config.num_hidden_layers):
            # A dictionary of its own: packing takes tensors out of it.
            own = dict(tensors) if share else _layer_in_full(config, tensors, index)
            exact.append(family.layer(config, tensors, index, weight_format, (ar,), split))
            shared = exact[-1].rough() if share else None
            drafts.append(family.layer(config, own, index, draft_format, (diffusion,), split, shared))
            for name in [name for name in tensors if name.startswith(f"{family.layer_prefix}.{index}.")]:
                del tensors[name]  # Of the diffusion view.
        draft_head = heads[0].rough() if share else heads[-1]
        return LayerStack(tuple(exact), heads[0]), LayerStack(tuple(drafts), draft_head)


def _layer_in_full(config: ModelConfig, tensors: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """`tensors` with the quantised weights of layer `index` in full, for copies of them."""
    if config.quantization is None:
        return dict(tensors)
    family = family_of(config)
    prefix = f"{family.layer_prefix}.{index}."
    layer = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    others = {name: tensor for name, tensor in tensors.items() if name not in layer}
    return others | dequantised(layer, tensors[family.embedding].dtype)


def _pack_heads(
    config: ModelConfig, tensors: dict[str, Tensor], split: LayerSplit, tokens: slice, *formats: str
) -> list[Weight]:
    """The LM head in each of `formats`. It is tied to the embedding where the checkpoint has no other."""
    family = family_of(config)
    tied = tensors[family.embedding][tokens]
    weight = tensors.pop(family.head, tied)
    part = replace(split.outputs, first_output=tokens.start)
    return [pack_weight([[{"weight": weight}]], name, head=True, split=part) for name in formats]
