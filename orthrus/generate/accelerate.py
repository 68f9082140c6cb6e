"""`orthrus.accelerate`: make an `AcceleratedModel` from a Hugging Face model or a checkpoint."""

import warnings
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from orthrus.engine import Engine
from orthrus.engine.config import EngineConfig
from orthrus.engine.sizing import choose_device
from orthrus.errors import ConfigError
from orthrus.files import one_line, read_json
from orthrus.generate.accelerated import AcceleratedModel
from orthrus.generate.hf_module import check_as_written
from orthrus.models.checkpoint import check_finite, compute_dtype
from orthrus.models.config import ModelConfig
from orthrus.models.families import CONFIG_FILE, FAMILIES, GENERATION_CONFIG_FILE, family_of, parse_config
from orthrus.models.hub import resolve


def accelerate(
    model_or_id: PreTrainedModel | str | Path,
    *,
    schedule: str = "auto",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    **engine_settings: Any,
) -> AcceleratedModel:
    """Make `generate` faster without changing what it returns.

    model_or_id: a Hugging Face model of a family in `orthrus.models.families`, plain or with Orthrus' `*_diff` weights, or a
    checkpoint directory or hub id. Of a model, the weights are taken as they are now: accelerate it again after changing
    them. schedule: "orthrus" drafts with the diffusion weights, "ngram" looks drafts up, "ar" decodes token by token, "auto"
    drafts as the weights allow.
    device, dtype: by default those of the model. For a directory or hub id, the default is a GPU in the checkpoint's dtype, or
    a CPU in float32 if there is no GPU.
    engine_settings: other fields of `EngineConfig`. On a GPU, the KV cache takes most of the free memory unless
    kv_cache_tokens says for how many tokens it has room. Raises ConfigError for a model or setting that can't work.
    """
    if isinstance(model_or_id, str | Path):
        return _from_checkpoint(str(model_or_id), schedule, device, dtype, engine_settings)
    if isinstance(model_or_id, PreTrainedModel):
        return _from_module(model_or_id, schedule, device, dtype, engine_settings)
    architectures = " or ".join(dict.fromkeys(family.architecture for family in FAMILIES.values()))
    merge = (
        " (merge its adapter first: merge_and_unload())" if hasattr(model_or_id, "merge_and_unload") else ""
    )
    raise ConfigError(
        f"accelerate takes a {architectures}, a checkpoint directory or a hub id, "
        f"got {type(model_or_id).__name__}{merge}"
    )


def _engine_config(
    model: str,
    schedule: str,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    settings: dict[str, Any],
) -> EngineConfig:
    named: dict[str, Any] = {
        "schedule": schedule,
        "device": "auto" if device is None else str(device),
        "dtype": "auto" if dtype is None else str(dtype).removeprefix("torch."),
    }
    try:
        return EngineConfig(model=model, **named, **settings)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"accelerate: {problems}") from error


def _from_checkpoint(
    model: str,
    schedule: str,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    settings: dict[str, Any],
) -> AcceleratedModel:
    config = _engine_config(model, schedule, device, dtype, settings)
    path = resolve(model)
    engine = Engine.from_pretrained(config)
    file = path / CONFIG_FILE
    try:
        # The config of the plain model, whatever model_type the file has, because `generate` returns the plain model's text.
        config_class = family_of(engine.model_config).hugging_face().config
        hf_config = config_class(**{k: v for k, v in read_json(file).items() if k != "model_type"})
        if (path / GENERATION_CONFIG_FILE).exists():
            file = path / GENERATION_CONFIG_FILE
            generation_config = GenerationConfig.from_pretrained(path)
        else:
            generation_config = GenerationConfig.from_model_config(hf_config)
    except Exception as error:  # transformers' checks raise errors of many types.
        raise ConfigError(f"{file}: transformers rejects it: {one_line(error)}") from error
    return AcceleratedModel(engine, hf_config, generation_config)


def _from_module(
    module: PreTrainedModel,
    schedule: str,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    settings: dict[str, Any],
) -> AcceleratedModel:
    name = module.name_or_path or type(module).__name__
    config = _engine_config(name, schedule, device or module.device, dtype or module.dtype, settings)
    if config.tensor_parallel_size > 1:
        raise ConfigError(
            f"tensor_parallel_size {config.tensor_parallel_size} takes a checkpoint, of which each GPU reads its part, and not a "
            "model that is loaded: pass the directory or hub id"
        )
    check_as_written(module)
    tensors = module.state_dict()
    fields = module.config.to_dict()
    if fields.get("block_size") is not None and not any("_diff." in tensor for tensor in tensors):
        advice = (
            "the model was loaded without the diffusion weights of its checkpoint, so that nothing can be drafted: "
            f"pass the checkpoint itself, orthrus.accelerate({module.name_or_path!r})"
        )
        if schedule == "orthrus":
            raise ConfigError(advice)
        warnings.warn(advice, stacklevel=3)
        fields = {k: v for k, v in fields.items() if k not in ("architectures", "block_size")}
    model_config = parse_config(fields, name=name)
    if module.config.tie_word_embeddings and module.lm_head.weight is module.model.embed_tokens.weight:
        tensors.pop(family_of(model_config).head, None)
    _check_tensors(tensors, model_config)
    target = choose_device(config.device)
    kind = compute_dtype(config.dtype, model_config, target)
    weights = {tensor_name: tensor.to(target, kind) for tensor_name, tensor in tensors.items()}
    for tensor_name, tensor in tensors.items():
        check_finite(weights[tensor_name], f"the model's {tensor_name}", tensor)
    engine = Engine(config, model_config, weights)
    return AcceleratedModel(engine, module.config, module.generation_config, module)


def _check_tensors(tensors: dict[str, Tensor], config: ModelConfig) -> None:
    """Raise ConfigError unless the tensors are exactly those of the config. Leaving out an adapter would change the text."""
    family = family_of(config)
    expected = family.tensor_shapes(config)
    if family.head in tensors:
        # The head may have been untied by hand, whatever the config says.
        expected[family.head] = expected[family.embedding]
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is not a tensor of such a model" for name in tensors if name not in expected]
    problems += [
        f"{name} is {list(tensors[name].shape)} and not {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems += [
        f"{name} is {'on no device' if tensor.is_meta else tensor.dtype}"
        for name, tensor in tensors.items()
        if tensor.is_meta or not tensor.is_floating_point()
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ConfigError(
            f"the model's weights don't fit its config: {', '.join(problems[:3])}{more}. Merge adapters and "
            "dequantise before accelerate"
        )
