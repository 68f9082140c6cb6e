"""`AcceleratedModel`: its `generate` takes and returns what Hugging Face's does, and runs on the engine."""

import itertools
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StopStringCriteria
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

from orthrus.engine import Engine
from orthrus.errors import RequestError
from orthrus.generate.hf_arguments import GenerateCall, read_arguments, renamed
from orthrus.generate.hf_fields import unsupported
from orthrus.requests.request import Chunk, Request
from orthrus.schedules.registry import AUTO

# Methods of nn.Module that return the module. Called on an accelerated model, they would return the slow one.
_MODULE_CHANGES = {
    *("to", "cuda", "cpu", "xpu", "float", "double", "half", "bfloat16", "type", "to_empty"),
    *("train", "apply", "compile", "requires_grad_", "share_memory"),
}


@dataclass(frozen=True)
class GenerateStats:
    """Counts of one call of `generate`, over all returned sequences."""

    sequences: int
    prompt_tokens: int
    new_tokens: int
    # Forward passes of the engine.
    passes: int
    # Draft-and-verify cycles, or decoding passes without drafts. The first token of a sequence comes with its prompt's pass,
    # which is not a cycle.
    cycles: int
    # Tokens that the cycles committed.
    cycle_tokens: int

    @property
    def tokens_per_cycle(self) -> float:
        """Average tokens committed per cycle. Plain decoding has 1.0."""
        return self.cycle_tokens / self.cycles if self.cycles else 1.0


class AcceleratedModel:
    """A model whose `generate` runs on the engine. Made from a Hugging Face module, it has all of its attributes.

    Edit `generation_config` to change the defaults of `generate`. Calls of `generate` from several threads take turns.
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
        # The counts of the last finished `generate`. None before the first.
        self.stats: GenerateStats | None = None
        self._lock = threading.Lock()
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
        """Returns itself: it is always in evaluation mode."""
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward pass."""
        return self._of_module("__call__")(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._of_module(name)

    def _of_module(self, name: str) -> Any:
        # Through __dict__: copy and pickle look up attributes before __init__ has set any.
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
        schedule: str = AUTO,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Hugging Face's `generate`: the same arguments, the same defaults, the same results.

        Greedy decoding returns the same tokens. Sampling draws from the same distribution, with other random numbers.
        seed: for do_sample, below 2**63. By default it is drawn from torch's global generator, so that torch.manual_seed makes
        calls repeatable. With a seed, the first sequence is the one that a server returns for that seed. schedule: how to
        decode, "ar" for one token per pass; it never changes the tokens. Returns int64
        [batch * num_return_sequences, width + generated] on the prompts' device, the prompts as given and their tokens, padded
        on the right; with return_dict_in_generate=True an output with these `sequences`. Raises RequestError (a ValueError)
        for an argument that is wrong or has no counterpart; its `param` names it. Raises RuntimeError if the model's scores
        are NaN or infinite.
        """
        _refuse(
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            synced_gpus=synced_gpus,
            assistant_model=assistant_model,
            negative_prompt_ids=negative_prompt_ids,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            custom_generate=custom_generate,
        )
        call = read_arguments(
            model_defaults=self.generation_config,
            context_limit=self.engine.max_model_len,
            vocab_size=self.engine.model_config.vocab_size,
            generation_config=generation_config,
            inputs=inputs,
            seed=seed,
            schedule=schedule,
            tokenizer=tokenizer,
            kwargs=kwargs,
        )
        if streamer is not None:
            _check_streamer(streamer, call)
        with self._lock:
            rows = self._run(call, streamer)
        if streamer is not None:
            streamer.end()
        sequences = _assemble(call, rows)
        return GenerateDecoderOnlyOutput(sequences=sequences) if call.return_dict else sequences

    def _run(self, call: GenerateCall, streamer: BaseStreamer | None) -> list["_Row"]:
        """Generate all rows of the call and set `stats`.

        No request stays in the engine if something is raised, even by a streamer or an interrupt.
        """
        engine = self.engine
        before = engine.stats
        first_row = {f"accelerate-{next(self._numbers)}": i * call.copies for i in range(len(call.prompts))}
        rows = [_Row(list(ids), len(ids)) for ids in call.input_ids.tolist() for _ in range(call.copies)]
        # The unfinished requests, each with its number of unfinished rows.
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
                        # A stop string may have ended its last row here, but the engine would go on with it.
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


def _check_streamer(streamer: Any, call: GenerateCall) -> None:
    """Raise RequestError if `streamer` is not a streamer, or can't follow the call."""
    if not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise RequestError(f"streamer must be a BaseStreamer, got {type(streamer).__name__}", "streamer")
    if len(call.prompts) * call.copies > 1:
        raise RequestError("streamer can follow one sequence only: pass one prompt", "streamer")


def _refuse(**arguments: Any) -> None:
    """Raise RequestError for the first of Hugging Face's arguments that is given and has no counterpart here."""
    for name, value in arguments.items():
        empty = isinstance(value, list) and not value and name in ("logits_processor", "stopping_criteria")
        if not (value is None or value is False or empty):
            raise unsupported(name, value)


@dataclass
class _Row:
    """One returned sequence while it is generated."""

    # Token ids of the prompt, and then the generated ones.
    ids: list[int]
    # Number of prompt ids.
    width: int
    finished: bool = False

    def take(
        self, chunk: Chunk, stop_strings: StopStringCriteria | None, streamer: BaseStreamer | None
    ) -> bool:
        """Append the chunk's tokens, up to one that completes a stop string. Returns whether the row has ended."""
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
    # Without a pad token no row ends early, so there is nothing to fill.
    pad = 0 if call.pad_token_id is None else call.pad_token_id
    padded = [row.ids + [pad] * (longest - len(row.ids)) for row in rows]
    return torch.tensor(padded, dtype=torch.int64, device=call.input_ids.device)
