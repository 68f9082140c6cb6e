"""`orthrus train` as its users run it: from a corpus to measured heads, killed and resumed, on one process and on two."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from orthrus.cli import main
from orthrus.cli import train as train_command
from orthrus.engine import Engine
from orthrus.engine.config import EngineConfig
from orthrus.errors import ConfigError
from orthrus.measure.acceptance import AcceptanceProfile
from orthrus.models.families import family_of, load_config
from orthrus.requests.request import SamplingParams
from orthrus.training.data import read_shards
from orthrus.training.prompts import read_prompts
from orthrus.training.run import Run
from orthrus.training.settings import read_settings
from orthrus.training.stages import _STAGES
from orthrus.training.tokenizer import as_transformers, train_tokenizer
from tests.checkpoints import make_checkpoint
from tests.reference import Reference

SEPARATOR = "\0"
# As in this process: sums are split by threads.
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
SETTINGS: dict[str, Any] = {
    "corpus": "unused.yaml",
    "max_shard_bytes": 40_000,
    "model": {
        "vocab_size": 280,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    },
    "engine": {"kv_cache_tokens": 1024, "max_model_len": 64},
    "base": {"steps": 60, "rows": 8, "row_length": 32, "lr": 0.01, "compile": False, "eval_rows": 4},
    "data": {"texts": 10, "prompt_length": 6, "length": 48, "shard_texts": 7},
    "heads": {
        "epochs": 8,
        "block_size": 4,
        "rows": 4,
        "row_length": 32,
        "anchors": 8,
        "sampled": 0.5,
        "lr": 0.01,
        "compile": False,
        "log_every": 50,
        "save_every": 50,
    },
    "medusa": {
        "steps": 120,
        "num_heads": 3,
        "rows": 4,
        "row_length": 32,
        "sampled": 0.5,
        "lr": 0.01,
        "log_every": 50,
        "save_every": 50,
    },
    "eval": {"rows": 2, "row_length": 32, "texts": 3, "prompt_length": 6, "new_tokens": 24, "shown": 1},
}


def write_run(folder: Path, name: str = "run", **sections: Any) -> Path:
    """The YAML file of a run in `folder`, with settings changed section by section."""
    settings = {key: dict(value) if isinstance(value, dict) else value for key, value in SETTINGS.items()}
    for key, value in sections.items():
        if isinstance(value, dict) and isinstance(settings.get(key), dict):
            settings[key] |= value
        else:
            settings[key] = value
    file = folder / f"{name}.yaml"
    file.write_text(
        yaml.safe_dump({"work": str(folder / name), "out": str(folder / f"{name}-out")} | settings)
    )
    return file


def train(stage: str, config: Path, *options: str) -> None:
    assert main(["train", stage, str(config), *options]) == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML file of a run that has gone from its corpus to its heads."""
    folder = tmp_path_factory.mktemp("run")
    config = write_run(folder)
    corpus = folder / "run" / "corpus"
    corpus.mkdir(parents=True)
    document = "def add(a, b):\n    return a + b\n\n\ndef double(a):\n    return add(a, a)\n"
    (corpus / "train.txt").write_text(SEPARATOR.join([document] * 60))
    (corpus / "held_out.txt").write_text(SEPARATOR.join([document.replace("add", "plus")] * 10))
    for stage in ("tokenizer", "base", "data", "heads"):
        train(stage, config)
    return config


def out_of(config: Path) -> Path:
    return Path(yaml.safe_load(config.read_text())["out"])


def work_of(config: Path) -> Path:
    return Path(yaml.safe_load(config.read_text())["work"])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_a_run_ends_in_heads_that_draft_through_the_engine(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = work_of(run) / "profile.json"
    train("eval", run, "--profile", str(profile))
    report = json.loads((work_of(run) / "eval.json").read_text())
    rows = {(row["temperature"], row["block_rows"], row["lead"]): row for row in report["drafts"]}
    assert set(rows) == {(t, 4, lead) for t in (0.0, 0.7, 1.0) for lead in (True, False)}
    assert rows[0.0, 4, False]["tokens_per_cycle"] > 2.0
    assert rows[0.0, 4, True]["tokens_per_cycle"] > rows[0.0, 4, False]["tokens_per_cycle"]
    plain, behind_lead = (rows[0.0, 4, lead]["acceptance"] for lead in (False, True))
    assert len(plain) == 3
    assert behind_lead[0] == 1.0 > behind_lead[1] >= behind_lead[3] > 0
    assert 0 < report["held_out_loss"] < 5.5
    assert f"{rows[0.0, 4, True]['tokens_per_cycle']:.2f}" in capsys.readouterr().out
    # The profile's blocks begin and end where those of the engine do.
    acceptance = AcceptanceProfile.read(profile)
    assert acceptance.tokens_per_cycle(4) == pytest.approx(rows[0.0, 4, False]["tokens_per_cycle"], abs=0.4)
    assert all(0 < sum(depth) <= 1.001 for depth in acceptance.chances)
    train("plot", run)
    for name in ("base", "heads", "eval"):
        assert "<svg" in (work_of(run) / f"{name}.svg").read_text()
    # Every step is accounted for, and what it predicts is what the engine then found, roughly.
    last = json.loads((work_of(run) / "heads.jsonl").read_text().splitlines()[-1])
    assert {"kl", "agreement", "tokens_per_second", "peak_memory_gib", "tokens"} <= set(last)
    assert last["tokens_per_cycle_with_lead"] > last["tokens_per_cycle"] > 2.0


def test_the_base_is_in_the_result_byte_for_byte_and_its_tokenizer_too(run: Path) -> None:
    base, out = work_of(run) / "base", out_of(run)
    before, after = weights(base), weights(out)
    assert {name for name in after if name not in before} == {n for n in after if "_diff." in n}
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    assert len(list(out.glob("*.safetensors"))) > 1
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / file).read_bytes() == (base / file).read_bytes(), file


@pytest.mark.parametrize("own", [True, False], ids=["own projections", "shared"])
def test_medusa_heads_draft_behind_the_frozen_base(run: Path, tmp_path: Path, own: bool) -> None:
    work = work_of(run)
    base = work / "base"
    before = weights(base)
    config = write_run(tmp_path, base_model=str(base), medusa={"own_projections": own})
    (tmp_path / "run").mkdir()
    for folder in ("corpus", "data"):
        (tmp_path / "run" / folder).symlink_to(work / folder)
    train("medusa", config)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(base).items())
    assert len(weights(out_of(config))) == (6 if own else 3)
    settings = {"model": str(base), "adaptive_draft": False, "kv_cache_tokens": 256, "max_model_len": 64}
    prompt, params = [5, 6, 7, 8], SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)
    engine = Engine.from_pretrained(
        EngineConfig.model_validate(settings | {"schedule": "medusa", "medusa_heads": str(out_of(config))})
    )
    ar = Engine.from_pretrained(EngineConfig.model_validate(settings | {"schedule": "ar"}))
    assert engine.generate([prompt], params)[0][0].token_ids == ar.generate([prompt], params)[0][0].token_ids
    assert engine.stats.tokens_per_cycle > 1.8
    metrics = json.loads((tmp_path / "run" / "medusa.jsonl").read_text().splitlines()[-1])
    assert metrics["tokens_per_cycle"] > 1.8 and len(metrics["agreement"]) == 3
    assert metrics["agreement"] == sorted(metrics["agreement"], reverse=True)
    train("plot", config)
    assert "<svg" in (tmp_path / "run" / "medusa.svg").read_text()


@pytest.mark.parametrize(
    "shape", [{}, {"tie": False, "dtype": torch.bfloat16}, {"bias": True, "yarn": True, "heads": 8}]
)
def test_heads_for_any_qwen3_load_by_the_official_formats_rules(
    tmp_path: Path, shape: dict[str, Any]
) -> None:
    """An untied, a biased and a YaRN checkpoint with a foreign tokenizer that has no mask token."""
    base = make_checkpoint(tmp_path / "base", diffusion=False, vocab_size=300, hidden_size=32, **shape)
    before = weights(base)
    as_transformers(train_tokenizer(["some text to learn"] * 9, 273), 512).save_pretrained(base)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "some text"}\n{"prompt": "to learn"}\n')
    config = write_run(
        tmp_path,
        base_model=str(base),
        data={"prompts": str(tmp_path / "prompts.jsonl"), "temperatures": [1.0]},
        heads={"epochs": None, "steps": 3, "sampled": 1.0, "row_length": 24, "mask_token_id": 299},
        eval={"prompts": str(tmp_path / "prompts.jsonl")},
    )
    for stage in ("data", "heads", "eval"):
        train(stage, config)
    out = out_of(config)
    raw = json.loads((out / "config.json").read_text())
    assert (raw["architectures"], raw["block_size"], raw["mask_token_id"]) == (["OrthrusLM"], 4, 299)
    found = weights(out)
    assert {n: tuple(t.shape) for n, t in found.items()} == family_of(load_config(out)).tensor_shapes(
        load_config(out)
    )
    for name, tensor in found.items():
        assert tensor.dtype == shape.get("dtype", torch.float32)
        if "_diff." not in name:
            assert torch.equal(tensor, before[name]), name
    prompt = [1, 2, 3]
    text, cycles = Reference(out).decode(prompt, 12)
    engine = Engine.from_pretrained(
        EngineConfig(model=str(out), adaptive_draft=False, kv_cache_tokens=256, max_model_len=128)
    )
    ((completion,),) = engine.generate([prompt], SamplingParams(temperature=0.0, max_tokens=12))
    assert list(completion.token_ids) == text
    assert completion.stats.cycles == cycles


def test_a_base_without_mask_token_asks_for_one(run: Path, tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", diffusion=False, vocab_size=300)
    tokenizer = as_transformers(train_tokenizer(["some text to learn"] * 9, 273), 512)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(base)
    config = write_run(tmp_path, base_model=str(base))
    assert main(["train", "heads", str(config)]) == 2


CHILD = """
import os, signal, sys
from orthrus.cli import main
from orthrus.cli import train as train_command
from orthrus.training import data, progress

kind, count = sys.argv[1], int(sys.argv[2])
where, name = {"heads": (progress.State, "save"), "data": (data, "_write")}[kind]
original = getattr(where, name)

def save_and_die(*arguments):
    global count
    original(*arguments)
    count -= 1
    if not count:
        os.kill(os.getpid(), signal.SIGKILL)

setattr(where, name, save_and_die)
main(["train", kind, sys.argv[3]])
"""


@pytest.mark.parametrize("stage", ["data", "heads"])
def test_a_killed_stage_goes_on_to_the_same_bytes(run: Path, tmp_path: Path, stage: str) -> None:
    work = work_of(run)
    config = write_run(tmp_path, base_model=str(work / "base"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "corpus").symlink_to(work / "corpus")
    if stage == "heads":
        (tmp_path / "run" / "data").symlink_to(work / "data")
    command = [sys.executable, "-c", CHILD, stage, "2", str(config)]
    child = subprocess.run(command, env=ONE_THREAD, capture_output=True)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    if stage == "data":
        shards = sorted(file.name for file in (tmp_path / "run" / "data").glob("*.safetensors"))
        assert len(shards) == 2
        with pytest.raises(ConfigError, match="3 of 5 shards are missing"):
            read_shards(tmp_path / "run" / "data")
    train(stage, config)
    made, expected = (
        (tmp_path / "run" / "data", work / "data") if stage == "data" else (out_of(config), out_of(run))
    )
    names = sorted(file.name for file in expected.glob("*.safetensors"))
    assert sorted(file.name for file in made.glob("*.safetensors")) == names
    for name in names:
        assert (made / name).read_bytes() == (expected / name).read_bytes()


def test_two_processes_train_as_one_with_twice_the_passes(run: Path, tmp_path: Path) -> None:
    work = work_of(run)
    outs = []
    for name in ("one", "two"):
        config = write_run(
            tmp_path,
            name,
            base_model=str(work / "base"),
            # By steps with short gradients: what rounding does to Adam's first steps must not blow up.
            heads={
                "epochs": None,
                "steps": 4,
                "micro_batch": 1,
                "short_blocks": 0.5,
                "save_every": 100,
                "lr": 1e-3,
            },
        )
        (tmp_path / name).mkdir()
        for folder in ("corpus", "data"):
            (tmp_path / name / folder).symlink_to(work / folder)
        if name == "one":
            train("heads", config)
        else:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            done = subprocess.run(
                [*command, "-m", "orthrus.cli", "train", "heads", str(config)],
                env=ONE_THREAD,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            # One of them speaks, one of them writes.
            assert done.stdout.count("step 4") == 1
        outs.append(torch.load(tmp_path / name / "heads.pt", weights_only=True))
        metrics = (tmp_path / name / "heads.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in metrics] == [4]
    for name, tensor in outs[0]["parameters"].items():
        torch.testing.assert_close(tensor, outs[1]["parameters"][name], rtol=1e-4, atol=1e-6)


def test_prompts_are_texts_or_chats_and_a_bad_line_is_named(run: Path, tmp_path: Path) -> None:
    from orthrus.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(out_of(run))
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "def"}\n\n{"messages": [{"role": "user", "content": "add"}]}\n')
    plain, chat = read_prompts(file, tokenizer, {})
    assert tokenizer.decode(plain) == "def"
    assert tokenizer.decode(chat) == "<|im_start|>user\nadd<|im_end|>\n<|im_start|>assistant\n"
    for line in ('{"text": "x"}', '{"prompt": 3}', "[]", "{"):
        file.write_text('{"prompt": "x"}\n' + line)
        with pytest.raises(ConfigError, match="line 2: expected"):
            read_prompts(file, tokenizer, {})


def test_the_shipped_configs_are_valid_and_qwen3_8bs_has_the_papers_numbers() -> None:
    folder = Path(__file__).parents[2] / "configs" / "train"
    runs = {name: read_settings(Run, folder / f"{name}.yaml") for name in ("tiny", "tiny-heads", "qwen3-8b")}
    heads = runs["qwen3-8b"].heads
    assert heads is not None
    assert (heads.block_size, heads.anchors, heads.row_length, heads.rows) == (32, 256, 2048, 128)
    assert (heads.epochs, heads.lr, heads.betas, heads.optimizer) == (2, 2e-4, (0.9, 0.95), "adamw")
    assert (heads.warmup, heads.final_lr, heads.clip, heads.mask_token_id) == (0.05, 0.1, 1.0, 151669)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"engine": {"max_num_seq": 3}}, "max_num_seq"),
        ({"head": {}}, "head: Extra inputs"),
        ({"heads": {"anchor": 3}}, "heads.anchor: Extra inputs"),
        ({"base_model": "some/base", "out": "some/../some/base"}, "out: .* is the base model"),
        ({"work": "some", "out": "some/base"}, "out: .* is the base model"),
    ],
)
def test_a_wrong_section_is_named_before_anything_runs(
    tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings(Run, write_run(tmp_path, **sections))


def test_the_command_line_has_every_stage() -> None:
    """It has a list of its own, since `--help` must not import torch."""
    assert list(train_command.STAGES) == list(_STAGES)
