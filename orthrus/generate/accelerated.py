"""`orthrus.accelerate`: an object whose `generate` is Hugging Face's, arguments and results, run by the engine."""

import itertools
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StopStringCriteria
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

from orthrus.engine.config import EngineConfig
from orthrus.engine.engine import Engine, choose_device
from orthrus.errors import ConfigError, RequestError
from orthrus.files import one_line, read_json
from orthrus.generate.hf_arguments import GenerateCall, read_arguments, renamed
from orthrus.generate.hf_fields import unsupported
from orthrus.generate.hf_module import check_as_written
from orthrus.models.checkpoint import check_finite, compute_dtype
from orthrus.models.config import ModelConfig
from orthrus.models.families import CONFIG_FILE, FAMILIES, GENERATION_CONFIG_FILE, family_of, parse_config
from orthrus.models.family import EMBEDDING, HEAD
from orthrus.models.hub import resolve
from orthrus.requests.request import Chunk, Request

# nn.Module methods that return the module: through an accelerated model they would hand out the slow one.
_MODULE_CHANGES = {
    *("to", "cuda", "cpu", "xpu", "float", "double", "half", "bfloat16", "type", "to_empty"),
    *("train", "apply", "compile", "requires_grad_", "share_memory"),
}


@dataclass(frozen=True)
class GenerateStats:
    """What one `generate` took. new_tokens: of all returned sequences. passes: the engine's forward passes.

    cycles, cycle_tokens: decode commits over all sequences and the tokens they brought; the first token of a
    sequence comes from its prompt's pass and is no cycle.
    """

    sequences: int
    prompt_tokens: int
    new_tokens: int
    passes: int
    cycles: int
    cycle_tokens: int

    @property
    def tokens_per_cycle(self) -> float:
        """Tokens that a draft-and-verify cycle brought on average. 1.0 is plain decoding, more is acceleration."""
        return self.cycle_tokens / self.cycles if self.cycles else 1.0


def accelerate(
    model_or_id: PreTrainedModel | str | Path,
    *,
    schedule: str = "auto",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    **engine_settings: Any,
) -> "AcceleratedModel":
    """Make `generate` faster without changing what it returns.

    model_or_id: a Hugging Face model of a family in `orthrus.models.families`, plain or with Orthrus' `*_diff` weights, or a
    checkpoint directory or hub id. Of a model, the weights are taken as they are now: accelerate it again after changing
    them. schedule: "orthrus" drafts with the diffusion weights, "ar" decodes token by token, "auto" drafts where it can.
    device, dtype: by default the model's own; of an id, a GPU where there is one, and the checkpoint's dtype there.
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
) -> "AcceleratedModel":
    config = _engine_config(model, schedule, device, dtype, settings)
    path = resolve(model)
    engine = Engine.from_pretrained(config)
    file = path / CONFIG_FILE
    try:
        # Of the plain model, whatever the file's model_type says: `generate` returns its text.
        config_class = family_of(engine.model_config).hugging_face().config
        hf_config = config_class(**{k: v for k, v in read_json(file).items() if k != "model_type"})
        if (path / GENERATION_CONFIG_FILE).exists():
            file = path / GENERATION_CONFIG_FILE
            generation_config = GenerationConfig.from_pretrained(path)
        else:
            generation_config = GenerationConfig.from_model_config(hf_config)
    except Exception as error:  # Their checks raise what the values happen to break.
        raise ConfigError(f"{file}: transformers rejects it: {one_line(error)}") from error
    return AcceleratedModel(engine, hf_config, generation_config)


def _from_module(
    module: PreTrainedModel,
    schedule: str,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    settings: dict[str, Any],
) -> "AcceleratedModel":
    name = module.name_or_path or type(module).__name__
    config = _engine_config(name, schedule, device or module.device, dtype or module.dtype, settings)
    check_as_written(module)
    tensors = module.state_dict()
    if module.config.tie_word_embeddings and module.lm_head.weight is module.model.embed_tokens.weight:
        tensors.pop(HEAD, None)
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
    _check_tensors(tensors, model_config)
    target = choose_device(config.device)
    kind = compute_dtype(config.dtype, model_config, target)
    weights = {tensor_name: tensor.to(target, kind) for tensor_name, tensor in tensors.items()}
    for tensor_name, tensor in tensors.items():
        check_finite(weights[tensor_name], f"the model's {tensor_name}", tensor)
    engine = Engine(config, model_config, weights)
    return AcceleratedModel(engine, module.config, module.generation_config, module)


def _check_tensors(tensors: dict[str, Tensor], config: ModelConfig) -> None:
    """Raise ConfigError unless the tensors are the config's: an adapter left out would change the text."""
    expected = family_of(config).tensor_shapes(config)
    if HEAD in tensors:
        # One that was untied by hand, whatever the config says.
        expected[HEAD] = expected[EMBEDDING]
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


class AcceleratedModel:
    """A model whose `generate` runs on the engine. Made from a Hugging Face module, it has all of its attributes.

    config, generation_config: the Hugging Face ones; edit `generation_config` to change the defaults of
    `generate`. stats: of the last finished `generate`, None before. Calls from several threads take turns.
    """

    def __init__(
        self,
        engine: Engine,
        config: Any,
        generation_config: GenerationConfig,
        module: PreTrainedModel | None = None,
    ) -> None:
        self.engine = engine
        self.config = config
        self.generation_config = generation_config
        self.module = module
        self.stats: GenerateStats | None = None
        self._turn = threading.Lock()
        self._numbers = itertools.count()

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @property
    def dtype(self) -> torch.dtype:
        return self.engine.forward.dtype

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer; None where it has none, or where a module was accelerated."""
        return self.engine.tokenizer

    def eval(self) -> "AcceleratedModel":
        """Itself: it is always in evaluation mode."""
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, as it is."""
        return self._of_module("__call__")(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._of_module(name)

    def _of_module(self, name: str) -> Any:
        # Through __dict__: copy and pickle look attributes up before there are any.
        module = self.__dict__.get("module")
        if module is None:
            raise AttributeError(
                f"{name} needs a Hugging Face module, and a model accelerated from a checkpoint has none, only "
                "generate: load one with AutoModelForCausalLM.from_pretrained and accelerate that"
            )
        if name in _MODULE_CHANGES:
            raise AttributeError(
                f"{name} can't change an accelerated model: pass device= or dtype= to accelerate, or call it on .module"
            )
        return getattr(module, name)

    def __repr__(self) -> str:
        return f"AcceleratedModel({self.engine.config.model!r}, schedule={self.engine.schedule_name!r})"

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        prefix_allowed_tokens_fn: Any = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        streamer: BaseStreamer | None = None,
        negative_prompt_ids: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        custom_generate: Any = None,
        *,
        seed: int | None = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Hugging Face's `generate`: the same arguments, merged with the generation configs alike, and results.

        Greedy decoding returns the same tokens; sampling draws from the same distribution, with random
        numbers of its own. seed: for do_sample, below 2**63; by default drawn from torch's global generator,
        so that torch.manual_seed makes calls repeatable. With it, the first sequence is the one that a server
        gives. Returns int64 [batch * num_return_sequences, width + generated] on the prompts' device, the
        prompts as given and their tokens, padded on the right; with return_dict_in_generate=True an output
        with these `sequences`. Raises RequestError (a ValueError) for an argument that is wrong or has no
        counterpart; its `param` names it. RuntimeError where the model's scores are NaN or infinite.
        """
        refused = {
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
            "synced_gpus": synced_gpus,
            "assistant_model": assistant_model,
            "negative_prompt_ids": negative_prompt_ids,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
            "custom_generate": custom_generate,
        }
        for name, value in refused.items():
            lists = name in ("logits_processor", "stopping_criteria")
            if not (value is None or value is False or (lists and isinstance(value, list) and not value)):
                raise unsupported(name, value)
        call = read_arguments(
            model_defaults=self.generation_config,
            context_limit=self.engine.max_model_len,
            vocab_size=self.engine.model_config.vocab_size,
            generation_config=generation_config,
            inputs=inputs,
            seed=seed,
            tokenizer=tokenizer,
            kwargs=kwargs,
        )
        if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise RequestError(f"streamer must be a BaseStreamer, got {type(streamer).__name__}", "streamer")
        if streamer is not None and len(call.prompts) * call.copies > 1:
            raise RequestError("streamer can follow one sequence only: pass one prompt", "streamer")
        with self._turn:
            rows = self._run(call, streamer)
        if streamer is not None:
            streamer.end()
        sequences = _assemble(call, rows)
        return GenerateDecoderOnlyOutput(sequences=sequences) if call.return_dict else sequences

    def _run(self, call: GenerateCall, streamer: BaseStreamer | None) -> list["_Row"]:
        """Generate all rows of the call and set `stats`.

        Whatever is raised, by a streamer or an interrupt too, no request stays behind in the engine.
        """
        engine = self.engine
        before = engine.stats
        first_row = {f"accelerate-{next(self._numbers)}": i * call.copies for i in range(len(call.prompts))}
        rows = [_Row(list(ids), len(ids)) for ids in call.input_ids.tolist() for _ in range(call.copies)]
        # Request ids with the number of their rows that go on.
        pending = dict.fromkeys(first_row, call.copies)
        try:
            for request_id, prompt, params in zip(first_row, call.prompts, call.params, strict=True):
                self._submit(Request(request_id, prompt, params))
            if streamer is not None:
                streamer.put(call.input_ids.cpu())
            while pending:
                for chunk in engine.step():
                    if chunk.error is not None and chunk.request_id in pending:
                        raise RuntimeError(f"generate: {chunk.error}")
                    row = rows[first_row[chunk.request_id] + chunk.index]
                    if row.finished or not row.take(chunk, call.stop_strings, streamer):
                        continue
                    pending[chunk.request_id] -= 1
                    if pending[chunk.request_id] == 0:
                        del pending[chunk.request_id]
                        # It goes on in the engine if a stop string ended it here.
                        engine.cancel(chunk.request_id)
        finally:
            for request_id in pending:
                engine.cancel(request_id)
        after = engine.stats
        self.stats = GenerateStats(
            sequences=len(rows),
            prompt_tokens=sum(map(len, call.prompts)),
            new_tokens=sum(len(row.ids) - row.width for row in rows),
            passes=after.passes - before.passes,
            cycles=after.cycles - before.cycles,
            cycle_tokens=after.committed - before.committed,
        )
        return rows

    def _submit(self, request: Request) -> None:
        try:
            self.engine.submit(request)
        except RequestError as error:
            raise renamed(error) from None


@dataclass
class _Row:
    """One returned sequence while it is generated: `ids` are its prompt's, `width` of them, then its tokens."""

    ids: list[int]
    width: int
    finished: bool = False

    def take(
        self, chunk: Chunk, stop_strings: StopStringCriteria | None, streamer: BaseStreamer | None
    ) -> bool:
        """Append the chunk's tokens, up to one that completes a stop string. Returns whether the row ends there."""
        for token in chunk.token_ids:
            self.ids.append(token)
            if streamer is not None:
                streamer.put(torch.tensor([token]))
            if stop_strings is not None and stop_strings(torch.tensor([self.ids]), None).item():
                self.finished = True
                return True
        self.finished = chunk.finish_reason is not None
        return self.finished


def _assemble(call: GenerateCall, rows: list[_Row]) -> Tensor:
    """The result: int64 [rows, longest], padded on the right, on the prompts' device."""
    longest = max(len(row.ids) for row in rows)
    # Without a pad token no row ends early, and nothing is filled.
    pad = 0 if call.pad_token_id is None else call.pad_token_id
    padded = [row.ids + [pad] * (longest - len(row.ids)) for row in rows]
    return torch.tensor(padded, dtype=torch.int64, device=call.input_ids.device)
