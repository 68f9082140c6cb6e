"""Final hidden states against float64, beside Hugging Face's own bfloat16 forward of the same weights."""

from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from orthrus.cache.kv_cache import KVCache
from orthrus.measure.hugging_face import hugging_face_model
from orthrus.measure.random_model import random_weights, shape_config
from orthrus.models.forward import LayerParallelForward
from orthrus.plan import PassPlan, RowGroup, View
from orthrus.runner.cuda_graphs import CudaGraphRunner

DEVICE = torch.device("cuda")
MODEL = replace(shape_config("8B", diffusion=False), num_hidden_layers=6, vocab_size=8192)
LENGTH, PAGE = 320, 64


def test_hidden_states_are_as_near_float64_as_hugging_faces() -> None:
    tokens = torch.randint(MODEL.vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(0)).tolist()
    # Not the first row's logits: the runner keeps hidden states only where it runs layers and head apart.
    group = RowGroup(View.AR, tokens, 0, list(range(1, 6)), 1, LENGTH)

    def cache(dtype: torch.dtype) -> KVCache:
        return KVCache.allocate(MODEL, 6, PAGE, DEVICE, dtype)

    weights = random_weights(MODEL, DEVICE, torch.bfloat16)
    exact_forward = LayerParallelForward(MODEL, {name: w.double() for name, w in weights.items()})
    exact_forward.use_context(LENGTH)
    plan = PassPlan.build([group], page_size=PAGE, heads_per_kv=4, device=DEVICE)
    none = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    exact = exact_forward.hidden_states(plan, cache(torch.float64), none)[1:LENGTH]
    del exact_forward

    def error(hidden: torch.Tensor) -> float:
        return ((hidden.double() - exact).norm() / exact.norm()).item()

    with torch.inference_mode():
        theirs = hugging_face_model(MODEL, DEVICE, torch.bfloat16).model(
            torch.tensor([tokens], device=DEVICE)
        )
    limit = error(theirs.last_hidden_state[0, 1:])
    forward = LayerParallelForward(MODEL, weights)
    forward.use_context(LENGTH)
    runner = CudaGraphRunner(forward, cache(torch.bfloat16), max_rows=LENGTH, max_logits=LENGTH, max_pages=64)
    runner.logits([group])
    ours = error(runner.graphs.tensors.hidden[: LENGTH - 1])
    print(f"relative error of final hidden states: ours {ours:.5f}, Hugging Face's {limit:.5f}")
    assert ours <= limit
