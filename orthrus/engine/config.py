"""Settings of one engine: what `deployments/` YAML calls `engine:`, and what `Engine.from_pretrained` takes."""

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from orthrus.errors import ConfigError

if TYPE_CHECKING:
    from orthrus.models.config import ModelConfig


class EngineConfig(BaseModel):
    """One engine's settings. An unknown key or a value out of range is an error that names it.

    model: Hugging Face directory or hub id. schedule: "auto" is "orthrus" where the checkpoint has diffusion weights,
    else "ar". draft_length: rows of a diffusion block (newest token included), None for the checkpoint's block_size; the
    engine drafts fewer where its cost model says that pays. adaptive_draft: let the cost model shorten or skip drafts.
    draft_lead: whether a draft pass computes the first token behind the newest one exactly, beside the block that drafts
    those after it; None for where the cost model says that pays.
    kv_cache_tokens: capacity of the paged KV cache in tokens, over all sequences, rounded up to pages; None sizes it for
    `max_num_seqs` full contexts, as far as there is memory: 2 GiB on a CPU; on a GPU what weights and passes leave of
    `gpu_memory_utilization`, the share of its memory that the engine may use. page_size: tokens per page, None for 16 on a
    CPU and 64 on a GPU, which reads a multiple of 64. prefill_chunk: most prompt rows in one pass.
    max_model_len: context limit in tokens, None for the checkpoint's. tensor_parallel_size: GPUs that share one model; only
    1 works so far.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    served_model_name: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16", "float64"] = "auto"
    schedule: Literal["auto", "ar", "orthrus"] = "auto"
    draft_length: int | None = Field(default=None, ge=2)
    adaptive_draft: bool = True
    draft_lead: bool | None = None
    max_model_len: int | None = Field(default=None, ge=2)
    max_num_seqs: int = Field(default=64, ge=1)
    prefill_chunk: int = Field(default=512, ge=1)
    kv_cache_tokens: int | None = Field(default=None, ge=1)
    page_size: Literal[8, 16, 32, 64, 128, 256] | None = None
    gpu_memory_utilization: float = Field(default=0.9, gt=0.0, le=1.0)
    prefix_caching: bool = True
    tensor_parallel_size: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _drafts_need_orthrus(self) -> "EngineConfig":
        for name in ("draft_length", "draft_lead"):
            if self.schedule == "ar" and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} has no meaning with schedule 'ar': remove it or use schedule 'orthrus'"
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

    @model_validator(mode="after")
    def _one_gpu(self) -> "EngineConfig":
        if self.tensor_parallel_size > 1:
            raise ValueError(
                f"tensor_parallel_size {self.tensor_parallel_size} is not supported yet, a model has to fit one GPU: "
                "set it to 1 and take a smaller model or a larger GPU"
            )
        return self

    def check_model(self, model: "ModelConfig") -> None:
        """Raise ConfigError for what `model` can't do, naming the setting."""
        limit, positions = self.max_model_len, model.max_position_embeddings
        if limit is not None and limit > positions:
            raise ConfigError(
                f"max_model_len {limit} is over the {positions} positions of {model.name}: lower it, or give the "
                "checkpoint YaRN rope_parameters"
            )
        if self.schedule == "orthrus" and not model.has_diffusion:
            raise ConfigError(
                f"schedule 'orthrus' needs diffusion weights, and {model.name} has none: use schedule 'ar' or an "
                "Orthrus checkpoint"
            )
        if (
            model.block_size is not None
            and self.draft_length is not None
            and self.draft_length > model.block_size
        ):
            raise ConfigError(
                f"draft_length {self.draft_length} is over the checkpoint's block_size {model.block_size}: lower it"
            )
