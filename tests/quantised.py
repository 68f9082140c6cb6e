"""Quantise tiny checkpoints in the published formats: FP8 by transformers' own code, GPTQ and AWQ as their formats are described.

Nothing here uses our own packing: numbers are packed one by one.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from tests.checkpoints import edit_json, make_checkpoint

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head"],
}
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "desc_act": False,
    "sym": True,
    "checkpoint_format": "gptq",
    "lm_head": False,
}
GPTQ8 = GPTQ | {"bits": 8}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
SETTINGS: dict[str, dict[str, Any]] = {
    "fp8": FP8,
    "gptq": GPTQ,
    "gptq8": GPTQ8,
    "act_order": GPTQ | {"desc_act": True},
    "awq": AWQ,
}


def make_quantised(path: Path, settings: dict[str, Any], **shape: Any) -> Path:
    """Write a random Qwen3 as `make_checkpoint` does, quantised, to `path`, and return it. Sizes fit every format."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "noise": 0.0}
    make_checkpoint(path, **(sizes | shape))
    return quantise(path, settings)


def quantise(path: Path, settings: dict[str, Any]) -> Path:
    """Quantise the checkpoint at `path` in place. The diffusion view and the head stay as they are."""
    file = path / "model.safetensors"
    found: dict[str, Tensor] = {}
    for name, tensor in load_file(file).items():
        if name.endswith("_proj.weight"):
            found |= quantised_weight(name, tensor.float(), settings)
        else:
            found[name] = tensor.clone()
    save_file(found, file, metadata={"format": "pt"})
    edit_json(path / "config.json", quantization_config=settings)
    return path


def copy_in_full(path: Path, to: Path, weights: dict[str, Tensor]) -> Path:
    """A copy of the checkpoint at `path` that is not quantised, with these weights."""
    shutil.copytree(path, to)
    save_file(
        {k: v.contiguous() for k, v in weights.items()}, to / "model.safetensors", metadata={"format": "pt"}
    )
    edit_json(to / "config.json", quantization_config=None)
    return to


def quantised_weight(name: str, weight: Tensor, settings: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that the weight [outs, ins] called `name` is stored as."""
    if settings["quant_method"] == "fp8":
        config = SimpleNamespace(weight_block_size=settings["weight_block_size"], scale_fmt="float")
        whole = [-side % 128 for side in weight.shape]
        padded = torch.nn.functional.pad(weight, (0, whole[1], 0, whole[0]))
        found = Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({name: padded})
        found[name] = found[name][: weight.shape[0], : weight.shape[1]].contiguous()
        return found
    start = name.removesuffix("weight")
    bits, size = settings["bits"], settings["group_size"]
    group_of = torch.arange(weight.shape[1]) // size
    if settings.get("desc_act"):
        group_of = group_of[torch.randperm(len(group_of), generator=torch.Generator().manual_seed(1))]
    numbers, zeros, scales = integers(weight, group_of, bits)
    if settings["quant_method"] == "awq":
        packed = {"qweight": pack_awq(numbers.T), "qzeros": pack_awq(zeros)}
    else:
        packed = {
            "qweight": pack_row_by_row(numbers.T, bits),
            "qzeros": pack_row_by_row(zeros.T - 1, bits).T.contiguous(),
            "g_idx": group_of.to(torch.int32),
        }
    return {start + part: tensor for part, tensor in (packed | {"scales": scales}).items()}


def integers(weight: Tensor, group_of: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers [outs, ins], zero points [groups, outs] (never 0, which GPTQ can't store) and float16 scales [groups, outs]."""
    top, numbers, zeros, scales = (1 << bits) - 1, torch.empty_like(weight), [], []
    for group in range(int(group_of.max()) + 1):
        part = weight[:, group_of == group]
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        scale = ((high - low) / top).half().float()
        zero = (-low / scale).round().clamp(1, top)
        numbers[:, group_of == group] = (part / scale + zero).round().clamp(0, top)
        zeros.append(zero.squeeze(1))
        scales.append(scale.squeeze(1).half())
    return numbers.to(torch.int64), torch.stack(zeros).to(torch.int64), torch.stack(scales)


def pack_row_by_row(numbers: Tensor, bits: int) -> Tensor:
    """[n, m] -> int32 [n * bits / 32, m]: as many rows as an int32 holds in one."""
    each = 32 // bits
    words = torch.zeros(numbers.shape[0] // each, numbers.shape[1], dtype=torch.int64)
    for row in range(numbers.shape[0]):
        words[row // each] |= numbers[row] << (bits * (row % each))
    return as_int32(words)


def pack_awq(numbers: Tensor) -> Tensor:
    """[n, outs] -> int32 [n, outs / 8], eight neighbours in one, in the order of AWQ's gemm version."""
    words = torch.zeros(numbers.shape[0], numbers.shape[1] // 8, dtype=torch.int64)
    for word in range(words.shape[1]):
        for place, column in enumerate(AWQ_ORDER):
            words[:, word] |= numbers[:, 8 * word + column] << (4 * place)
    return as_int32(words)


def as_int32(words: Tensor) -> Tensor:
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
