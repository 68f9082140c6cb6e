"""A training run: its YAML file, and the files in which a stage leaves its results for later stages."""

import hashlib
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import Field, model_validator
from tokenizers import Tokenizer

from orthrus.engine.config import EngineConfig
from orthrus.errors import ConfigError
from orthrus.models.checkpoint import DEFAULT_SHARD_BYTES
from orthrus.models.hub import resolve
from orthrus.models.medusa import WEIGHTS_FILE
from orthrus.training.base import BaseSettings
from orthrus.training.batches import TokenStream
from orthrus.training.corpus import HELD_OUT_FILE, TRAIN_FILE
from orthrus.training.data import DataSettings
from orthrus.training.distributed import Processes
from orthrus.training.eval import EvalSettings
from orthrus.training.heads import HeadsSettings
from orthrus.training.medusa import MedusaSettings
from orthrus.training.prompts import read_prompts
from orthrus.training.settings import Settings
from orthrus.training.tokenizer import encode, read_documents

Section = TypeVar("Section")


class Run(Settings):
    """The whole YAML file."""

    # Folder for everything but the result: tokens, texts, states, metrics.
    work: Path
    # Folder for the result: the checkpoint with its heads.
    out: Path
    # The checkpoint that gets heads, a directory or hub id. None: the one that the stages corpus, tokenizer and base make.
    base_model: str | None = None
    # Most bytes of weights in one file of the result.
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    # A file with `CorpusSettings`.
    corpus: Path | None = None
    # The shape of the base model that is made here, as fields of `ModelConfig`.
    model: dict[str, Any] | None = None
    # Fields of `EngineConfig`, for the stages data and eval.
    engine: dict[str, Any] = Field(default_factory=dict)
    base: BaseSettings | None = None
    data: DataSettings = DataSettings()
    heads: HeadsSettings | None = None
    medusa: MedusaSettings | None = None
    eval: EvalSettings = EvalSettings()

    @model_validator(mode="after")
    def _engine_settings(self) -> "Run":
        self.engine_config(self.base_model or "")
        return self

    @model_validator(mode="after")
    def _out_is_new(self) -> "Run":
        if Path(self.base_model or self.work / "base").resolve() == self.out.resolve():
            raise ValueError(f"out: {self.out} is the base model, which stays as it is: set another folder")
        return self

    def engine_config(self, model: Path | str, **settings: Any) -> EngineConfig:
        """The engine's settings for `model`. Those of the file override `settings`."""
        return EngineConfig(model=str(model), **(settings | self.engine))

    def base_folder(self) -> Path:
        """The directory of the frozen model. Raises ConfigError if there is none yet."""
        if self.base_model is not None:
            return resolve(self.base_model)
        folder = self.work / "base"
        if not folder.is_dir():
            raise ConfigError(f"{folder} is missing: set base_model, or run `orthrus train base` first")
        return folder

    def corpus_tokens(self, part: str, tokenizer: Tokenizer, processes: Processes) -> TokenStream:
        """A part of the corpus as tokens. part: `TRAIN_FILE` or `HELD_OUT_FILE`. It is encoded once and kept in a file."""
        if self.corpus is None:
            raise ConfigError("there is no corpus: set corpus, or prompts in sections data and eval")
        version = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:12]
        file = self.work / f"{part}.{version}.npy"
        with processes.one_by_one():
            if not file.exists():
                tokens = encode(tokenizer, read_documents(self.work / "corpus" / part))
                temporary = file.with_suffix(".tmp.npy")
                np.save(temporary, tokens)
                temporary.replace(file)
        return TokenStream(np.load(file), f"the corpus ({part})")

    def data_prompts(self, tokenizer: Any) -> list[list[int]]:
        """Prompts for self-distillation as token ids. tokenizer: the Hugging Face one."""
        data = self.data
        if data.prompts is not None:
            return read_prompts(data.prompts, tokenizer, data.template_arguments)
        train = self.corpus_tokens(TRAIN_FILE, tokenizer.backend_tokenizer, Processes())
        rows: list[list[int]] = train.rows(0, data.texts, data.prompt_length, data.seed + 1).tolist()
        return rows

    def eval_texts(self, tokenizer: Any) -> tuple[list[list[int]], list[list[int]]]:
        """Held-out prompts, and held-out rows for the loss, as token ids."""
        settings = self.eval
        if settings.prompts is not None:
            prompts = read_prompts(settings.prompts, tokenizer, settings.template_arguments)
            rows = [row[: settings.row_length] for row in prompts if len(row) > 1]
            prompts = [prompt for prompt in prompts if len(prompt) <= settings.row_length]
            return prompts[: settings.texts], rows[: settings.rows]
        held_out = self.corpus_tokens(HELD_OUT_FILE, tokenizer.backend_tokenizer, Processes())
        return (
            held_out.even_rows(settings.texts, settings.prompt_length).tolist(),
            held_out.even_rows(settings.rows, settings.row_length).tolist(),
        )


def needed(section: Section | None, name: str) -> Section:
    """The section, which the stage needs. Raises ConfigError if the file lacks it."""
    if section is None:
        raise ConfigError(f"the file has no section {name}: add one, see configs/train/")
    return section


def fingerprint(folder: Path) -> str:
    """SHA-256 of a checkpoint's weights, without the Medusa heads in its folder."""
    digest = hashlib.sha256()
    for file in sorted(set(folder.glob("*.safetensors")) - {folder / WEIGHTS_FILE}):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
