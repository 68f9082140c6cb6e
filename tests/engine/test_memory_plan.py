"""The memory plan, compared with what is allocated.

A plan counts weights (`weight_bytes`, `MedusaConfig.num_weights`) and what passes take (`PassMemory`). Here reality is the sizes
of tensors on a CPU: of what a rank reads of a checkpoint, of what a loaded model holds, and of what operations allocate while
passes of every schedule run (`live_bytes`). The vocabulary is large compared with everything else, as in served models. So if the
plan lacks a tensor that a schedule, drafter or pass makes for each token of the vocabulary, a test fails.

Two things differ on a GPU: noise is made inside kernels, and results of layers are measured as the engine starts.
"""

import json
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from orthrus.cluster.check import check_config
from orthrus.cluster.memory import MemoryPlan
from orthrus.engine import Engine, EngineConfig
from orthrus.engine.pass_limits import pass_room
from orthrus.engine.sizing import check_memory
from orthrus.errors import ConfigError
from orthrus.models.checkpoint import load_weights
from orthrus.models.families import load_config
from orthrus.models.medusa import load_medusa, save_medusa
from orthrus.models.medusa_config import MedusaConfig
from orthrus.models.shapes import QWEN3_SHAPES
from orthrus.models.shard import Shard
from orthrus.models.sizes import CopyBytes, weight_bytes
from orthrus.requests.request import SamplingParams
from orthrus.runner.pass_memory import ADJUSTED_ROWS, PassMemory
from orthrus.runner.pass_tensors import PassTensors
from orthrus.runner.sampler import PickRows, pick, runs
from orthrus.schedules.registry import SCHEDULES
from tests.checkpoints import make_checkpoint
from tests.conftest import ROOT
from tests.live_bytes import LiveBytes, live_bytes

VOCAB, HEADS = 8192, 6
EVERYTHING = SamplingParams(
    temperature=1.0,
    top_p=0.9,
    min_p=1e-6,
    repetition_penalty=1.1,
    frequency_penalty=0.1,
    logit_bias={7: 1.0},
    seed=1,
    max_tokens=6,
    ignore_eos=True,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a diffusion view and Medusa heads, small but for its vocabulary."""
    path = make_checkpoint(tmp_path_factory.mktemp("plan") / "model", vocab_size=VOCAB, layers=1, heads=2)
    medusa = MedusaConfig.of(load_config(path), HEADS, own_projections=False)
    save_medusa(path, medusa, {n: 0.1 * torch.randn(s) for n, s in medusa.tensor_shapes().items()})
    return path


def engine(path: Path, schedule: str, **settings: Any) -> Engine:
    fixed = {"model": str(path), "schedule": schedule, "adaptive_draft": False, "device": "cpu"}
    limits = {"max_num_seqs": 64, "max_model_len": 64, "kv_cache_tokens": 4096}
    return Engine.from_pretrained(EngineConfig.model_validate(fixed | limits | settings))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "own head"])
def test_a_rank_reads_as_much_as_its_plan_says(tmp_path: Path, tie: bool, size: int) -> None:
    """The LM head is divided by tokens, the embedding is whole on every rank."""
    path = make_checkpoint(
        tmp_path,
        tie=tie,
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=640,
        heads=8,
        kv_heads=4,
        head_dim=32,
    )
    model = replace(load_config(path), sum_leaves=4)
    for rank in range(size):
        shard = Shard(model, rank, size)
        read = sum(tensor.nbytes for tensor in load_weights(path, model, "cpu", shard=shard).values())
        assert read == weight_bytes(shard, 4)


def test_copies_and_12_bits_of_a_head_are_those_of_a_rank() -> None:
    """Of the 72B shape on four GPUs, each head has a quarter of the tokens."""
    model = replace(QWEN3_SHAPES["72B"], block_size=32, mask_token_id=1, sum_leaves=4)
    tied = replace(model, tie_word_embeddings=True)
    part = model.vocab_size * model.hidden_size / 4
    own, shared = Shard(model, 3, 4), Shard(tied, 3, 4)
    assert weight_bytes(own, 2) - weight_bytes(shared, 2) == pytest.approx(2 * part)
    copied = [weight_bytes(shard, 2, CopyBytes(1.0, 1.0)) - weight_bytes(shard, 2) for shard in (own, shared)]
    assert copied[0] == copied[1]
    packed = [weight_bytes(shard, 2, lossless=True) for shard in (own, shared)]
    assert packed == [pytest.approx(packed[1], rel=1e-6), packed[1]], (
        "a tied head is packed beside the embedding"
    )


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own projections"])
def test_medusa_heads_are_in_the_plan(checkpoint: Path, tmp_path: Path, own: bool) -> None:
    model = load_config(checkpoint)
    medusa = MedusaConfig.of(model, HEADS, own)
    save_medusa(tmp_path, medusa, {n: torch.zeros(s) for n, s in medusa.tensor_shapes().items()})
    tensors = load_medusa(tmp_path, model, "cpu", torch.float32)
    planned = MemoryPlan.of(
        EngineConfig(model=str(checkpoint), schedule="medusa", dtype="float32"), model, None, medusa
    )
    assert sum(tensor.nbytes for tensor in tensors.values()) == planned.medusa == 4 * medusa.num_weights
    forward = engine(checkpoint, "medusa", medusa_heads=str(tmp_path)).forward
    assert forward.num_medusa_weights == medusa.num_weights
    huge = replace(medusa, hidden_size=10**7)
    with pytest.raises(ConfigError, match="with 6 Medusa heads, and this machine has"):
        check_memory(EngineConfig(model="m"), Shard(model), torch.device("cpu"), torch.float32, huge)


def test_tensors_of_passes_are_in_the_plan(checkpoint: Path) -> None:
    """The tensors that the runner of GPUs allocates before the first pass, here on a CPU."""
    ours = engine(checkpoint, "ar")
    room = pass_room(ours.config, ours.model_config)
    made = PassTensors.allocate(ours.forward, room.logit_rows, 1000)
    planned = PassMemory.of(Shard(ours.model_config), room, 4, plans=made.plan_bytes)
    once = {id(tensor): tensor.nbytes for tensor in vars(made).values()}
    assert sum(once.values()) == planned.logits + planned.plans
    ours.forward.use_context(room.positions)
    assert ours.forward._cos.nbytes + ours.forward._sin.nbytes == planned.angles


def measured(run: Callable[[], object]) -> LiveBytes:
    with live_bytes() as live:
        run()
    return live


@pytest.mark.parametrize("rows", [1, 8, ADJUSTED_ROWS, 100])
def test_adjusting_takes_what_the_plan_says(rows: int) -> None:
    """For any number of rows. A group is adjusted as a whole."""
    logits = torch.randn(200, VOCAB)
    groups = [PickRows(EVERYTHING, 1, 5, rows, generated=[3]) for _ in range(200 // rows)]
    live = measured(lambda: pick(logits[: rows * len(groups)], groups))
    model = replace(QWEN3_SHAPES["8B"], vocab_size=VOCAB, block_size=max(2, rows), mask_token_id=1)
    planned = PassMemory.of(Shard(model), pass_room(EngineConfig(model="m"), model), 4).adjusting
    assert planned / 2.5 < live.most < planned
    places = [place for place, _ in runs(groups)]
    assert [place.start for place in places[1:]] == [place.stop for place in places[:-1]]
    assert sum(len(run) for _, run in runs(groups)) == len(groups)


@pytest.mark.parametrize(
    ("schedule", "settings"),
    [*((name, {}) for name in SCHEDULES), ("orthrus", {"draft_tree": 8, "max_num_seqs": 16})],
)
def test_passes_of_every_schedule_allocate_no_more_than_the_plan_says(
    checkpoint: Path, schedule: str, settings: dict[str, Any]
) -> None:
    """64 sequences that draft, with everything that a request may ask of its logits, and log-probabilities."""
    ours = engine(checkpoint, schedule, **settings)
    prompts = [[number % 100, 5, 6, 5, 6, 5] for number in range(ours.config.max_num_seqs)]
    scoring = replace(EVERYTHING, logprobs=3, prompt_logprobs=2)
    params = [replace(scoring if n % 2 else EVERYTHING, seed=n) for n in range(len(prompts))]
    rows: list[int] = []
    ours.observer = lambda record: rows.append(record.num_rows)
    live = measured(lambda: ours.generate(prompts, params))
    medusa_heads = ours.forward.num_medusa_heads
    planned = PassMemory.of(
        Shard(ours.model_config), pass_room(ours.config, ours.model_config), 4, medusa_heads=medusa_heads
    )
    assert medusa_heads == (HEADS if schedule == "medusa" else 0)
    assert max(rows) <= pass_room(ours.config, ours.model_config).logit_rows
    # The runner of CPUs has logits for the rows of the pass only, without padding.
    counted = max(rows) * VOCAB * 4 + planned.adjusting + planned.medusa
    assert live.most < counted
    # So the test would fail without the Medusa heads in the plan.
    assert schedule != "medusa" or live.most > counted - planned.medusa


def test_logits_of_medusa_heads_are_in_the_plan(checkpoint: Path) -> None:
    ours = engine(checkpoint, "medusa")
    hidden = torch.randn(ours.config.max_num_seqs, ours.model_config.hidden_size)
    live = measured(lambda: ours.forward.medusa_logits(hidden))
    room = pass_room(ours.config, ours.model_config)
    planned = PassMemory.of(Shard(ours.model_config), room, 4, medusa_heads=HEADS).medusa
    assert planned <= live.most < 1.1 * planned
    # A 16-bit model has them in 16 and in 32 bits at the same time.
    assert PassMemory.of(Shard(ours.model_config), room, 2, medusa_heads=HEADS).medusa == 1.5 * planned
    large = QWEN3_SHAPES["8B"]
    few, many = (
        PassMemory.of(
            Shard(large), pass_room(EngineConfig(model="m", max_num_seqs=256), large), 2, medusa_heads=n
        )
        for n in (0, 5)
    )
    assert many.total - few.total == 256 * 5 * large.vocab_size * 6
    assert sum(astuple(many)) == many.total


def test_config_check_counts_medusa_heads_and_passes(tmp_path: Path) -> None:
    """The 8B shape on an H100, with five heads that have vocabulary projections of their own: 2.9 GiB."""
    config = yaml.safe_load((ROOT / "configs" / "qwen3-8b-h100.yaml").read_text())
    model = QWEN3_SHAPES["8B"]
    medusa = MedusaConfig.of(model, 5, own_projections=True)
    heads = tmp_path / "heads"
    heads.mkdir()
    (heads / "medusa.json").write_text(json.dumps(vars(medusa)))
    settings = config["applications"][0]["args"]["engine"]
    plain = {"model": "Qwen/Qwen3-8B", "device": "cuda", "dtype": "bfloat16", "max_num_seqs": 256}
    file = tmp_path / "serve.yaml"

    def said(**more: Any) -> str:
        settings.clear()
        settings.update(plain | more)
        file.write_text(yaml.safe_dump(config))
        [line] = [
            line for line in check_config(file, ROOT / "ray_cluster.yaml") if line.startswith("  memory")
        ]
        return line

    plan = MemoryPlan.of(EngineConfig.model_validate(plain), model, "H100", medusa)
    assert f", {plan.medusa / (1 << 30):.1f} GiB for 5 Medusa heads" in said(
        schedule="medusa", medusa_heads=str(heads)
    )
    assert plan.medusa == 2 * 5 * (4096 * 4096 + 151936 * 4096)
    without = MemoryPlan.of(EngineConfig.model_validate(plain), model, "H100", None)
    assert plan.passes - without.passes == 256 * 5 * 151936 * 6
    assert f", {without.passes / (1 << 30):.1f} GiB for passes" in said(schedule="ar")
    assert plan.total - without.total == plan.medusa + 256 * 5 * 151936 * 6
