"""Final hidden states against float64, beside Hugging Face's own bfloat16 forward of the same weights, in full and in FP8."""

from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from torch import Tensor, nn

from orthrus.cache.kv_cache import KVCache
from orthrus.kernels.device import has_fp8_mma
from orthrus.kernels.linear.fp8_block import BLOCK, Fp8BlockFormat, quantise_blocks
from orthrus.measure.hugging_face import hugging_face_model
from orthrus.measure.random_model import random_weights, shape_config
from orthrus.models.config import ModelConfig
from orthrus.models.forward import LayerParallelForward
from orthrus.models.quantization import read_quantization
from orthrus.plan import PassPlan, RowGroup, View
from orthrus.runner.cuda_graphs import CudaGraphRunner
from orthrus.runner.protocol import RunnerLimits
from tests.quantised import FP8

DEVICE = torch.device("cuda")
MODEL = replace(shape_config("8B", diffusion=False), num_hidden_layers=6, vocab_size=8192)
LENGTH, PAGE = 320, 64


def prompt(seed: int) -> list[int]:
    return torch.randint(MODEL.vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(seed)).tolist()


def group(tokens: list[int]) -> RowGroup:
    # No logits of the first row: the runner keeps hidden states only if it runs the layers and the LM head separately.
    return RowGroup(View.AR, tokens, 0, list(range(1, 6)), 1, LENGTH)


def cache(dtype: torch.dtype) -> KVCache:
    return KVCache.allocate(MODEL, 6, PAGE, DEVICE, dtype)


def exact_states(model: ModelConfig, weights: dict[str, Tensor], prompts: list[list[int]]) -> Tensor:
    """Final hidden states [prompts, LENGTH - 1, hidden_size] in float64, the dtype of `weights`, which is emptied."""
    forward = LayerParallelForward(model, weights)
    forward.use_context(LENGTH)
    none, memory = torch.zeros(1, dtype=torch.int32, device=DEVICE), cache(torch.float64)
    plans = [PassPlan.build([group(p)], page_size=PAGE, heads_per_kv=4, device=DEVICE) for p in prompts]
    return torch.stack([forward.hidden_states(plan, memory, none)[1:LENGTH] for plan in plans])


def our_states(model: ModelConfig, weights: dict[str, Tensor], prompts: list[list[int]]) -> Tensor:
    """The same in bfloat16 by our kernels. `weights` is emptied."""
    forward = LayerParallelForward(model, weights)
    forward.use_context(LENGTH)
    memory = cache(torch.bfloat16)
    runner = CudaGraphRunner(forward, memory, RunnerLimits(LENGTH, LENGTH, max_pages=64))
    states = []
    for tokens in prompts:
        runner.logits([group(tokens)])
        states.append(runner.graphs.tensors.hidden[: LENGTH - 1].clone())
    return torch.stack(states)


def their_states(theirs: nn.Module, prompts: list[list[int]]) -> Tensor:
    """The same in bfloat16 by transformers' model."""
    with torch.inference_mode():
        return theirs(torch.tensor(prompts, device=DEVICE)).last_hidden_state[:, 1:]


def error(states: Tensor, exact: Tensor) -> float:
    return ((states.double() - exact).norm() / exact.norm()).item()


def test_hidden_states_are_as_near_float64_as_hugging_faces() -> None:
    prompts, weights = [prompt(0)], dict(random_weights(MODEL, DEVICE, torch.bfloat16))
    exact = exact_states(MODEL, {name: weight.double() for name, weight in weights.items()}, prompts)
    limit = error(their_states(hugging_face_model(MODEL, DEVICE, torch.bfloat16).model, prompts), exact)
    ours = error(our_states(MODEL, weights, prompts), exact)
    print(f"relative error of final hidden states: ours {ours:.5f}, Hugging Face's {limit:.5f}")
    assert ours <= limit


class TheirFp8Linear(nn.Module):
    """The arithmetic of transformers' `FP8Linear` in plain torch: its kernels come from a hub that a test can't rely on.

    Each 128 inputs of a row are divided by their largest over 448, and rounded to e4m3. Their products with the weight's numbers
    are summed in float32, multiplied by both scales, and added to the float32 sum of the blocks before them. The tensor cores
    that transformers' kernels use drop bits of the products. Here the products are exact, so this is no less exact than
    transformers.
    """

    def __init__(self, numbers: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.numbers, self.scales = numbers.float(), scales.repeat_interleave(BLOCK, 0)

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.float().unflatten(-1, (-1, BLOCK))
        x_scales = (blocks.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-12)
        rounded = (blocks / x_scales).to(torch.float8_e4m3fn).float()
        total = torch.zeros(*x.shape[:-1], len(self.numbers), device=x.device)
        for index, block in enumerate(self.numbers.split(BLOCK, 1)):
            products = rounded[..., index, :] @ block.T
            total += products * x_scales[..., index, :] * self.scales[:, index]
        return total.to(x.dtype)


@pytest.mark.skipif(not has_fp8_mma(), reason="this GPU does not multiply FP8")
def test_fp8_hidden_states_are_as_near_float64_as_hugging_faces() -> None:
    """Against float64 arithmetic on the dequantised weights, with the inputs of layers rounded as in the format and unrounded."""
    model = replace(MODEL, quantization=read_quantization({"quantization_config": FP8}))
    prompts = [prompt(seed) for seed in range(32)]
    theirs = hugging_face_model(MODEL, DEVICE, torch.bfloat16)
    stored: dict[str, Tensor] = {}
    full: dict[str, Tensor] = {}
    for name, weight in random_weights(MODEL, DEVICE, torch.bfloat16).items():
        if not name.endswith("_proj.weight"):
            stored[name], full[name] = weight, weight.double()
            continue
        numbers, scales = quantise_blocks(weight)
        stored |= {name: numbers, f"{name}_scale_inv": scales}
        full[name] = Fp8BlockFormat.dequantise({"weight": numbers, "weight_scale_inv": scales.double()})
        theirs.set_submodule(name.removesuffix(".weight"), TheirFp8Linear(numbers, scales))
    # Scales in float64 are those of layers that compute in float64.
    wide = {name: w if w.dtype == torch.float8_e4m3fn else w.double() for name, w in stored.items()}
    exact = {
        "inputs in full": exact_states(MODEL, full, prompts),
        "inputs rounded": exact_states(model, wide, prompts),
    }
    limits = their_states(theirs.model, prompts)
    del theirs
    ours = our_states(model, stored, prompts)
    worse = []
    for name, states in exact.items():
        own, limit = error(ours, states), error(limits, states)
        better = sum(error(a, e) <= error(b, e) for a, b, e in zip(ours, limits, states, strict=True))
        print(
            f"relative error of final hidden states in FP8, {name}: ours {own:.5f}, Hugging Face's arithmetic {limit:.5f}; "
            f"ours is no larger for {better} of {len(prompts)} prompts"
        )
        worse += [name] * (own > limit)
    assert not worse
