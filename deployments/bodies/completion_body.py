"""The body of POST /v1/completions."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from orthrus.deployments.bodies.body import Body
from orthrus.errors import RequestError
from orthrus.requests.request import SamplingParams

_MAX_CHOICES = 1024


class CompletionBody(Body):
    """POST /v1/completions. `prompt` is a text, a list of texts, token ids, or a list of token id lists."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: bool | None = False
    best_of: int | None = None
    suffix: str | None = None
    add_special_tokens: bool = True

    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts, at least one. Raises RequestError."""
        if self.suffix:
            raise RequestError(
                "suffix is not supported: the model only completes text from the left", "suffix"
            )
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise RequestError(
                "best_of other than n is not supported: ask for n and choose on your side", "best_of"
            )
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise RequestError("prompt must not be an empty list", "prompt")
        many: Any = [prompt] if isinstance(prompt[0], int) else prompt
        choices = len(many) * (self.n or 1)
        if choices > _MAX_CHOICES:
            raise RequestError(
                f"prompts times n must be at most {_MAX_CHOICES} in one request, got {choices}", "prompt"
            )
        return many

    @property
    def new_tokens(self) -> int:
        """How many tokens an answer may have."""
        return 16 if self.max_tokens is None else self.max_tokens

    def constrained(self, params: SamplingParams) -> SamplingParams:
        """`params` with the grammar that the body asks for. Raises RequestError."""
        return replace(params, grammar=self.constraint.lark) if self.constraint is not None else params

    def sampling(self) -> SamplingParams:
        """The body's sampling parameters. Raises RequestError."""
        max_tokens = self.new_tokens
        scored = self.prompt_logprobs
        if self.echo and (self.logprobs is not None or max_tokens == 0):
            scored = max(scored or 0, self.logprobs or 0)
        return self.constrained(self.sampling_with(max_tokens, self.logprobs, scored))
