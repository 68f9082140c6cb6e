"""The model that an ingress serves, as far as the ingress knows it: its name, its tokenizer and its limits."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from orthrus.deployments.failures.errors import ModelNotFound
from orthrus.engine.config import EngineConfig
from orthrus.models.families import load_config
from orthrus.models.hub import TEXT_FILES, resolve
from orthrus.text.tokenizer import load_tokenizer


@dataclass(frozen=True)
class ServedModel:
    """One model, without its weights."""

    name: str
    """What clients call it."""
    tokenizer: Any
    """A Hugging Face tokenizer."""
    vocab_size: int
    """Token ids are below it."""
    max_model_len: int
    """The context limit: tokens of prompt and answer together."""
    schedules: tuple[str, ...] = ()
    """How a request may ask to be decoded."""
    created: int = field(default_factory=lambda: int(time.time()))
    """When it was loaded here, in Unix seconds."""

    @classmethod
    def load(cls, config: EngineConfig) -> "ServedModel":
        """The model of an engine's config. Raises ConfigError."""
        path = resolve(config.model, TEXT_FILES)
        model = load_config(path)
        trained = model.max_position_embeddings
        return cls(
            name=config.served_model_name or config.model,
            tokenizer=load_tokenizer(path),
            vocab_size=model.vocab_size,
            max_model_len=config.max_model_len or min(trained, config.kv_cache_tokens or trained),
            schedules=config.request_schedules(model),
        )

    @property
    def card(self) -> dict[str, Any]:
        """OpenAI's description of a model, with the fields `max_model_len` and `schedules` besides OpenAI's."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "orthrus",
            "max_model_len": self.max_model_len,
            "schedules": list(self.schedules),
        }

    @property
    def is_assistant(self) -> bool:
        """Whether it seems to be an assistant, judged by its chat template: an assistant's template supports tools."""
        return "tools" in str(getattr(self.tokenizer, "chat_template", None) or "")

    def check_name(self, name: str | None) -> None:
        """Raise ModelNotFound unless `name` is this model's. None is allowed: some bodies may leave the name out."""
        if name is not None and name != self.name:
            raise ModelNotFound(f"the model {name!r} does not exist here: use {self.name!r}")

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Runs in a thread: a long text must not hold up other streams."""
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)
