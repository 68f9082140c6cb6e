"""`LayerStack`: the layers and the LM head of one view or of both, in one weight format."""

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
        tensors: dict[str, Tensor],
        weight_format: str,
        draft_format: str,
        split: LayerSplit,
        tokens: slice,
    ) -> "tuple[LayerStack, LayerStack]":
        """A stack of the AR view, and one of the diffusion view in `draft_format`, which has copies of what the views share.

        If both formats can use the same memory, the stacks share it, and there are no copies. Copies are made layer by layer, so
        that the memory of what they replace is freed at once. The parameters are those of `pack`.
        """
        family = family_of(config)
        share = draft_format in (weight_format, ROUGH_FORMATS.get(weight_format))
        formats = (weight_format,) if share else (weight_format, draft_format)
        heads = _pack_heads(config, tensors, split, tokens, *formats)
        ar, diffusion = config.view_suffixes
        exact: list[DecoderLayer] = []
        drafts: list[DecoderLayer] = []
        for index in range(config.num_hidden_layers):
            # A dictionary for the drafts, because packing takes tensors out of it.
            own = dict(tensors) if share else _layer_in_full(config, tensors, index)
            exact.append(family.layer(config, tensors, index, weight_format, (ar,), split))
            shared = exact[-1].rough() if share else None
            drafts.append(family.layer(config, own, index, draft_format, (diffusion,), split, shared))
            for name in [name for name in tensors if name.startswith(f"{family.layer_prefix}.{index}.")]:
                del tensors[name]  # The diffusion view's, which are left.
        draft_head = heads[0].rough() if share else heads[-1]
        return LayerStack(tuple(exact), heads[0]), LayerStack(tuple(drafts), draft_head)


def _layer_in_full(config: ModelConfig, tensors: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """`tensors` with the quantised weights of layer `index` dequantised, to make copies of them."""
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
