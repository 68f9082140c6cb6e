"""Settings of one engine: what `deployments/` YAML calls `engine:`, and what `Engine.from_pretrained` takes."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class EngineConfig(BaseModel):
    """One engine's settings. An unknown key or a value out of range is an error that names it.

    model: Hugging Face directory or hub id. schedule: "auto" is "orthrus" where the checkpoint has diffusion weights,
    else "ar". draft_length: rows of a diffusion block (newest token included), None for the checkpoint's block_size; the
    engine drafts fewer where its cost model says that pays. adaptive_draft: let the cost model shorten or skip drafts.
    kv_cache_tokens: capacity of the paged KV cache in tokens, over all sequences, rounded up to pages; None sizes it for
    `max_num_seqs` full contexts on CPU. page_size: tokens per page. prefill_chunk: most prompt rows in one pass.
    max_model_len: context limit in tokens, None for the checkpoint's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    served_model_name: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16", "float64"] = "auto"
    schedule: Literal["auto", "ar", "orthrus"] = "auto"
    draft_length: int | None = Field(default=None, ge=2)
    adaptive_draft: bool = True
    max_model_len: int | None = Field(default=None, ge=2)
    max_num_seqs: int = Field(default=64, ge=1)
    prefill_chunk: int = Field(default=512, ge=1)
    kv_cache_tokens: int | None = Field(default=None, ge=1)
    page_size: Literal[8, 16, 32, 64, 128, 256] = 16
    prefix_caching: bool = True
    max_queue: int = Field(default=4096, ge=1)

    @model_validator(mode="after")
    def _draft_needs_orthrus(self) -> "EngineConfig":
        if self.schedule == "ar" and self.draft_length is not None:
            raise ValueError(
                "draft_length has no meaning with schedule 'ar': remove it or use schedule 'orthrus'"
            )
        return self
