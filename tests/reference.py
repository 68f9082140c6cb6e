"""A slow reference of Orthrus made of Hugging Face parts alone: both views, and official greedy decoding.

Nothing here is shared with the engine, not even the reading of checkpoints: where both give the same tokens in the same
number of cycles, neither misreads the model. Everything runs in float32 with eager attention, one sequence at a time.
"""

import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

_FOREIGN_KEYS = ("model_type", "architectures", "auto_map", "dtype", "torch_dtype")


class Reference:
    """Both views of a checkpoint as two Hugging Face models.

    ar: the Qwen3. diffusion: a second one whose attention projections are the `*_diff` ones; None for a plain
    checkpoint. eos: token ids that end a text.
    """

    def __init__(self, path: Path) -> None:
        raw = json.loads((path / "config.json").read_text())
        tensors: dict[str, Tensor] = {}
        for file in sorted(path.glob("*.safetensors")):
            tensors |= load_file(file)
        config = Qwen3Config(**{key: value for key, value in raw.items() if key not in _FOREIGN_KEYS})
        plain = {name: tensor for name, tensor in tensors.items() if "_diff." not in name}
        draft = {name.replace("_diff.", "."): tensor for name, tensor in tensors.items() if "_diff." in name}
        self.ar = _model(config, plain)
        self.diffusion = _model(config, plain | draft) if draft else None
        self.block_size: int = raw.get("block_size", 1)
        self.mask_token_id: int = raw.get("mask_token_id", 0)
        eos = config.eos_token_id
        if (path / "generation_config.json").exists():
            eos = GenerationConfig.from_pretrained(path).eos_token_id
        self.eos: set[int] = set(eos) if isinstance(eos, list) else {eos} - {None}

    @torch.inference_mode()
    def ar_logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits [len(tokens), vocab_size] of the AR view over a whole text."""
        return self.ar(torch.tensor([tokens])).logits[0]

    @torch.inference_mode()
    def diffusion_logits(self, context: Sequence[int], newest: int, length: int) -> Tensor:
        """Logits [length, vocab_size] of a diffusion block [newest, MASK, ...] after `context`; row i predicts i + 1."""
        return self._draft(self._cache_of(context), newest, length)

    @torch.inference_mode()
    def decode(self, prompt: Sequence[int], max_new_tokens: int) -> tuple[list[int], int]:
        """Generated tokens and draft + verify cycles of official greedy Orthrus decoding.

        The prefill gives the first token; the text ends after `max_new_tokens` or with the first end-of-sequence id.
        """
        cache = DynamicCache(config=self.ar.config)
        logits = self.ar(torch.tensor([prompt]), past_key_values=cache).logits[0]
        text = [*prompt, int(logits[-1].argmax())]
        max_length = len(prompt) + max_new_tokens
        cycles = 0
        # `start` is the position of the newest token, which the cache doesn't hold yet.
        start = len(prompt)
        while start < max_length - 1 and text[-1] not in self.eos:
            length = min(self.block_size, max_length - start)
            drafts = self._draft(cache, text[start], length)[: length - 1].argmax(-1).tolist()
            verified = self.ar(torch.tensor([[text[start], *drafts]]), past_key_values=cache).logits[0]
            picks = verified.argmax(-1).tolist()
            accepted = 0
            while accepted < len(drafts) and drafts[accepted] == picks[accepted]:
                accepted += 1
            text += picks[: accepted + 1]
            start += accepted + 1
            if start < cache.get_seq_length():
                cache.crop(start - cache.get_seq_length())
            cycles += 1
            end = next((i for i in range(len(prompt), len(text)) if text[i] in self.eos), None)
            if end is not None:
                del text[end + 1 :]
                break
        return text[len(prompt) :][:max_new_tokens], cycles

    @torch.inference_mode()
    def decode_ar(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """Greedy text of the AR view, one token per pass: what every schedule must give."""
        cache = DynamicCache(config=self.ar.config)
        rows = list(prompt)
        text: list[int] = []
        while len(text) < max_new_tokens and not (text and text[-1] in self.eos):
            rows = [int(self.ar(torch.tensor([rows]), past_key_values=cache).logits[0, -1].argmax())]
            text += rows
        return text

    def _cache_of(self, tokens: Sequence[int]) -> DynamicCache:
        cache = DynamicCache(config=self.ar.config)
        if tokens:
            self.ar(torch.tensor([tokens]), past_key_values=cache)
        return cache

    def _draft(self, cache: DynamicCache, newest: int, length: int) -> Tensor:
        """Logits [length, vocab_size] of a diffusion block at the end of the AR keys and values in `cache`, left as is."""
        assert self.diffusion is not None, "the checkpoint has no diffusion weights"
        start = cache.get_seq_length()
        rows = torch.tensor([[newest] + [self.mask_token_id] * (length - 1)])
        # Added to the scores: zeros let every row see the cache and the whole block.
        visible = torch.zeros(1, 1, length, start + length)
        output = self.diffusion(
            rows,
            attention_mask=visible,
            position_ids=torch.arange(start, start + length)[None],
            past_key_values=deepcopy(cache),
        )
        return output.logits[0]


def reference_decode(path: Path, prompt: Sequence[int], max_new_tokens: int) -> tuple[list[int], int]:
    """Tokens and cycles of official greedy Orthrus decoding of the checkpoint at `path`; see `Reference.decode`."""
    return Reference(path).decode(prompt, max_new_tokens)


def _model(config: Qwen3Config, tensors: dict[str, Tensor]) -> Qwen3ForCausalLM:
    settings = deepcopy(config)
    settings._attn_implementation = "eager"
    model = Qwen3ForCausalLM(settings).float().eval()
    given = {name: tensor.float() for name, tensor in tensors.items()}
    if settings.tie_word_embeddings:
        given["lm_head.weight"] = given["model.embed_tokens.weight"]
    model.load_state_dict(given)
    return model
