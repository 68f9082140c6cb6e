"""`orthrus train`: corpus, tokenizer, base, data, heads, eval, each driven by one YAML file."""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from orthrus.checkpoint import load_weights, save_checkpoint
from orthrus.config import ModelConfig
from orthrus.errors import ConfigError
from orthrus.training import corpus as corpora
from orthrus.training.base import BaseConfig, held_out_loss, train_base
from orthrus.training.batches import TokenRows, TokenStream
from orthrus.training.data import DataConfig, generate
from orthrus.training.eval import EvalConfig, evaluate
from orthrus.training.heads import HeadsConfig, train_heads
from orthrus.training.model import TwoViewModel, add_diffusion_view, initialise
from orthrus.training.settings import read_yaml, section
from orthrus.training.tokenizer import (
    END_OF_TEXT,
    IM_END,
    MASK,
    as_transformers,
    encode,
    read_documents,
    train_tokenizer,
)

SHARD_BYTES = 15_000_000


@dataclass(frozen=True)
class Run:
    """A run's YAML file: where things lie, and the sections of its stages."""

    file: Path
    settings: dict[str, Any]

    @property
    def work(self) -> Path:
        """Everything that is not the result: corpus, tokens, states, metrics."""
        return Path(self.settings["work"])

    @property
    def out(self) -> Path:
        return Path(self.settings["out"])

    def section(self, kind: type, name: str) -> Any:
        return section(kind, self.settings.get(name) or {}, f"{self.file}: {name}")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `train` and its stages to the `orthrus` command."""
    parser = commands.add_parser("train", help="train diffusion heads for a frozen Qwen3")
    stages = parser.add_subparsers(title="stages", metavar="STAGE", required=True)
    for name, run, text in (
        ("corpus", _corpus, "fetch the packages and write the corpus"),
        ("tokenizer", _tokenizer, "train the tokenizer on the corpus"),
        ("base", _base, "pre-train the base model"),
        ("data", _data, "let the model write its own training texts"),
        ("heads", _heads, "train the diffusion view of a frozen model"),
        ("eval", _eval, "held-out loss, agreement by depth, tokens per cycle"),
    ):
        stage = stages.add_parser(name, help=text)
        stage.add_argument("config", type=Path, help="the run's YAML file, such as configs/train/tiny.yaml")
        stage.add_argument("--work", type=Path, help="instead of the file's `work`")
        stage.add_argument("--out", type=Path, help="instead of the file's `out`")
        stage.set_defaults(run=run)


def _load(arguments: argparse.Namespace) -> Run:
    settings = read_yaml(arguments.config)
    for key in ("work", "out"):
        if getattr(arguments, key) is not None:
            settings[key] = str(getattr(arguments, key))
    return Run(arguments.config, settings)


def _device() -> torch.device:
    # Master weights stay float32; where a product of them is outside autocast, tensor cores may round it.
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _corpus(arguments: argparse.Namespace) -> None:
    run = _load(arguments)
    file = Path(run.settings["corpus"])
    config = section(corpora.CorpusConfig, read_yaml(file), str(file))
    print(json.dumps(corpora.build(config, run.work / "corpus", run.work / "archives")))


def _tokenizer(arguments: argparse.Namespace) -> None:
    run = _load(arguments)
    documents = read_documents(run.work / "corpus" / corpora.TRAIN_FILE)
    tokenizer = train_tokenizer(documents, run.settings["model"]["vocab_size"])
    run.work.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(run.work / "tokenizer.json"))


def _streams(run: Run, tokenizer: Tokenizer, device: torch.device) -> tuple[TokenStream, TokenStream]:
    """The training and held-out parts of the corpus as tokens, encoded once."""
    streams = []
    for name in (corpora.TRAIN_FILE, corpora.HELD_OUT_FILE):
        cached = run.work / f"{name}.npy"
        if not cached.exists():
            np.save(cached, encode(tokenizer, read_documents(run.work / "corpus" / name)))
        streams.append(TokenStream.from_numpy(np.load(cached), device))
    print(f"tokens: {len(streams[0].tokens)} to train on, {len(streams[1].tokens)} held out", flush=True)
    return streams[0], streams[1]


def _special(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token. Raises ConfigError where the tokenizer lacks it."""
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise ConfigError(f"the tokenizer has no {token}: train one with `orthrus train tokenizer`")
    return int(token_id)


def _base(arguments: argparse.Namespace) -> None:
    run, device = _load(arguments), _device()
    tokenizer = Tokenizer.from_file(str(run.work / "tokenizer.json"))
    end, turn = _special(tokenizer, END_OF_TEXT), _special(tokenizer, IM_END)
    config = ModelConfig(**run.settings["model"], eos_token_ids=(turn, end), pad_token_id=end)
    train, held_out = _streams(run, tokenizer, device)
    model = TwoViewModel(config)
    base: BaseConfig = run.section(BaseConfig, "base")
    initialise(model, base.seed)
    train_base(model.to(device), train, held_out, base, run.work)
    _save(run, model, tokenizer, run.work / "base")


def _data(arguments: argparse.Namespace) -> None:
    run, device = _load(arguments), _device()
    model = load_model(run.work / "base", device)
    train, _ = _streams(run, Tokenizer.from_file(str(run.work / "tokenizer.json")), device)
    np.save(run.work / "samples.npy", generate(model, train, run.section(DataConfig, "data")).numpy())


def _heads(arguments: argparse.Namespace) -> None:
    run, device = _load(arguments), _device()
    heads: HeadsConfig = run.section(HeadsConfig, "heads")
    tokenizer = Tokenizer.from_file(str(run.work / "tokenizer.json"))
    model = add_diffusion_view(
        load_model(run.work / "base", device), heads.block_size, _special(tokenizer, MASK)
    )
    samples = TokenRows(torch.from_numpy(np.load(run.work / "samples.npy")).to(device))
    train, _ = _streams(run, tokenizer, device)
    train_heads(model, [(1 - heads.sampled, train), (heads.sampled, samples)], heads, run.work)
    _save(run, model, tokenizer, run.out)


def _eval(arguments: argparse.Namespace) -> None:
    run, device = _load(arguments), _device()
    config: EvalConfig = run.section(EvalConfig, "eval")
    model = load_model(run.out, device)
    tokenizer = Tokenizer.from_file(str(run.work / "tokenizer.json"))
    _, held_out = _streams(run, tokenizer, device)
    report: dict[str, Any] = {"held_out_loss": held_out_loss(model, held_out, config.rows, config.row_length)}
    print(report, flush=True)
    prompts = held_out.even_rows(config.prompts, config.prompt_length)
    for temperature in config.temperatures:
        reports, texts = evaluate(
            model,
            prompts,
            new_tokens=config.new_tokens,
            temperature=temperature,
            block_rows=list(config.block_rows),
        )
        report[f"temperature {temperature:g}"] = [asdict(r) for r in reports]
        print(*reports, sep="\n", flush=True)
        report[f"texts {temperature:g}"] = [
            tokenizer.decode(t, skip_special_tokens=False) for t in texts[: config.shown].tolist()
        ]
    (run.work / "eval.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _save(run: Run, model: TwoViewModel, tokenizer: Tokenizer, folder: Path) -> None:
    dtype = torch.bfloat16
    save_checkpoint(
        folder,
        replace(model.config, dtype="bfloat16"),
        model.checkpoint_tensors(dtype),
        tokenizer=as_transformers(tokenizer, model.config.max_position_embeddings),
        max_shard_bytes=SHARD_BYTES,
    )


def load_model(folder: Path, device: torch.device) -> TwoViewModel:
    """A checkpoint as a trainable model in float32."""
    config = ModelConfig.from_dir(folder)
    model = TwoViewModel(config)
    missing = model.load_state_dict(load_weights(folder, config, "cpu", torch.float32), strict=False)
    assert not missing.unexpected_keys, missing
    return model.to(device)
