"""Translate the arguments of Hugging Face's `generate` for the engine. An argument that can't be honoured is an error."""

import copy
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StopStringCriteria

from orthrus.errors import RequestError
from orthrus.files import one_line
from orthrus.generate.hf_fields import (
    ARGUMENT,
    GIVEN,
    KINDS,
    MODEL,
    TURNED_OFF_BY,
    check_fields,
    check_mask,
    check_prompts,
    checked,
    has_effect,
    integer,
    is_off,
    unsupported,
)
from orthrus.requests.request import SEED_BITS, SamplingParams

# The defaults of `generate` in transformers 5.
DEFAULT_NEW_TOKENS = 20
DEFAULT_TOP_K = 50

# Hugging Face's name of each argument, by the engine's.
_ENGINE_NAMES = {"prompt": "input_ids", "n": "num_return_sequences", "max_tokens": "max_new_tokens"}


@dataclass(frozen=True)
class GenerateCall:
    """One call of `generate`: a request for each prompt."""

    # int64 [batch, width]: the prompts as given. The result begins with them.
    input_ids: Tensor
    # The token ids of each prompt without the masked ones.
    prompts: list[list[int]]
    # The sampling parameters of each prompt, each with its own seed.
    params: list[SamplingParams]
    # Sequences to return for each prompt (num_return_sequences).
    copies: int
    # Fills rows that end early. None if no row can end early.
    pad_token_id: int | None
    # Called with all ids of a row so far, int64 [1, width + generated]: whether the row ends there. None without stop strings.
    stop_strings: StopStringCriteria | None
    # Whether to return an output object instead of a tensor (return_dict_in_generate).
    return_dict: bool


def read_arguments(
    *,
    model_defaults: GenerationConfig,
    context_limit: int,
    vocab_size: int,
    generation_config: GenerationConfig | None,
    inputs: Tensor | None,
    seed: Any,
    schedule: str,
    tokenizer: Any,
    kwargs: dict[str, Any],
) -> GenerateCall:
    """Merge the arguments as Hugging Face does: keyword arguments, `generation_config`, the model's own, then defaults.

    context_limit: most tokens of prompt and completion. vocab_size: the model's. kwargs: everything that
    `generate` takes by keyword: prompts, mask and GenerationConfig fields. Raises RequestError naming the
    argument that is wrong or can't be honoured.
    """
    kwargs = dict(kwargs)
    input_ids, mask = kwargs.pop("input_ids", None), kwargs.pop("attention_mask", None)
    if inputs is not None and input_ids is not None:
        raise RequestError("pass the prompts as inputs or as input_ids, not as both", "inputs")
    seed = None if seed is None else _seed(seed)
    config, origin = _merge(model_defaults, generation_config, kwargs)
    input_ids = _given_prompts(inputs, input_ids, config, vocab_size)
    _refuse_unsupported(config, origin)
    eos, pad = _end_and_pad(config, origin, vocab_size)
    prompts = _visible_prompts(input_ids, mask, eos, pad, config)
    max_tokens = _max_tokens(config, input_ids.shape[1], context_limit)
    _check_context(prompts, max_tokens, context_limit, config)
    if eos:
        _refuse_minimum(config, input_ids.shape[1], origin)
    copies = config.num_return_sequences or 1
    stop_strings = _stop_strings(config, tokenizer)
    if stop_strings is not None and not eos and len(prompts) * copies > 1:
        # In Hugging Face, rows that hit a stop string run on until all have.
        message = "stop_strings with several sequences needs an eos_token_id: without one nothing is padded"
        raise RequestError(message, "stop_strings")
    seeds = _seeds(seed, len(prompts)) if config.do_sample else [0] * len(prompts)
    return GenerateCall(
        input_ids=input_ids,
        prompts=prompts,
        params=_params(config, copies, max_tokens, eos, seeds, schedule),
        copies=copies,
        pad_token_id=pad,
        stop_strings=stop_strings,
        return_dict=bool(config.return_dict_in_generate),
    )


def _given_prompts(inputs: Any, input_ids: Any, config: GenerationConfig, vocab_size: int) -> Tensor:
    """The prompts that the call gives by either name, int64 [batch, width]; without any, the first token of a text."""
    if input_ids is not None:
        return check_prompts(input_ids, "input_ids")
    if inputs is not None:
        return check_prompts(inputs, "inputs")
    return _first_token(config, vocab_size)


def _end_and_pad(
    config: GenerationConfig, origin: Callable[[str], str], vocab_size: int
) -> tuple[list[int], int | None]:
    """The end tokens that the model can pick, and the pad token: by default the first of them."""
    eos = [token for token in config.eos_token_id or () if 0 <= token < vocab_size]
    pad = config.pad_token_id
    if pad is None and eos:
        pad = eos[0]
    if pad is not None and pad >= vocab_size:
        message = f"pad_token_id{origin('pad_token_id')} must be a token id below {vocab_size}, got {pad}"
        raise RequestError(message, "pad_token_id")
    return eos, pad


def _visible_prompts(
    input_ids: Tensor, mask: Any, eos: list[int], pad: int | None, config: GenerationConfig
) -> list[list[int]]:
    """Each prompt's token ids without those that the model does not see."""
    shown = _shown(input_ids, mask, eos, pad)
    if not shown.all() and _has_repetition_penalty(config):
        # Hugging Face penalises the tokens in a hole of the mask although nothing attends to them.
        _refuse_holes(shown)
    return [row[keep].tolist() for row, keep in zip(input_ids, shown, strict=True)]


def _check_context(
    prompts: list[list[int]], max_tokens: int, context_limit: int, config: GenerationConfig
) -> None:
    """Raise RequestError if a prompt and its new tokens don't fit into the context."""
    longest = max(map(len, prompts))
    if longest + max_tokens > context_limit:
        length_field = "max_length" if config.max_new_tokens is None else "max_new_tokens"
        raise RequestError(
            f"a prompt of {longest} tokens and {max_tokens} new ones exceed the context limit of "
            f"{context_limit}: lower {length_field}, or give accelerate more kv_cache_tokens or max_model_len",
            length_field,
        )


def _params(
    config: GenerationConfig, copies: int, max_tokens: int, eos: list[int], seeds: list[int], schedule: str
) -> list[SamplingParams]:
    """The sampling parameters of each prompt, which differ in their seeds only."""
    common: dict[str, Any] = {
        "n": copies,
        "max_tokens": max_tokens,
        # The call's end tokens count, not the checkpoint's.
        "ignore_eos": True,
        "stop_token_ids": tuple(eos),
        "schedule": schedule,
    }
    common |= _sampling(config)
    try:
        return [SamplingParams(**common, seed=seed) for seed in seeds]
    except RequestError as error:
        raise renamed(error) from None


def _merge(
    model_defaults: GenerationConfig, given: GenerationConfig | None, kwargs: dict[str, Any]
) -> tuple[GenerationConfig, Callable[[str], str]]:
    """The call's GenerationConfig, and a function from a field to where it was set. Unset fields are None, except top_k."""
    if given is not None and not isinstance(given, GenerationConfig):
        raise RequestError(
            f"generation_config must be a GenerationConfig, got {type(given).__name__}", "generation_config"
        )
    arguments = {name: checked(name, value) if name in KINDS else value for name, value in kwargs.items()}
    settings = (arguments.get("do_sample"), given and given.do_sample, model_defaults.do_sample)
    sampling = next((value for value in settings if value is not None), False)
    for name in [name for name in arguments if name in vars(GenerationConfig()) and name not in KINDS]:
        # Checked before transformers does, whose errors may not name the field.
        if not has_effect(name, arguments[name], sampling):
            del arguments[name]
        elif not is_off(name, arguments[name]):
            raise unsupported(name, arguments[name])
    config = GenerationConfig() if given is None else copy.deepcopy(given)
    check_fields(config, GIVEN)
    own = {name for name, value in vars(config).items() if value is not None}
    defaults = copy.deepcopy(model_defaults)
    check_fields(defaults, MODEL)
    try:
        config.update(**defaults.to_dict(), defaults_only=True, allow_custom_entries=True)
        # Set before the keyword arguments, so that an explicit top_k=None turns it off.
        config.update(top_k=DEFAULT_TOP_K, defaults_only=True)
        unused = config.update(**arguments)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        named = next((name for name in kwargs if f"`{name}`" in str(error)), None)
        raise RequestError(one_line(error), named) from error
    for name, value in unused.items():
        if value is not None:
            raise unsupported(name, value)

    def origin(name: str) -> str:
        return ARGUMENT if name in kwargs else GIVEN if name in own else MODEL

    return config, origin


def renamed(error: RequestError) -> RequestError:
    """The engine's error, with the argument's name replaced by Hugging Face's."""
    if error.param not in _ENGINE_NAMES:
        return error
    name = _ENGINE_NAMES[error.param]
    return RequestError(f"{name}: {error.message}", name)


def _refuse_unsupported(config: GenerationConfig, origin: Callable[[str], str]) -> None:
    for name in vars(GenerationConfig()):
        if name.startswith("_") or name in KINDS:
            continue
        value = getattr(config, name)
        if has_effect(name, value, bool(config.do_sample)) and not is_off(name, value):
            raise unsupported(name, value, origin(name), TURNED_OFF_BY.get(name))


def _shown(input_ids: Tensor, mask: Any, eos: list[int], pad: int | None) -> Tensor:
    """Which prompt tokens the model sees: bool, of the shape of `input_ids`.

    Without a mask these are all tokens, or all but the pad tokens if the pad token is not an end token. Hugging Face counts
    positions over the visible tokens only, so masking a token is the same as leaving it out.
    """
    if mask is not None:
        shown = check_mask(mask, input_ids)
    elif pad is not None and pad not in eos:
        shown = input_ids != pad
    else:
        shown = torch.ones_like(input_ids, dtype=torch.bool)
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
    """The most tokens to generate for a row. As in Hugging Face, max_length counts padding."""
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    if config.max_length is None:
        warnings.warn(
            f"neither max_new_tokens nor max_length is set: generating up to {DEFAULT_NEW_TOKENS} tokens",
            stacklevel=4,
        )
        max_length = min(width + DEFAULT_NEW_TOKENS, context_limit)
    else:
        max_length = config.max_length
    if width >= max_length:
        raise RequestError(
            f"the prompts have {width} tokens and max_length is {max_length}: raise it or set max_new_tokens",
            "max_length",
        )
    return max_length - width


def _refuse_minimum(config: GenerationConfig, width: int, origin: Callable[[str], str]) -> None:
    for name, most in (("min_length", width), ("min_new_tokens", 0)):
        value = getattr(config, name)
        if value is not None and value > most:
            raise unsupported(name, value, origin(name), 0)


def _stop_strings(config: GenerationConfig, tokenizer: Any) -> StopStringCriteria | None:
    if config.stop_strings is None:
        return None
    if tokenizer is None:
        raise RequestError("stop_strings needs the model's tokenizer: pass tokenizer=", "tokenizer")
    try:
        return StopStringCriteria(tokenizer, config.stop_strings)
    except Exception as error:  # A tokenizer can be wrong in many ways.
        raise RequestError(
            f"tokenizer can't be used for stop_strings: pass the model's own ({one_line(error)})", "tokenizer"
        ) from error


def _sampling(config: GenerationConfig) -> dict[str, Any]:
    """The fields of SamplingParams that decide the distribution."""
    penalty = 1.0 if config.repetition_penalty is None else config.repetition_penalty
    if not config.do_sample:
        return {"temperature": 0.0, "repetition_penalty": penalty}
    temperature = 1.0 if config.temperature is None else config.temperature
    if temperature <= 0:
        message = f"temperature must be positive with do_sample=True, got {temperature}"
        raise RequestError(message, "temperature")
    return {
        "temperature": temperature,
        "top_k": config.top_k or 0,
        "top_p": 1.0 if config.top_p is None else config.top_p,
        "min_p": 0.0 if config.min_p is None else config.min_p,
        "repetition_penalty": penalty,
    }


def _seed(seed: Any) -> int:
    try:
        return integer(seed, 0)
    except ValueError as error:
        raise RequestError(f"seed {error}", "seed") from None


def _first_token(config: GenerationConfig, vocab_size: int) -> Tensor:
    """The prompt of a call without one: the model's bos_token_id."""
    if config.bos_token_id is None:
        message = "pass the prompts as input_ids: the model has no bos_token_id to begin with"
        raise RequestError(message, "input_ids")
    if config.bos_token_id >= vocab_size:
        message = f"bos_token_id must be a token id below {vocab_size}, got {config.bos_token_id}"
        raise RequestError(message, "bos_token_id")
    return torch.tensor([[config.bos_token_id]])


def _seeds(seed: int | None, count: int) -> list[int]:
    """A seed for each prompt. The first is `seed`, or drawn from torch's global generator; the others follow from it."""
    if seed is None:
        seed = int(torch.randint(0, (1 << SEED_BITS) - 1, (), dtype=torch.int64))
    others = random.Random(seed)
    return [seed, *(others.getrandbits(SEED_BITS) for _ in range(count - 1))]
