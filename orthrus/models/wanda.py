"""Wanda's scores of weights (Sun et al., 2024, arXiv 2306.11695): |W| times the size of the input that it multiplies.

score(i, j) = |W(i, j)| * ||x_j||, where ||x_j|| is the 2-norm of input j over the rows of a calibration text. The layers are
pruned one after the other, as in the paper: each is calibrated on what the pruned layers before it give.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from orthrus.cache.kv_cache import KVCache
from orthrus.cache.kv_formats import DEFAULT_KV_FORMAT
from orthrus.kernels.linear import Weight
from orthrus.kernels.ranks import ONE_RANK
from orthrus.kernels.rounding import Rounding
from orthrus.models.config import ModelConfig
from orthrus.models.families import family_of
from orthrus.models.forward import LayerParallelForward
from orthrus.models.layer import DecoderLayer, LayerSplit
from orthrus.models.shard import Shard
from orthrus.models.stack import LayerStack
from orthrus.plan import PassPlan, RowGroup, View

_PAGE = 16
_INPUTS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv"),
    "o_proj": "out",
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up"),
    "down_proj": "down",
}
"""The field of `DecoderLayer` that has a projection's inputs."""


class _Recorded(Weight):
    """A weight that records the norms of its inputs."""

    def __init__(self, weight: Weight) -> None:
        self._weight = weight
        self.norms: Tensor | None = None
        """[in_features]: the 2-norm of each input over the rows of the last call."""

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes

    def linear(self, x: Tensor, num_ar: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        self.norms = x.norm(dim=0)
        return self._weight.linear(x, num_ar, out)


class _PruningLayer:
    """A layer that prunes its weights when it is called, and then runs with the pruned weights."""

    rounding: Rounding | None = None
    """Pruned layers take their inputs as they are."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: dict[str, Tensor],
        index: int,
        prune: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        """tensors: the model's. The pruned weights replace the original ones in it. prune: see `prune_by_inputs`."""
        self._config, self._tensors, self._index, self._prune = config, tensors, index, prune
        self._split = LayerSplit.of(Shard(config, 0, 1), ONE_RANK)

    def _pack(self) -> DecoderLayer:
        # A copy of the dictionary, because packing takes tensors out of it.
        family, views = family_of(self._config), self._config.view_suffixes
        return family.layer(self._config, dict(self._tensors), self._index, "plain", views, self._split)

    def __call__(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Run the layer. inputs: those of `DecoderLayer`."""
        layer = self._pack()
        recorded = {field: _Recorded(getattr(layer, field)) for field in set(_INPUTS.values())}
        recording = replace(
            layer,
            qkv=recorded["qkv"],
            out=recorded["out"],
            gate_up=recorded["gate_up"],
            down=recorded["down"],
        )
        recording(*inputs)
        prefix = f"{family_of(self._config).layer_prefix}.{self._index}."
        for name in [name for name in self._tensors if name.startswith(prefix)]:
            field = _INPUTS.get(name.split(".")[-2])
            if field is None or not name.endswith(".weight"):
                continue
            norms = recorded[field].norms
            assert norms is not None, "the layer has run"
            self._tensors[name] = self._prune(self._tensors[name], norms)
        return self._pack()(*inputs)


def prune_by_inputs(
    config: ModelConfig,
    tensors: dict[str, Tensor],
    rows: Sequence[Sequence[int]],
    prune: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Replace the projections of the AR view in `tensors`, a checkpoint's in one dtype on one device, by pruned ones.

    rows: token ids of a calibration text. prune(weight [outs, ins], norms [ins]): the pruned weight. norms: the 2-norms of the
    weight's inputs over all tokens of `rows`.
    """
    config = replace(config, block_size=None, mask_token_id=None)
    own = {name: tensors[name] for name in family_of(config).tensor_shapes(config)}
    forward = LayerParallelForward(config, dict(own))
    longest = max(map(len, rows))
    forward.use_context(longest)
    pages = -(-longest // _PAGE)
    groups = [
        RowGroup(View.AR, row, 0, list(range(1 + i * pages, 1 + (i + 1) * pages)), 0, 0)
        for i, row in enumerate(rows)
    ]
    cache = KVCache.allocate(
        config, 1 + pages * len(rows), _PAGE, forward.device, forward.dtype, DEFAULT_KV_FORMAT
    )
    plan = PassPlan.build(groups, page_size=_PAGE, heads_per_kv=forward.heads_per_kv, device=forward.device)
    layers = [_PruningLayer(config, own, index, prune) for index in range(config.num_hidden_layers)]
    stack = LayerStack(tuple(cast("list[DecoderLayer]", layers)), forward.exact.head)
    no_picks = torch.zeros(1, dtype=torch.int32, device=forward.device)
    forward.hidden_states(plan, cache, no_picks, stack)
    tensors |= own
