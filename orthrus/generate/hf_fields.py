"""Which fields of a GenerationConfig `generate` honours, the values that each may have, and the errors for all others."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from orthrus.errors import RequestError
from orthrus.files import shown

_MOST = (1 << 63) - 1


def integer(value: Any, least: int = -_MOST, most: int = _MOST) -> int:
    """An integer of any library as a Python int. Raises ValueError for anything else, such as True, 2.0 and "2"."""
    try:
        number = None if _is_bool(value) else operator.index(value)
    except (TypeError, RuntimeError):
        number = None
    if number is None or not least <= number <= most:
        bounds = "an integer" if least < 0 else f"an integer of at least {least}"
        raise ValueError(f"must be {bounds}, got {shown(value)}")
    return number


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")


def _number(value: Any) -> float:
    """A finite number of any library as a Python float. Raises ValueError for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
        value = value.item()
    if not _is_bool(value) and not isinstance(value, str | bytes) and hasattr(value, "__float__"):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            number = float("nan")
        if abs(number) < float("inf"):
            return number
    raise ValueError(f"must be a finite number, got {shown(value)}")


def _flag(value: Any) -> bool:
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise ValueError(f"must be True or False, got {shown(value)}")


def _end_tokens(value: Any) -> list[int]:
    """Token ids as a list. Ids that the model doesn't have are allowed, as in Hugging Face, and end nothing."""
    values = value.tolist() if isinstance(value, Tensor) and not value.is_meta else value
    values = values if isinstance(values, list | tuple) else [values]
    if not values:
        raise ValueError("must be a token id or a list of them, got none: pass None for no end token")
    try:
        return [integer(token) for token in values]
    except ValueError:
        raise ValueError(f"must be a token id or a list of them, got {shown(value)}") from None


def _strings(value: Any) -> list[str]:
    strings = [value] if isinstance(value, str) else value
    if (
        isinstance(strings, list | tuple)
        and strings
        and all(isinstance(item, str) and item for item in strings)
    ):
        return list(strings)
    raise ValueError(f"must be a string or a list of strings, none of them empty, got {shown(value)}")


def _at_least(least: int) -> Callable[[Any], int]:
    return lambda value: integer(value, least)


# The fields that are honoured. Each function converts a value, or raises ValueError. None means unset, for every field.
KINDS: dict[str, Callable[[Any], Any]] = {
    "max_length": _at_least(1),
    "max_new_tokens": _at_least(1),
    "min_length": _at_least(0),
    "min_new_tokens": _at_least(0),
    "stop_strings": _strings,
    "do_sample": _flag,
    "temperature": _number,
    "top_k": _at_least(0),
    "top_p": _number,
    "min_p": _number,
    "repetition_penalty": _number,
    "num_return_sequences": _at_least(1),
    "return_dict_in_generate": _flag,
    "pad_token_id": _at_least(0),
    "bos_token_id": _at_least(0),
    "eos_token_id": _end_tokens,
}

# Fields that don't change the tokens of greedy or sampled decoding: how Hugging Face caches and compiles, and settings of
# modes (beams, assistants, encoders) that other arguments turn on.
_WITHOUT_EFFECT = {
    "use_cache",
    "cache_config",
    "max_cache_len",
    "prefill_chunk_size",
    "compile_config",
    "disable_compile",
    "low_memory",
    "continuous_batching_config",
    "renormalize_logits",
    "early_stopping",
    "length_penalty",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "target_lookbehind",
    "assistant_ensemble_weight",
    "max_matching_ngram_size",
    "decoder_start_token_id",
    "transformers_version",
}
_WITHOUT_EFFECT_WHEN_GREEDY = {"top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
# Fields that can't be honoured, each with the value that turns it off. None and False turn them off, too.
TURNED_OFF_BY: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "diversity_penalty": 0.0,
    "penalty_alpha": 0.0,
    "guidance_scale": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
_CACHES_WITHOUT_EFFECT = ("dynamic", "static", "hybrid", "offloaded", "offloaded_static")

ARGUMENT, GIVEN, MODEL = "", " of generation_config", " of the model's generation_config"
"""Where a field was set, in the words that error messages have after the field's name."""


def checked(name: str, value: Any, origin: str = ARGUMENT) -> Any:
    """The converted value of a field of `KINDS`. Raises RequestError that names the field and where it was set."""
    if value is None:
        return None
    try:
        return KINDS[name](value)
    except ValueError as error:
        raise RequestError(f"{name}{origin} {error}", name) from None


def check_fields(config: GenerationConfig, origin: str) -> None:
    """Convert the fields of a config in place. Raises RequestError."""
    for name in KINDS:
        setattr(config, name, checked(name, getattr(config, name, None), origin))


def has_effect(name: str, value: Any, sampling: bool) -> bool:
    """Whether a field that is not in `KINDS` may change the tokens."""
    if name == "cache_implementation":
        return not isinstance(value, str) or value not in _CACHES_WITHOUT_EFFECT
    return name not in _WITHOUT_EFFECT and (sampling or name not in _WITHOUT_EFFECT_WHEN_GREEDY)


def is_off(name: str, value: Any) -> bool:
    """Whether the value of a field that is not in `KINDS` turns it off."""
    # Only plain values: a tensor's comparison is a tensor.
    if isinstance(value, int | float):
        return value is False or value == TURNED_OFF_BY.get(name)
    return value is None


def unsupported(name: str, value: Any, origin: str = ARGUMENT, off: Any = None) -> RequestError:
    """The error for a field that the engine can't honour. off: the value that turns the field off."""
    held = f"={shown(value)}" if isinstance(value, bool | int | float | str) else ""
    if origin == MODEL:
        advice = f"pass {name}={off!r}, or set it to that in the model's generation_config"
    elif origin == GIVEN:
        advice = f"set it to {off!r}"
    else:
        advice = "leave it out"
    return RequestError(f"{name}{held}{origin} can't be honoured by accelerated generate: {advice}", name)


def check_prompts(input_ids: Any, name: str) -> Tensor:
    """The prompts, given as argument `name`, as int64 [batch, length]. Raises RequestError for any other value, or none."""
    what = f"{input_ids.dtype} {list(input_ids.shape)}" if isinstance(input_ids, Tensor) else shown(input_ids)
    if (
        not isinstance(input_ids, Tensor)
        or input_ids.ndim != 2
        or input_ids.dtype not in (torch.int64, torch.int32)
        or input_ids.layout != torch.strided
        or input_ids.is_meta
    ):
        message = f"{name} must be a tensor [batch, length] of torch.int64 or torch.int32, got {what}"
        raise RequestError(message, name)
    if input_ids.numel() == 0:
        raise RequestError(f"{name} is empty: shape {tuple(input_ids.shape)}", name)
    return input_ids.long()


def check_mask(mask: Any, input_ids: Tensor) -> Tensor:
    """An attention mask of the shape of `input_ids`, as bool [batch, length]. Raises RequestError for any other value."""
    if not isinstance(mask, Tensor) or mask.shape != input_ids.shape or mask.is_meta or mask.is_complex():
        what = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise RequestError(
            f"attention_mask must be a tensor of input_ids' shape {tuple(input_ids.shape)}, got {what}",
            "attention_mask",
        )
    shown_tokens = mask.to(input_ids.device) == 1
    if not (shown_tokens | (mask.to(input_ids.device) == 0)).all():
        message = (
            "attention_mask must hold 1 for the tokens to attend to and 0 for the others, and nothing else"
        )
        raise RequestError(message, "attention_mask")
    return shown_tokens
