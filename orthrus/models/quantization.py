"""`Quantization`: how a checkpoint stores the weights of its linear layers in few bits.

This file reads config.json's `quantization_config`, for the formats that Qwen publishes: fine-grained FP8, GPTQ and AWQ. The
weight formats of the same names (kernels/linear) say what the numbers mean. Embedding, norms, biases and LM head are stored in
full, and so are the projections of the diffusion view.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orthrus.errors import ConfigError
from orthrus.files import is_int, shown
from orthrus.kernels.lossless_sizes import ENTRIES, LOSSLESS_BYTES, TILE_INS, TILE_OUTS, can_pack

LOSSLESS = "lossless12"
"""The method that keeps every bit: bfloat16 weights in 12 bits."""
FP8_BLOCK = 128
"""Outputs and inputs of the block of an FP8 weight that shares a scale."""
IN_FULL = ("F64", "F32", "F16", "BF16")
"""The dtypes of tensors that are not quantised, by their names in a safetensors header."""
_WORD = 32
"""Bits of the integers that GPTQ and AWQ pack numbers into."""
_SCALES = ("F16", "BF16", "F32")
_SUPPORTED = (
    "use a checkpoint in fp8 (e4m3, weight_block_size [128, 128]), gptq (4 or 8 bits), awq (4 bits, version gemm), lossless12 "
    "(version 1), or one that is not quantised"
)


@dataclass(frozen=True)
class StoredPart:
    """A tensor of a checkpoint: one that is stored in full, or one of those that a quantised weight is stored as."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = IN_FULL
    """Those that it may have, by their names in a safetensors header."""

    @property
    def in_full(self) -> bool:
        """Whether it is stored in full: it is not one of the tensors of a quantised weight."""
        return self.dtypes == IN_FULL


@dataclass(frozen=True)
class Quantization:
    """How the weights of linear layers are stored."""

    method: str
    """"fp8", "gptq", "awq" or "lossless12"."""
    bits: int
    """Bits of a number."""
    group_size: int
    """Inputs that share a scale. -1: all inputs of a weight."""
    in_full: tuple[str, ...] = ()
    """Names of modules, or the ends of such names, whose weights are not quantised."""
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)
    """config.json's `quantization_config` as it was read, to be written again."""

    @property
    def lossless(self) -> bool:
        """Whether the format keeps every bit of bfloat16 weights. It then covers the weights of both views."""
        return self.method == LOSSLESS

    def covers(self, name: str) -> bool:
        """Whether the tensor `name`, as it is called in an unquantised checkpoint, is a weight that is stored quantised."""
        if not name.endswith(".weight"):
            return False
        module = name.removesuffix(".weight")
        if "_proj" not in module or (module.endswith("_diff") and not self.lossless):
            return False
        return not any(f".{part}." in f".{module}." for part in self.in_full)

    def parts(self, name: str, shape: tuple[int, ...]) -> dict[str, StoredPart]:
        """The tensors that the weight `name`, of `shape` [outs, ins], is stored as, by their names.

        Raises ConfigError if the weight can't be cut into groups, or packed into whole integers.
        """
        outs, ins = shape
        start = name.removesuffix("weight")
        if self.method == "fp8":
            blocks = -(-outs // FP8_BLOCK), -(-ins // FP8_BLOCK)
            return {
                name: StoredPart(shape, ("F8_E4M3",)),
                f"{start}weight_scale_inv": StoredPart(blocks, _SCALES),
            }
        if self.lossless:
            if not can_pack(outs, ins):
                raise ConfigError(
                    f"tensor {name}: expected outputs that {TILE_OUTS} divides and inputs that {TILE_INS} divides, found "
                    f"{outs} and {ins}: {_SUPPORTED}"
                )
            return {
                f"{start}weight_high": StoredPart((outs, ins // 4), ("I32",)),
                f"{start}weight_low": StoredPart((outs, ins // 8), ("I32",)),
                f"{start}weight_exceptions": StoredPart(
                    (outs // TILE_OUTS, ins // TILE_INS, ENTRIES), ("I32",)
                ),
                f"{start}weight_scales": StoredPart((outs,), ("F32",)),
            }
        group = ins if self.group_size == -1 else self.group_size
        packed = _WORD // self.bits
        if ins % group:
            raise ConfigError(
                f"tensor {name}: expected inputs that group_size {group} divides, found {ins}: {_SUPPORTED}"
            )
        if outs % packed or ins % packed:
            raise ConfigError(
                f"tensor {name}: expected outputs and inputs that {packed} divides, since an int32 holds {packed} numbers; "
                f"found {outs} and {ins}: {_SUPPORTED}"
            )
        groups = ins // group
        numbers = (ins, outs // packed) if self.method == "awq" else (ins // packed, outs)
        found = {
            "qweight": StoredPart(numbers, ("I32",)),
            "qzeros": StoredPart((groups, outs // packed), ("I32",)),
            "scales": StoredPart((groups, outs), _SCALES),
        }
        if self.method == "gptq":
            found["g_idx"] = StoredPart((ins,), ("I32",))
        return {start + part: stored for part, stored in found.items()}

    @property
    def number_bytes(self) -> float:
        """Bytes of a number in a GPU's memory, its share of scales and zero points included."""
        if self.lossless:
            return LOSSLESS_BYTES
        if self.method == "fp8":
            return 1 + 4 / FP8_BLOCK  # A float32 scale for each output of a block.
        # A float32 scale and a zero point of one byte.
        return self.bits / 8 + (0 if self.group_size == -1 else 5 / self.group_size)


def read_quantization(data: Mapping[str, Any]) -> Quantization | None:
    """What the contents of a config.json say in `quantization_config`; None for a checkpoint that is not quantised.

    Raises ConfigError naming the setting that is not supported, and what is.
    """
    settings = data.get("quantization_config")
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        raise ConfigError(f"quantization_config must be an object, got {shown(settings)}")
    method = settings.get("quant_method")
    read = _READERS.get(method) if isinstance(method, str) else None
    if read is None:
        raise _unsupported(settings, "quant_method")
    bits, group = read(settings)
    skipped = settings.get("modules_to_not_convert")
    names = [] if skipped is None else skipped
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(
            f"modules_to_not_convert of quantization_config must be a list of names, got {shown(skipped)}"
        )
    return Quantization(str(method), bits, group, tuple(names), dict(settings))


def _fp8(settings: Mapping[str, Any]) -> tuple[int, int]:
    _expect(settings, "weight_block_size", ([FP8_BLOCK, FP8_BLOCK],))
    _expect(settings, "fmt", (None, "e4m3"))
    _expect(settings, "activation_scheme", (None, "dynamic"))
    _expect(settings, "scale_fmt", (None, "float", "float32"))
    return 8, FP8_BLOCK


def _gptq(settings: Mapping[str, Any]) -> tuple[int, int]:
    _expect(settings, "bits", (4, 8))
    _expect(settings, "checkpoint_format", (None, "gptq"))
    _expect(settings, "lm_head", (None, False))
    _expect(settings, "dynamic", (None, {}))
    return settings["bits"], _group_size(settings, "group_size")


def _awq(settings: Mapping[str, Any]) -> tuple[int, int]:
    # AutoAWQ's own files call them w_bit and q_group_size.
    bits, group = (
        new if new in settings else old for new, old in (("bits", "w_bit"), ("group_size", "q_group_size"))
    )
    _expect(settings, bits, (4,))
    _expect(settings, "version", (None, "gemm", "GEMM"))
    _expect(settings, "zero_point", (None, True))
    return 4, _group_size(settings, group)


def _lossless(settings: Mapping[str, Any]) -> tuple[int, int]:
    _expect(settings, "version", (1,))
    return 12, -1


_READERS = {"fp8": _fp8, "gptq": _gptq, "awq": _awq, LOSSLESS: _lossless}


def _group_size(settings: Mapping[str, Any], key: str) -> int:
    size = settings.get(key)
    if not is_int(size) or (size != -1 and not 8 <= size <= 1 << 20):
        raise _unsupported(settings, key)
    return size


def _expect(settings: Mapping[str, Any], key: str, allowed: tuple[object, ...]) -> None:
    value = settings.get(key)
    if not any(type(value) is type(one) and value == one for one in allowed):
        raise _unsupported(settings, key)


def _unsupported(settings: Mapping[str, Any], key: str) -> ConfigError:
    return ConfigError(
        f"quantization_config with {key} {shown(settings.get(key))} is not supported: {_SUPPORTED}"
    )
