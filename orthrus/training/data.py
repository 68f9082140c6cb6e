"""Self-distillation data: the model's own answers to prompts, made by the engine and stored in shards.

An answer is a function of model, prompt, sampling parameters and seed, and a request's seed follows from its number. So a shard
has the same bytes whichever process makes it. A run that was stopped goes on with the missing shards, and several processes
(torchrun) share the shards without communication.
"""

import json
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from orthrus.engine import Engine
from orthrus.errors import ConfigError
from orthrus.requests.request import Request, SamplingParams
from orthrus.training.progress import check_origin
from orthrus.training.settings import Settings

_ORIGIN = "origin.json"


class DataSettings(Settings):
    """Settings of `orthrus train data`. Every prompt is answered at every temperature.

    An answer to a prompt from a file ends at the model's end-of-sequence token. An answer to a prompt from the corpus goes on
    past the end of a document, as the corpus does.
    """

    # A JSONL file (see `read_prompts`). None: prompts from the corpus.
    prompts: Path | None = None
    # Further arguments of the chat template.
    template_arguments: dict[str, Any] = Field(default_factory=dict)
    # Prompts to take from the corpus, and tokens of each.
    texts: int = 4096
    prompt_length: int = 64
    # Tokens of a text, prompt included. Longer prompts are left out.
    length: int = 1024
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    # Texts in a shard, which is one file.
    shard_texts: int = 1024
    seed: int = 0


def generate(
    make_engine: Callable[[], Engine],
    prompts: Sequence[Sequence[int]],
    settings: DataSettings,
    folder: Path,
    origin: dict[str, Any],
    *,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Write the shards that `folder` lacks. `read_shards` reads them.

    origin: what the answers depend on besides the settings. rank, world: this process makes every `world`-th shard, from the
    `rank`-th on. Raises ConfigError if `folder` was begun with other settings or another origin.
    """
    prompts = [p for p in prompts if len(p) < settings.length]
    temperatures = settings.temperatures
    numbers = range(len(prompts) * len(temperatures))
    shards = [numbers[i : i + settings.shard_texts] for i in range(0, len(numbers), settings.shard_texts)]
    if not shards:
        raise ConfigError(f"every prompt has {settings.length} tokens or more: raise length")
    # The answers depend on the contents of a prompt file, which `origin` has, and not on its path.
    _claim(folder, origin | settings.model_dump(mode="json", exclude={"prompts"}) | {"shards": len(shards)})
    missing = {i: shards[i] for i in range(rank, len(shards), world) if not _file(folder, i).exists()}
    if not missing:
        return

    def request(number: int) -> Request:
        prompt, temperature = divmod(number, len(temperatures))
        params = SamplingParams(
            temperature=temperatures[temperature],
            seed=settings.seed + number,
            max_tokens=settings.length - len(prompts[prompt]),
            ignore_eos=settings.prompts is None,
        )
        return Request(str(number), prompts[prompt], params)

    _write_shards(make_engine(), request, missing, folder, len(shards))


def _write_shards(
    engine: Engine, request: Callable[[int], Request], shards: dict[int, range], folder: Path, count: int
) -> None:
    """Answer the requests of `shards` and write each shard when its last answer is in.

    request: makes the request with a given number. shards: by number, the numbers of each shard's requests. count: shards in all.
    """
    shard_of = {number: shard for shard, numbers in shards.items() for number in numbers}
    todo = deque(shards)
    answers: dict[int, list[int]] = {}
    left: dict[int, int] = {}
    bar = tqdm(total=len(shard_of), desc="data", unit="text", disable=None)
    start, written = time.monotonic(), 0
    while todo or left:
        # The next shard starts before the last answers of this one are finished, so that the batch stays full.
        while todo and engine.stats.waiting == 0:
            shard = todo.popleft()
            left[shard] = len(shards[shard])
            for number in shards[shard]:
                answers[number] = []
                engine.submit(request(number))
        for chunk in engine.step():
            number = int(chunk.request_id)
            answers[number].extend(chunk.token_ids)
            if chunk.finish_reason is None:
                continue
            bar.update()
            shard = shard_of[number]
            left[shard] -= 1
            if left[shard]:
                continue
            del left[shard]
            texts = [(request(n).prompt, answers.pop(n)) for n in shards[shard]]
            _write(_file(folder, shard), texts)
            written += sum(len(answer) for _, answer in texts)
            speed = written / (time.monotonic() - start)
            line = f"shard {shard + 1} of {count}, {speed:.0f} tokens/s, {engine.stats.tokens_per_cycle:.2f} per cycle"
            if bar.disable:
                print(line, flush=True)
            else:
                bar.set_postfix_str(line)
    bar.close()


def read_shards(folder: Path) -> np.ndarray:
    """The texts of all shards, concatenated: int32 [tokens]. Raises ConfigError if there are none or some are missing.

    A shard is a safetensors file. `tokens` holds its texts, concatenated; `lengths` and `prompt_lengths` hold their tokens.
    """
    if not (folder / _ORIGIN).exists():
        raise ConfigError(f"{folder} has no texts: run `orthrus train data` first")
    count = texts_origin(folder)["shards"]
    files = [_file(folder, i) for i in range(count)]
    missing = [f.name for f in files if not f.exists()]
    if missing:
        raise ConfigError(
            f"{len(missing)} of {count} shards are missing in {folder} ({missing[0]} is the first): "
            "run `orthrus train data` again, it goes on with them"
        )
    return np.concatenate([load_file(f)["tokens"] for f in files])


def texts_origin(folder: Path) -> dict[str, Any]:
    """What the texts in `folder` were made from: settings, model and prompts."""
    origin: dict[str, Any] = json.loads((folder / _ORIGIN).read_text(encoding="utf-8"))
    return origin


def _file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05}.safetensors"


def _claim(folder: Path, origin: dict[str, Any]) -> None:
    """Record in `folder` what its shards depend on. If it is recorded already, check that it is the same."""
    folder.mkdir(parents=True, exist_ok=True)
    file, text = folder / _ORIGIN, json.dumps(origin, indent=1) + "\n"
    if file.exists():
        check_origin(folder, texts_origin(folder), json.loads(text))
        return
    temporary = folder / f"{_ORIGIN}.{os.getpid()}"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def _write(file: Path, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
    tensors = {
        "tokens": np.concatenate([np.array([*prompt, *answer], np.int32) for prompt, answer in texts]),
        "lengths": np.array([len(prompt) + len(answer) for prompt, answer in texts], np.int32),
        "prompt_lengths": np.array([len(prompt) for prompt, _ in texts], np.int32),
    }
    temporary = file.with_name(f"{file.name}.tmp")
    save_file(tensors, temporary)
    temporary.replace(file)
