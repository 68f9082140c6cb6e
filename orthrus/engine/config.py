"""Settings of one engine: what `deployments/` YAML calls `engine:`, and what `Engine.from_pretrained` takes."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from orthrus.errors import ConfigError
from orthrus.models.shard import check_ranks
from orthrus.schedules.registry import (
    AR,
    AUTO,
    MEDUSA,
    NGRAM,
    SCHEDULES,
    choose_schedule,
    schedule_choices,
    schedule_settings,
)

if TYPE_CHECKING:
    from orthrus.models.config import ModelConfig


class EngineConfig(BaseModel):
    """One engine's settings. An unknown key or a value out of range is an error that names it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    """A Hugging Face directory or hub id."""
    served_model_name: str | None = None
    """What clients call the model."""
    device: str = "auto"
    """A device as torch names it. "auto" is CUDA if there is a GPU, and else the CPU."""
    dtype: Literal["auto", "float32", "float16", "bfloat16", "float64"] = "auto"
    weights: Literal["auto", "bf16", "lossless12"] = "auto"
    """How a GPU keeps the weights of a bfloat16 model: in full ("bf16"), or in 12 bits each, of which no bit is lost
    ("lossless12"). Texts are the same to the last bit. "auto" is what the checkpoint is stored in: for most, "bf16"."""
    schedule: str = AUTO
    """A name from `orthrus.schedules.registry`. "auto" is "orthrus" where the checkpoint has diffusion weights, else "ngram"."""
    draft_length: int | None = Field(default=None, ge=2, le=512)
    """Most rows that verify drafts, the newest token's included. None for the checkpoint's block_size, and 32 for n-gram drafts.
    The engine drafts fewer where its cost model says that this pays."""
    prompt_lookup_max: int = Field(default=4, ge=0)
    """Most tokens of an n-gram that is looked up in prompt and text. The tokens that followed it there are drafted. 0 turns
    lookups off."""
    prompt_lookup_min: int = Field(default=2, ge=1)
    """Fewest tokens of such an n-gram."""
    adaptive_draft: bool = True
    """Whether the cost model may shorten or skip drafts. It changes nothing where nothing is drafted."""
    draft_lead: bool | None = None
    """Whether a draft pass also computes the next token exactly, beside the block that drafts the tokens after it. None lets the
    cost model decide."""
    draft_weights: Literal["auto", "same", "fp8", "fp8+int4", "int4", "lossless8"] = "auto"
    """The weights of draft passes: the "same" as those of AR rows, or copies. Copies in "fp8" take half the memory of 16-bit
    weights. In "int4" the MLPs take little more than a quarter, and the rest is in FP8. "fp8+int4" has MLPs in 4 bits for passes
    of up to 128 rows, and in FP8 for larger ones. With `weights` "lossless12", drafts may read "lossless8", the first 8 of the 12
    bits, which takes no memory.

    "auto" is "same" if the GPU has no FP8 tensor cores, if `draft_lead` is true, or if the checkpoint is quantised or not in 16
    bits. Where weights are in 12 bits it is "lossless8". Otherwise it is the first of "fp8+int4", "fp8" and "int4" that leaves
    the KV cache enough memory, or "same" if none does. The cache must keep three quarters of its size and room for a full
    context, or else the `kv_cache_tokens` that are set. Formats with 4 bits are for Hopper GPUs only."""
    draft_tree: Annotated[int, Field(ge=0, le=128)] | Literal["auto"] = 0
    """Most rows of a tree of drafts: several continuations of one sequence, which one pass verifies. 0 turns trees off. "auto"
    is 0, but on one GPU up to 64, where the cost model says that this pays."""
    medusa_heads: str | None = None
    """Directory of the Medusa heads for the schedule "medusa", made by `orthrus train medusa`. None: the model's own."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Context limit in tokens, None for the checkpoint's."""
    max_num_seqs: int = Field(default=64, ge=1)
    """Most sequences that run at a time."""
    prefill_chunk: int = Field(default=512, ge=1)
    """Most prompt rows in one pass."""
    kv_cache_tokens: int | None = Field(default=None, ge=1)
    """Capacity of the paged KV cache in tokens, over all sequences, rounded up to pages. None makes room for `max_num_seqs` full
    contexts, within 2 GiB on a CPU, and on a GPU within what weights and passes leave of `gpu_memory_utilization`."""
    page_size: Literal[8, 16, 32, 64, 128, 256] | None = None
    """Tokens of a page. None is 16 on a CPU and 64 on a GPU. A GPU needs a multiple of 64."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0.0, le=1.0)
    """The share of the GPU's memory that the engine may use."""
    prefix_caching: bool = True
    """Whether requests reuse cached pages of earlier requests that begin with the same tokens."""
    tensor_parallel_size: Literal[1, 2, 4, 8] = 1
    """GPUs of one host that share the model, or processes on a CPU. It changes the speed, and never the text."""
    sum_leaves: Literal[1, 2, 4, 8] | None = None
    """Into how many parts some of the model's sums are cut. At most so many GPUs can share the model. Texts depend on this
    number, and never on the number of GPUs. More than 2 slows prompts down. None is 2, or 1 for models that can't be shared."""

    @property
    def wants_trees(self) -> bool:
        """Whether drafts may be verified as trees, as far as the settings say."""
        return self.adaptive_draft if self.draft_tree == "auto" else self.draft_tree > 1

    @field_validator("schedule")
    @classmethod
    def _known_schedule(cls, name: str) -> str:
        if name not in schedule_choices():
            raise ValueError(f"schedule {name!r} is not known: use one of {', '.join(schedule_choices())}")
        return name

    @model_validator(mode="after")
    def _schedule_has_settings(self) -> "EngineConfig":
        if self.schedule == AUTO:
            return self
        own = SCHEDULES[self.schedule].settings
        for setting in sorted(schedule_settings() - own):
            if getattr(self, setting) != type(self).model_fields[setting].default:
                others = " or ".join(
                    f"'{name}'" for name, entry in SCHEDULES.items() if setting in entry.settings
                )
                raise ValueError(
                    f"{setting} has no meaning with schedule '{self.schedule}': remove it or use schedule {others}"
                )
        return self

    @model_validator(mode="after")
    def _medusa_heads_are_used(self) -> "EngineConfig":
        if self.schedule != MEDUSA and self.medusa_heads is not None:
            raise ValueError(
                f"medusa_heads has no meaning with schedule '{self.schedule}': set schedule to medusa"
            )
        if self.schedule == MEDUSA and self.tensor_parallel_size > 1:
            raise ValueError(
                "Medusa heads run on one GPU: set tensor_parallel_size to 1, or choose another schedule"
            )
        return self

    @model_validator(mode="after")
    def _lookups_have_lengths(self) -> "EngineConfig":
        if self.prompt_lookup_max == 0 and self.schedule == NGRAM:
            raise ValueError(
                "schedule 'ngram' looks up its drafts, and prompt_lookup_max is 0: set it to 4, or use schedule 'ar'"
            )
        if 0 < self.prompt_lookup_max < self.prompt_lookup_min:
            raise ValueError(
                f"prompt_lookup_max {self.prompt_lookup_max} is below prompt_lookup_min {self.prompt_lookup_min}: raise one or "
                "lower the other"
            )
        return self

    @model_validator(mode="after")
    def _leads_share_weights(self) -> "EngineConfig":
        if self.draft_lead and self.draft_weights not in ("auto", "same"):
            raise ValueError(
                f"draft_lead needs both views in one pass, and with draft_weights '{self.draft_weights}' a pass has one: "
                "remove draft_lead, or set draft_weights to same"
            )
        return self

    @model_validator(mode="after")
    def _planes_are_of_lossless_weights(self) -> "EngineConfig":
        if self.draft_weights == "lossless8" and self.weights != "lossless12":
            raise ValueError(
                "draft_weights 'lossless8' reads a part of what weights 'lossless12' keeps: set weights to lossless12, or "
                "draft_weights to fp8"
            )
        return self

    @model_validator(mode="after")
    def _cache_holds_a_context(self) -> "EngineConfig":
        limit, cache = self.max_model_len, self.kv_cache_tokens
        if limit is not None and cache is not None and limit > cache:
            raise ValueError(
                f"the KV cache holds {cache} tokens, fewer than max_model_len {limit}: raise kv_cache_tokens to {limit} "
                "or lower max_model_len"
            )
        return self

    def with_settings(self, model: "ModelConfig") -> "ModelConfig":
        """`model` with the setting that changes its arithmetic, `sum_leaves`, if it is set."""
        return model if self.sum_leaves is None else replace(model, sum_leaves=self.sum_leaves)

    def schedule_for(self, model: "ModelConfig") -> str:
        """The name of the schedule that the settings choose for `model`."""
        return choose_schedule(self.schedule, model.has_diffusion, bool(self.prompt_lookup_max))

    def medusa_folder(self, model: Path) -> Path | None:
        """The folder of the Medusa heads, None if the schedule has none. model: the folder of the checkpoint."""
        if self.schedule != MEDUSA:
            return None
        return model if self.medusa_heads is None else Path(self.medusa_heads)

    def request_schedules(self, model: "ModelConfig") -> tuple[str, ...]:
        """The schedules that a request may choose."""
        own = self.schedule_for(model)
        parts = [part for part in SCHEDULES[own].parts if part != NGRAM or self.prompt_lookup_max]
        return tuple(dict.fromkeys([AUTO, own, *parts, AR]))

    def keeps_12_bits(self, model: "ModelConfig") -> bool:
        """Whether a GPU is to keep the weights in 12 bits."""
        stored = model.quantization is not None and model.quantization.lossless
        return stored or self.weights == "lossless12"

    def _check_weights(self, model: "ModelConfig") -> None:
        how = model.quantization
        if self.weights == "bf16" and how is not None and how.lossless:
            raise ConfigError(
                f"weights 'bf16' does not fit {model.name}, which is stored in lossless12: remove the setting weights, or write "
                "a bfloat16 copy with orthrus quantize --restore"
            )
        if self.weights == "lossless12" and how is not None and not how.lossless:
            raise ConfigError(
                f"weights 'lossless12' needs bfloat16 weights, and {model.name} is quantised ({how.method}): "
                "remove the setting weights, or serve the checkpoint that it was made from"
            )

    def check_model(self, model: "ModelConfig") -> None:
        """Raise ConfigError, naming the setting, if a setting does not fit `model`."""
        check_ranks(self.with_settings(model), self.tensor_parallel_size)
        limit, positions = self.max_model_len, model.max_position_embeddings
        if limit is not None and limit > positions:
            raise ConfigError(
                f"max_model_len {limit} is over the {positions} positions of {model.name}: lower it, or give the "
                "checkpoint YaRN rope_parameters"
            )
        self._check_weights(model)
        if self.schedule != AUTO and SCHEDULES[self.schedule].needs_diffusion and not model.has_diffusion:
            raise ConfigError(
                f"schedule '{self.schedule}' needs diffusion weights, and {model.name} has none: use schedule 'ngram' or an "
                "Orthrus checkpoint"
            )
        if (
            model.block_size is not None
            and SCHEDULES[self.schedule_for(model)].needs_diffusion
            and self.draft_length is not None
            and self.draft_length > model.block_size
        ):
            raise ConfigError(
                f"draft_length {self.draft_length} is over the checkpoint's block_size {model.block_size}: lower it"
            )
