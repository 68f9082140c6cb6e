"""transformers' own `generate` as a contestant."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from orthrus.measure.contest import Contestant, Output
from orthrus.measure.random_model import random_weights
from orthrus.models.config import ModelConfig
from orthrus.models.families import family_of

EAGER, COMPILED = "hf eager", "hf static, compiled"


def hugging_face(path: Path, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Contestant:
    """transformers' own `generate` on the checkpoint's AR view: eager, with a growing cache and one left-padded batch."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # It would list every diffusion weight as unused: the AR view has no use for them.
    logging.disable_progress_bar()
    model = family_of(config).hugging_face().model.from_pretrained(path, dtype=dtype).to(device).eval()
    model.generation_config.eos_token_id = None  # Every request runs to its length, as ours do.

    def run(prompts: list[list[int]], new_tokens: int) -> Output:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        with torch.inference_mode():
            rows = model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0
            )
        steps = len(prompts) * (new_tokens - 1)
        return Output(rows[:, width:].tolist(), cycles=steps, passes=steps)

    return Contestant("hugging face", run)


def hugging_face_model(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """transformers' own model with the weights of `random_weights`, the AR view's."""
    family = family_of(model)
    classes = family.hugging_face()
    plain = replace(model, block_size=None, mask_token_id=None)
    with torch.device("meta"):
        theirs = classes.model(classes.config(**family.write_config(plain)))
    weights = dict(random_weights(plain, device, dtype))
    if model.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    theirs.load_state_dict(weights, assign=True)
    # Buffers are not among the weights, so they have to be computed.
    inv_freq, _ = family.rotary(model)
    theirs.model.rotary_emb.inv_freq = inv_freq.to(device)
    theirs.model.rotary_emb.original_inv_freq = inv_freq.to(device)
    return theirs.eval()


def hugging_face_contestants(
    model: ModelConfig, device: torch.device, dtype: torch.dtype
) -> list[Contestant]:
    """transformers' `generate` of the same weights: eager, and with a static cache and a compiled forward."""
    from transformers import GenerationConfig

    theirs = hugging_face_model(model, device, dtype)

    def contestant(name: str, cache: str | None) -> Contestant:
        def run(prompts: list[list[int]], new_tokens: int) -> Output:
            ids = torch.tensor(prompts, device=device)
            settings = GenerationConfig(
                do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, cache_implementation=cache
            )
            rows = theirs.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            steps = len(prompts) * (new_tokens - 1)
            return Output(rows[:, ids.shape[1] :].tolist(), cycles=steps, passes=steps)

        return Contestant(name, run)

    return [contestant(EAGER, None), contestant(COMPILED, "static")]
