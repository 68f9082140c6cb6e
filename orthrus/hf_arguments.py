"""The arguments of Hugging Face's `generate` in the engine's terms, or an error naming the one that has none."""

import copy
import random
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StopStringCriteria

from orthrus.errors import RequestError
from orthrus.request import SEED_BITS, SamplingParams

# What `generate` does when neither the caller nor the model's generation config says (transformers 5).
DEFAULT_NEW_TOKENS = 20
DEFAULT_TOP_K = 50

# GenerationConfig fields that are translated below.
_HONOURED = {
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "stop_strings",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "num_return_sequences",
    "return_dict_in_generate",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
}
# Fields that don't change the tokens of greedy or sampled decoding, there or here: how Hugging Face caches
# and compiles, and settings of modes (beams, assistants, encoders) that other arguments turn on.
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
# Fields that are an error unless they hold the value, or None or False, that turns them off.
_TURNED_OFF_BY: dict[str, Any] = {
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
# What the engine calls arguments that have another name here.
_ENGINE_NAMES = {"prompt": "input_ids", "n": "num_return_sequences", "max_tokens": "max_new_tokens"}
_CACHES_WITHOUT_EFFECT = ("dynamic", "static", "hybrid", "offloaded", "offloaded_static")


@dataclass(frozen=True)
class GenerateCall:
    """One call of `generate`: a request per prompt, each completed `copies` (num_return_sequences) times.

    input_ids: int64 [batch, width], the prompts as given; the result begins with them. prompts: their token
    ids without the masked ones. params: theirs, each with its own seed. pad_token_id: fills rows that end
    early; None when no row can. stop_strings: decides after a token whether a row ends there, from all its
    ids so far, int64 [1, width + generated]; None without stop strings. return_dict: return_dict_in_generate.
    """

    input_ids: Tensor
    prompts: list[list[int]]
    params: list[SamplingParams]
    copies: int
    pad_token_id: int | None
    stop_strings: StopStringCriteria | None
    return_dict: bool


def read_arguments(
    *,
    model_defaults: GenerationConfig,
    context_limit: int,
    generation_config: GenerationConfig | None,
    inputs: Tensor | None,
    seed: int | None,
    tokenizer: Any,
    kwargs: dict[str, Any],
) -> GenerateCall:
    """Merge the arguments as Hugging Face does: keyword arguments, `generation_config`, the model's own, then defaults.

    context_limit: most tokens of prompt and completion. kwargs: everything that `generate` takes by keyword:
    prompts, mask and GenerationConfig fields. Raises RequestError naming the argument that is wrong or can't
    be honoured.
    """
    kwargs = dict(kwargs)
    input_ids, mask = kwargs.pop("input_ids", None), kwargs.pop("attention_mask", None)
    if inputs is not None and input_ids is not None:
        raise RequestError("pass the prompts as inputs or as input_ids, not as both", "inputs")
    config = _merge(model_defaults, generation_config, kwargs)
    input_ids = _check_input_ids(inputs if input_ids is None else input_ids, config)
    _refuse_unsupported(config)

    eos = _token_ids(config.eos_token_id, "eos_token_id")
    pad = _token_ids(config.pad_token_id, "pad_token_id") or eos
    shown = _shown(input_ids, mask, eos, pad)
    if not shown.all() and _has_repetition_penalty(config):
        # Hugging Face penalises the tokens in a hole of the mask although nothing attends to them.
        _refuse_holes(shown)
    prompts = [row[keep].tolist() for row, keep in zip(input_ids, shown, strict=True)]
    max_tokens = _max_tokens(config, input_ids.shape[1], context_limit)
    length_field = "max_length" if config.max_new_tokens is None else "max_new_tokens"
    longest = max(map(len, prompts))
    if longest + max_tokens > context_limit:
        raise RequestError(
            f"a prompt of {longest} tokens and {max_tokens} new ones exceed the context limit of "
            f"{context_limit}: lower {length_field}, or give accelerate more kv_cache_tokens or max_model_len",
            length_field,
        )
    if eos:
        _refuse_minimum(config, input_ids.shape[1])

    copies = config.num_return_sequences or 1
    stop_strings = _stop_strings(config, tokenizer)
    if stop_strings is not None and not eos and len(prompts) * copies > 1:
        # There, rows that hit a stop string run on until all have.
        message = "stop_strings with several sequences needs an eos_token_id: without one nothing is padded"
        raise RequestError(message, "stop_strings")
    seeds = _seeds(seed, len(prompts)) if config.do_sample else [0] * len(prompts)
    # The end tokens are the call's, not the checkpoint's.
    common: dict[str, Any] = {
        "n": copies,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stop_token_ids": tuple(eos),
    }
    common |= _sampling(config)
    try:
        params = [SamplingParams(**common, seed=prompt_seed) for prompt_seed in seeds]
    except RequestError as error:
        raise renamed(error) from None
    return GenerateCall(
        input_ids=input_ids,
        prompts=prompts,
        params=params,
        copies=copies,
        pad_token_id=pad[0] if pad else None,
        stop_strings=stop_strings,
        return_dict=bool(config.return_dict_in_generate),
    )


def _merge(
    model_defaults: GenerationConfig, given: GenerationConfig | None, kwargs: dict[str, Any]
) -> GenerationConfig:
    """The call's GenerationConfig; fields that nobody set are None, top_k excepted."""
    if given is not None and not isinstance(given, GenerationConfig):
        raise RequestError(
            f"generation_config must be a GenerationConfig, got {type(given).__name__}", "generation_config"
        )
    config = GenerationConfig() if given is None else copy.deepcopy(given)
    try:
        config.update(**model_defaults.to_dict(), defaults_only=True, allow_custom_entries=True)
        # Before the keyword arguments: an explicit top_k=None turns it off.
        config.update(top_k=DEFAULT_TOP_K, defaults_only=True)
        unused = config.update(**kwargs)
    except ValueError as error:
        named = next((name for name in kwargs if f"`{name}`" in str(error)), None)
        raise RequestError(str(error), named) from error
    for name, value in unused.items():
        if value is not None:
            raise unsupported(name, value)
    return config


def renamed(error: RequestError) -> RequestError:
    """The engine's error with the argument called by its Hugging Face name."""
    if error.param not in _ENGINE_NAMES:
        return error
    name = _ENGINE_NAMES[error.param]
    return RequestError(f"{name}: {error.message}", name)


def unsupported(name: str, value: Any) -> RequestError:
    """The error for an argument that the engine has no counterpart of."""
    shown = f"={value!r}" if isinstance(value, bool | int | float | str) else ""
    return RequestError(f"{name}{shown} can't be honoured by accelerated generate: leave it out", name)


def _check_input_ids(input_ids: Any, config: GenerationConfig) -> Tensor:
    if input_ids is None:
        if config.bos_token_id is None:
            message = "pass the prompts as input_ids: the model has no bos_token_id to begin with"
            raise RequestError(message, "input_ids")
        input_ids = torch.tensor([[int(config.bos_token_id)]])
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        what = type(input_ids).__name__
        if isinstance(input_ids, Tensor):
            what = f"{input_ids.dtype} {list(input_ids.shape)}"
        raise RequestError(f"input_ids must be an integer tensor [batch, length], got {what}", "input_ids")
    if input_ids.numel() == 0:
        raise RequestError(f"input_ids is empty: shape {tuple(input_ids.shape)}", "input_ids")
    return input_ids.long()


def _refuse_unsupported(config: GenerationConfig) -> None:
    for name in vars(GenerationConfig()):
        if name.startswith("_") or name in _HONOURED or name in _WITHOUT_EFFECT:
            continue
        if name in _WITHOUT_EFFECT_WHEN_GREEDY and not config.do_sample:
            continue
        value = getattr(config, name)
        if value is None or value is False or value == _TURNED_OFF_BY.get(name):
            continue
        if name == "cache_implementation" and value in _CACHES_WITHOUT_EFFECT:
            continue
        raise unsupported(name, value)


def _token_ids(value: Any, name: str) -> list[int]:
    """Token ids of an int, list or tensor; negative ones, which name no token, are left out."""
    if value is None:
        return []
    values = value.flatten().tolist() if isinstance(value, Tensor) else value
    values = list(values) if isinstance(values, list | tuple) else [values]
    if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise RequestError(f"{name} must be a token id or a list of them, got {value!r}", name)
    return [v for v in values if v >= 0]


def _shown(input_ids: Tensor, mask: Any, eos: list[int], pad: list[int]) -> Tensor:
    """Which prompt tokens the model sees, bool like `input_ids`.

    Without a mask it is all of them, or all but the pads where a pad can't be an end token. Positions count
    the tokens that are shown: to leave out the others is all there is to a mask.
    """
    if mask is None:
        shown = torch.ones_like(input_ids, dtype=torch.bool)
        if pad and pad[0] not in eos:
            shown = input_ids != pad[0]
    else:
        if not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
            what = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise RequestError(
                f"attention_mask must be a tensor of input_ids' shape {tuple(input_ids.shape)}, got {what}",
                "attention_mask",
            )
        shown = mask.to(input_ids.device) != 0
    if not shown[:, -1].all():
        raise RequestError(
            "attention_mask hides the last token of a prompt: pad on the left (padding_side='left')",
            "attention_mask",
        )
    return shown


def _refuse_holes(shown: Tensor) -> None:
    if (shown[:, :-1] & ~shown[:, 1:]).any():
        raise RequestError(
            "attention_mask hides tokens inside a prompt, which can't be honoured with repetition_penalty",
            "attention_mask",
        )


def _has_repetition_penalty(config: GenerationConfig) -> bool:
    return config.repetition_penalty is not None and config.repetition_penalty != 1.0


def _max_tokens(config: GenerationConfig, width: int, context_limit: int) -> int:
    """Tokens to generate per row. Lengths count padding, as there."""
    if config.max_new_tokens is not None:
        return int(config.max_new_tokens)
    if config.max_length is None:
        warnings.warn(
            f"neither max_new_tokens nor max_length is set: generating up to {DEFAULT_NEW_TOKENS} tokens",
            stacklevel=4,
        )
        max_length = min(width + DEFAULT_NEW_TOKENS, context_limit)
    else:
        max_length = int(config.max_length)
    if width >= max_length:
        raise RequestError(
            f"the prompts have {width} tokens and max_length is {max_length}: raise it or set max_new_tokens",
            "max_length",
        )
    return max_length - width


def _refuse_minimum(config: GenerationConfig, width: int) -> None:
    if (config.min_length or 0) > width:
        raise unsupported("min_length", config.min_length)
    if (config.min_new_tokens or 0) > 0:
        raise unsupported("min_new_tokens", config.min_new_tokens)


def _stop_strings(config: GenerationConfig, tokenizer: Any) -> StopStringCriteria | None:
    if config.stop_strings is None:
        return None
    if tokenizer is None:
        raise RequestError("stop_strings needs the model's tokenizer: pass tokenizer=", "tokenizer")
    return StopStringCriteria(tokenizer, config.stop_strings)


def _sampling(config: GenerationConfig) -> dict[str, Any]:
    """The fields of SamplingParams that shape the distribution."""
    penalty = 1.0 if config.repetition_penalty is None else float(config.repetition_penalty)
    if not config.do_sample:
        return {"temperature": 0.0, "repetition_penalty": penalty}
    temperature = 1.0 if config.temperature is None else float(config.temperature)
    if temperature <= 0:
        message = f"temperature must be positive with do_sample=True, got {temperature}"
        raise RequestError(message, "temperature")
    return {
        "temperature": temperature,
        "top_k": int(config.top_k or 0),
        "top_p": 1.0 if config.top_p is None else float(config.top_p),
        "min_p": 0.0 if config.min_p is None else float(config.min_p),
        "repetition_penalty": penalty,
    }


def _seeds(seed: int | None, count: int) -> list[int]:
    """A seed per prompt: `seed` itself (None: one from torch's global generator), then what follows from it."""
    if seed is None:
        seed = int(torch.randint(0, (1 << SEED_BITS) - 1, (), dtype=torch.int64))
    others = random.Random(seed)
    return [seed, *(others.getrandbits(SEED_BITS) for _ in range(count - 1))]
