"""A byte-level BPE tokenizer with Qwen3's pre-tokenisation and chat format, trained on the corpus."""

import lzma
import random
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from orthrus.training.corpus import SEPARATOR

END_OF_TEXT, IM_START, IM_END, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"
SPECIAL_TOKENS = [END_OF_TEXT, IM_START, IM_END, MASK, *(f"<|reserved_{i}|>" for i in range(12))]

_QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def read_documents(file: Path) -> list[str]:
    """The documents of a corpus file. If `file` does not exist, its compressed copy with the suffix .xz is read."""
    if file.exists():
        text = file.read_text(encoding="utf-8")
    else:
        text = lzma.decompress(file.with_name(file.name + ".xz").read_bytes()).decode("utf-8")
    return text.split(SEPARATOR)


def train_tokenizer(
    documents: list[str], vocab_size: int, *, sample_chars: int = 30_000_000, seed: int = 0
) -> Tokenizer:
    """Train a tokenizer of exactly `vocab_size` tokens on a sample of the documents. Special tokens come last, as in Qwen3.

    sample_chars: about how many characters to train on. Raises ValueError if the sample is too small for the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    order = random.Random(seed).sample(documents, len(documents))
    sample, size = [], 0
    for document in order:
        if size > sample_chars:
            break
        sample.append(document)
        size += len(document)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the sample is too small for {vocab_size} tokens: found {tokenizer.get_vocab_size()}"
        )
    return tokenizer


def as_transformers(tokenizer: Tokenizer, context: int) -> Any:
    """`tokenizer` as a transformers tokenizer with the chat template, for `save_pretrained`. context: its limit in tokens."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        mask_token=MASK,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def encode(tokenizer: Tokenizer, documents: list[str], batch: int = 4096) -> np.ndarray:
    """All documents as one array of token ids, with <|endoftext|> after each: uint16, or uint32 for a vocabulary over 65536.

    batch: documents to encode at a time.
    """
    end = tokenizer.token_to_id(END_OF_TEXT)
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    parts = []
    for start in range(0, len(documents), batch):
        for encoding in tokenizer.encode_batch_fast(
            documents[start : start + batch], add_special_tokens=False
        ):
            parts.append(np.array([*encoding.ids, end], dtype))
    return np.concatenate(parts)
