"""Generates answers for any protocol. The adapters for HTTP and gRPC are thin layers on top of `Handler`.

An adapter admits the call (`Gate`), reads the request's body and writes the answer. `Handler` does what lies between.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace

from ray.serve.handle import DeploymentHandle

from orthrus.deployments.access.call import Call
from orthrus.deployments.access.gate import Gate
from orthrus.deployments.bodies.completion_body import CompletionBody
from orthrus.deployments.chat.body import ChatBody
from orthrus.deployments.chat.template import ChatPrompt, ChatTemplate
from orthrus.deployments.config.api import ApiConfig
from orthrus.deployments.generation.choices import Choice, collect, merge
from orthrus.deployments.generation.generate import check_scores, generate
from orthrus.deployments.generation.served_model import ServedModel
from orthrus.deployments.generation.text_chunk import TextChunk
from orthrus.deployments.link.receiver import ChunkReceiver
from orthrus.errors import RequestError
from orthrus.requests.request import SamplingParams


@dataclass(frozen=True)
class Answer:
    """An answer under way."""

    prompts: Sequence[list[int]]
    """The token ids of each prompt."""
    params: SamplingParams
    """The sampling parameters, with the seed that all prompts and choices share."""
    chunks: AsyncGenerator[tuple[int, TextChunk]]
    """The chunks of all choices as they come, each with the index of its choice. Closing the iterator ends the requests."""

    @property
    def num_choices(self) -> int:
        """How many choices there are, of all prompts together. Those of one prompt follow one another."""
        return len(self.prompts) * self.params.n

    async def choices(self) -> list[Choice]:
        """Wait for all choices. Raises what `generate` raises."""
        return await collect(self.chunks, self.num_choices)


class Handler:
    """Generates the answers of one model."""

    def __init__(
        self,
        model: ServedModel,
        replica: DeploymentHandle,
        receiver: ChunkReceiver,
        gate: Gate,
        config: ApiConfig,
    ) -> None:
        self.model = model
        self.gate = gate
        self.config = config
        self._replica, self._receiver = replica, receiver
        self._template = ChatTemplate(model.tokenizer)

    async def complete(self, call: Call, body: CompletionBody, params: SamplingParams) -> Answer:
        """Begin to complete the body's prompts. Raises RequestError; the chunks raise what `generate` raises.

        params: the body's, or those that came beside it.
        """
        prompts = [await self._encode(body, prompt, params.max_tokens) for prompt in body.prompts()]
        # Checked before anything else, because a client's number may be too large for any integer type.
        vocab = self.model.vocab_size
        if any(tokens and (min(tokens) < 0 or max(tokens) >= vocab) for tokens in prompts):
            raise RequestError(f"prompt token ids must be between 0 and {vocab - 1}", "prompt")
        # An echo repeats a prompt's log-probabilities with each choice.
        check_scores(prompts * params.n if body.echo else prompts, params)
        # One seed for all prompts and choices. The same seed gives the same answer again.
        params = params.with_seed()
        streams = [
            generate(self._replica, self._receiver, self.model.tokenizer, call, prompt, params)
            for prompt in prompts
        ]
        return Answer(prompts, params, merge(streams, params.n))

    async def chat(self, call: Call, body: ChatBody, params: SamplingParams) -> Answer:
        """Begin to answer a conversation. Raises RequestError; the chunks raise what `generate` raises.

        params: the body's, or those that came beside it.
        """
        prompt = await self.chat_prompt(body)
        check_scores([prompt.tokens], params)
        params = replace(params, grammar=prompt.grammar).with_seed()
        stream = generate(
            self._replica,
            self._receiver,
            self.model.tokenizer,
            call,
            prompt.tokens,
            params,
            prompt.splitter,
        )
        return Answer([prompt.tokens], params, merge([stream], params.n))

    async def chat_prompt(self, body: ChatBody) -> ChatPrompt:
        """The prompt of a conversation. Raises RequestError.

        It is made in a thread: a long one must not hold up other streams.
        """
        prompt = await asyncio.to_thread(self._template.apply, body)
        return replace(
            prompt, tokens=body.truncated(prompt.tokens, self.model.max_model_len, body.new_tokens)
        )

    async def _encode(
        self, body: CompletionBody, prompt: str | list[int], max_tokens: int | None
    ) -> list[int]:
        """The token ids of a prompt, truncated if the body asks for it."""
        if isinstance(prompt, str):
            prompt = await self.model.encode(prompt, body.add_special_tokens)
        return body.truncated(prompt, self.model.max_model_len, max_tokens)
