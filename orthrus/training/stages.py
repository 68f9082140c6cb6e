"""The stages of a training run: corpus, tokenizer, base, data, heads, medusa, eval, plot. Each takes the whole `Run`."""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from orthrus.engine import Engine
from orthrus.engine.pass_limits import DECODE_ROWS
from orthrus.errors import ConfigError
from orthrus.models.checkpoint import load_weights, save_checkpoint
from orthrus.models.config import ModelConfig
from orthrus.models.families import family_of, load_config
from orthrus.models.files import copy_tokenizer
from orthrus.models.medusa import save_medusa
from orthrus.models.medusa_config import MedusaConfig
from orthrus.requests.request import SamplingParams
from orthrus.text.tokenizer import load_tokenizer
from orthrus.training import corpus as corpora
from orthrus.training.base import train_base
from orthrus.training.batches import TokenStream
from orthrus.training.data import generate, read_shards, texts_origin
from orthrus.training.distributed import Processes, connected, local_device, rank_and_world
from orthrus.training.eval import EvalSettings, held_out_loss, measure_drafts, table
from orthrus.training.heads import train_heads
from orthrus.training.medusa import train_medusa
from orthrus.training.model import TwoViewModel, initialise, load_ar_view, load_frozen
from orthrus.training.plot import plot
from orthrus.training.profile import measure_profile
from orthrus.training.prompts import digest
from orthrus.training.run import Run, fingerprint, needed
from orthrus.training.settings import FrozenBaseSettings, read_settings
from orthrus.training.tokenizer import (
    END_OF_TEXT,
    IM_END,
    as_transformers,
    read_documents,
    train_tokenizer,
)


def _corpus(run: Run) -> None:
    if run.corpus is None:
        raise ConfigError("corpus is not set: name the YAML file that lists its packages")
    settings = read_settings(corpora.CorpusSettings, run.corpus)
    print(json.dumps(corpora.build(settings, run.work / "corpus", run.work / "archives")))


def _tokenizer(run: Run) -> None:
    documents = read_documents(run.work / "corpus" / corpora.TRAIN_FILE)
    tokenizer = train_tokenizer(documents, needed(run.model, "model")["vocab_size"])
    tokenizer.save(str(run.work / "tokenizer.json"))


def _special(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token. Raises ConfigError if the tokenizer lacks it."""
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise ConfigError(f"the tokenizer has no {token}: train one with `orthrus train tokenizer`")
    return token_id


def _base(run: Run) -> None:
    settings, shape, device = needed(run.base, "base"), needed(run.model, "model"), local_device()
    tokenizer = Tokenizer.from_file(str(run.work / "tokenizer.json"))
    end, turn = (_special(tokenizer, token) for token in (END_OF_TEXT, IM_END))
    config = ModelConfig(**shape, eos_token_ids=(turn, end), pad_token_id=end, dtype="bfloat16")
    with connected(device) as processes:
        train, held_out = (
            run.corpus_tokens(part, tokenizer, processes)
            for part in (corpora.TRAIN_FILE, corpora.HELD_OUT_FILE)
        )
        model = TwoViewModel(config)
        initialise(model, settings.seed)
        train_base(model.to(device), train, held_out, settings, run.work, processes)
        if processes.writes:
            save_checkpoint(
                run.work / "base",
                config,
                {
                    name: model.state_dict()[name].bfloat16()
                    for name in family_of(config).tensor_shapes(config)
                },
                tokenizer=as_transformers(tokenizer, config.max_position_embeddings),
                max_shard_bytes=run.max_shard_bytes,
            )


def _data(run: Run) -> None:
    folder, device = run.base_folder(), local_device()
    tokenizer = load_tokenizer(folder)
    prompts = run.data_prompts(tokenizer)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    rank, world = rank_and_world()
    generate(
        lambda: Engine.from_pretrained(run.engine_config(folder, device=str(device))),
        prompts,
        run.data,
        run.work / "data",
        {"model": fingerprint(folder), "prompts": digest(prompts)},
        rank=rank,
        world=world,
    )


def _heads(run: Run) -> None:
    settings, folder, device = needed(run.heads, "heads"), run.base_folder(), local_device()
    tokenizer = load_tokenizer(folder)
    mask = settings.mask_token_id if settings.mask_token_id is not None else tokenizer.mask_token_id
    if mask is None:
        raise ConfigError(
            "the tokenizer has no mask token: set heads.mask_token_id to an id that no text has (Qwen3: 151669)"
        )
    with connected(device) as processes:
        model = load_frozen(folder, settings.block_size, mask, device)
        sources, steps_per_epoch = _sources(run, settings, tokenizer, processes)
        train_heads(
            model,
            sources,
            settings,
            run.work,
            processes,
            steps_per_epoch=steps_per_epoch,
            origin={"base": fingerprint(folder), "data": texts_origin(run.work / "data")},
        )
        if processes.writes:
            _save_heads(run, model, folder)


def _sources(
    run: Run, settings: FrozenBaseSettings, tokenizer: Any, processes: Processes
) -> tuple[list[tuple[int, TokenStream]], float]:
    """The streams that heads are trained on, each with its rows in a step. Also the steps of one pass over the answers."""
    answers = TokenStream(read_shards(run.work / "data"), "the model's own answers")
    of_answers = round(settings.sampled * settings.rows)
    sources = [(of_answers, answers)]
    if of_answers < settings.rows:
        corpus = run.corpus_tokens(corpora.TRAIN_FILE, tokenizer.backend_tokenizer, processes)
        sources.append((settings.rows - of_answers, corpus))
    return sources, answers.per_epoch(settings.row_length) / max(1, of_answers)


def _medusa(run: Run) -> None:
    settings, folder, device = needed(run.medusa, "medusa"), run.base_folder(), local_device()
    base = load_config(folder)
    config = MedusaConfig.of(base, settings.num_heads, settings.own_projections)
    with connected(device) as processes:
        sources, steps_per_epoch = _sources(run, settings, load_tokenizer(folder), processes)
        heads = train_medusa(
            load_ar_view(folder, device),
            config,
            sources,
            settings,
            run.work,
            processes,
            steps_per_epoch=steps_per_epoch,
            origin={"base": fingerprint(folder), "data": texts_origin(run.work / "data")},
        )
        if processes.writes:
            dtype = getattr(torch, base.dtype)
            save_medusa(run.out, config, {name: head.detach().to(dtype) for name, head in heads.items()})


def _save_heads(run: Run, model: TwoViewModel, base: Path) -> None:
    """Write the base's tensors, the trained ones in its dtype, and its tokenizer.

    The base is read again, so that its tensors have their original bytes.
    """
    stored = load_config(base)
    tensors = load_weights(base, stored, "cpu", stored.dtype)
    dtype = tensors[family_of(stored).last_norm].dtype
    tensors |= {name: p.detach().to("cpu", dtype) for name, p in model.diffusion_parameters().items()}
    config = replace(stored, block_size=model.config.block_size, mask_token_id=model.config.mask_token_id)
    save_checkpoint(run.out, config, tensors, max_shard_bytes=run.max_shard_bytes)
    copy_tokenizer(base, run.out)


def _eval(run: Run) -> None:
    settings = run.eval
    config = load_config(run.out)
    if config.block_size is None:
        raise ConfigError(f"{run.out} has no diffusion view: run `orthrus train heads` first")
    prompts, rows = run.eval_texts(load_tokenizer(run.out))
    report: dict[str, object] = {"model": str(run.out), "block_size": config.block_size}
    lengths = sorted({length for length in settings.block_rows if length <= config.block_size})
    if not lengths:
        raise ConfigError(
            f"eval.block_rows has no length up to the checkpoint's {config.block_size}: add one"
        )
    engine_config = run.engine_config(run.out, schedule="orthrus", adaptive_draft=False)
    # With more sequences at a time, blocks and their leads would not fit a pass at their full length.
    most = min(engine_config.max_num_seqs, DECODE_ROWS // (lengths[-1] + 1))
    engine = Engine.from_pretrained(engine_config.model_copy(update={"max_num_seqs": most}))
    report["held_out_loss"] = held_out_loss(engine, rows)
    drafts = []
    for temperature, lead, length in itertools.product(settings.temperatures, settings.leads, lengths):
        values, texts = measure_drafts(
            engine, prompts, settings, block_rows=length, lead=lead, temperature=temperature
        )
        drafts.append(values)
        report[f"texts at {temperature:g}"] = [
            engine.tokenizer.decode(text, skip_special_tokens=False) for text in texts[: settings.shown]
        ]
        print(
            f"temperature {temperature:g}, block {length}{' with a lead' if lead else ''}: "
            f"{values['tokens_per_cycle']} per cycle",
            flush=True,
        )
    report["drafts"] = drafts
    if settings.profile is not None:
        _write_profile(engine, prompts, settings, settings.profile)
    (run.work / "eval.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))


def _write_profile(
    engine: Engine, prompts: Sequence[Sequence[int]], settings: EvalSettings, file: Path
) -> None:
    """Measure an acceptance profile on greedy texts, and write it."""
    params = SamplingParams(
        temperature=0.0, max_tokens=settings.new_tokens, ignore_eos=settings.prompts is None
    )
    texts = [completion.token_ids for [completion] in engine.generate(prompts, params)]
    source = f"{engine.model_config.name}, {len(prompts)} greedy texts"
    measure_profile(engine, prompts, texts, source).write(file)
    print(f"acceptance profile: {file}")


def _plot(run: Run) -> None:
    for file in plot(run.work):
        print(file)


_STAGES: dict[str, Callable[[Run], None]] = {
    "corpus": _corpus,
    "tokenizer": _tokenizer,
    "base": _base,
    "data": _data,
    "heads": _heads,
    "medusa": _medusa,
    "eval": _eval,
    "plot": _plot,
}
_DISTRIBUTED = ("base", "data", "heads", "medusa")


def run_stage(name: str, run: Run) -> None:
    """Run the stage `name` with what the stages before it have left in `run.work`.

    Raises ConfigError if the run lacks a setting or an earlier stage's result, and under torchrun for a stage that runs in one
    process only.
    """
    if rank_and_world()[1] > 1 and name not in _DISTRIBUTED:
        raise ConfigError(
            f"only the stages {', '.join(_DISTRIBUTED)} run under torchrun: run {name} without it"
        )
    # Master weights stay float32. Products of them outside autocast may use tensor cores, which round them.
    torch.set_float32_matmul_precision("high")
    _STAGES[name](run)
