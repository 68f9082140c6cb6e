"""Drafts with weights of their own: the text stays that of AR decoding, drafts stay good, and memory is counted."""

import random
import re
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orthrus.cache.page_pool import PagePool
from orthrus.cluster.memory import MemoryPlan
from orthrus.engine import Engine
from orthrus.engine.config import EngineConfig
from orthrus.engine.draft_weights import COPY_BYTES, auto_draft_format, copies_bytes, smallest_copies
from orthrus.engine.planned_turn import PREFILL
from orthrus.engine.scheduler import Scheduler
from orthrus.errors import ConfigError
from orthrus.models.families import family_of, load_config
from orthrus.models.shapes import QWEN3_SHAPES
from orthrus.models.shard import Shard
from orthrus.models.sizes import CopyBytes, weight_bytes
from orthrus.plan import RowGroup, View
from orthrus.requests.request import Chunk, Completion, Request, SamplingParams, joined_chunks
from orthrus.requests.sequence import SequenceState
from orthrus.runner.eager import EagerRunner
from orthrus.schedules.protocol import Turn
from tests.checkpoints import make_checkpoint
from tests.conftest import ROOT

MIXED = [
    SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=1.0, max_tokens=33, seed=1, ignore_eos=True),
    SamplingParams(temperature=0.7, max_tokens=24, seed=2, top_p=0.9, top_k=20),
    SamplingParams(temperature=0.0, max_tokens=1),
    SamplingParams(temperature=1.0, max_tokens=30, seed=3, repetition_penalty=1.2, logprobs=2),
    SamplingParams(temperature=0.0, max_tokens=17, logprobs=0, n=2),
]


def engine(path: Path, **settings: Any) -> Engine:
    fixed = {"model": str(path), "schedule": "orthrus", "adaptive_draft": False, "max_num_seqs": 16}
    return Engine.from_pretrained(EngineConfig.model_validate(fixed | {"draft_weights": "fp8"} | settings))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("drafts") / "model", noise=0.02)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(0)
    # The last one begins as the first one does.
    found = [[rng.randrange(120) for _ in range(rng.randint(1, 90))] for _ in MIXED[1:]]
    return [*found, [*found[0], 5]]


@pytest.fixture(scope="module")
def alone(checkpoint: Path, prompts: list[list[int]]) -> list[list[Completion]]:
    """Each request by itself under AR decoding."""
    ar = engine(checkpoint, schedule="ar", draft_weights="auto")
    return [ar.generate([prompt], params)[0] for prompt, params in zip(prompts, MIXED, strict=True)]


def watch_views(ours: Engine) -> list[int]:
    """Counts passes with AR rows and passes with diffusion rows. A pass with both fails."""
    counts, launch = [0, 0], ours.runner.launch

    def checked(groups: list[RowGroup], rows: Any) -> Any:
        [view] = {group.view for group in groups}
        counts[view is View.DIFFUSION] += 1
        return launch(groups, rows)

    ours.runner.launch = checked  # type: ignore[method-assign, assignment]
    return counts


@pytest.mark.parametrize("ahead", [False, True], ids=["waited for", "launched ahead"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"adaptive_draft": True}, {"kv_cache_tokens": 256, "page_size": 8, "prefill_chunk": 40}],
    ids=str,
)
def test_requests_that_come_and_go_have_the_text_of_ar_decoding(
    checkpoint: Path,
    prompts: list[list[int]],
    alone: list[list[Completion]],
    settings: dict[str, Any],
    ahead: bool,
) -> None:
    ours = engine(checkpoint, **settings)
    if ahead:
        ours.use_runner(EagerRunner(ours.forward, ours.cache, feeds_tokens=True))
    counts = watch_views(ours)
    chunks: dict[tuple[str, int], list[Chunk]] = defaultdict(list)

    def step() -> None:
        for chunk in ours.step():
            chunks[chunk.request_id, chunk.index].append(chunk)

    order = [*range(len(prompts))] * 2
    for number, index in enumerate(order):
        ours.submit(Request(str(number), prompts[index], MIXED[index]))
        ours.submit(Request(f"cancelled {number}", prompts[index][::-1], MIXED[0]))
        for _ in range(3):
            step()
        # Its turn may be in flight, may wait for a pass, or may not have been planned.
        ours.cancel(f"cancelled {number}")
    while ours.has_work:
        step()
    for number, index in enumerate(order):
        for expected in alone[index]:
            got = joined_chunks(chunks[str(number), expected.index])
            assert (got.token_ids, got.logprobs) == (expected.token_ids, expected.logprobs)
    assert ours.stats.kv_pages_used == 0 and ours.stats.prefix_hit_tokens > 0
    if "kv_cache_tokens" in settings:
        assert ours.stats.preemptions > 0
    if not settings.get("adaptive_draft"):
        assert min(counts) > 20
        assert ours.stats.tokens_per_cycle > 1.3, "the drafts are never right"


@pytest.mark.parametrize("format", ["int4", "fp8+int4"])
def test_drafts_in_4_bits_give_the_text_of_ar_decoding(
    tmp_path: Path, prompts: list[list[int]], format: str
) -> None:
    path = make_checkpoint(tmp_path, hidden_size=128, intermediate_size=256, heads=8, noise=0.02)
    ar, ours = engine(path, schedule="ar", draft_weights="auto"), engine(path, draft_weights=format)
    counts = watch_views(ours)
    for prompt, params in zip(prompts, MIXED, strict=True):
        [expected], [got] = ar.generate([prompt], params), ours.generate([prompt], params)
        for one, other in zip(expected, got, strict=True):
            assert (other.token_ids, other.logprobs) == (one.token_ids, one.logprobs)
    assert ours.forward.draft_format == format and min(counts) > 20
    assert ours.stats.tokens_per_cycle > 1.3, "the drafts are never right"


def test_rough_drafts_are_nearly_as_good_as_drafts_by_the_same_weights() -> None:
    path = ROOT / "models" / "orthrus-tiny"
    beginnings = (
        "def main():\n",
        "import os\n\ndef load_config(path):\n",
        "class Stack:\n    def __init__(self):\n",
        "import argparse\n\n",
        "@dataclass\nclass Point:\n",
        "with open(path) as f:\n",
    )
    params = [SamplingParams(temperature=t, max_tokens=64, seed=1, ignore_eos=True) for t in (0.0, 0.7)]
    overall, by_temperature = [], []
    for drafts in ("same", "fp8", "int4"):
        ours = engine(path, draft_weights=drafts, device="cpu", kv_cache_tokens=4096)
        texts = [ours.tokenizer.encode(text) for text in beginnings]
        found, committed, cycles = [], 0, 0
        for one in params:
            ours.generate(texts, one)
            found.append((ours.stats.committed - committed) / (ours.stats.cycles - cycles))
            committed, cycles = ours.stats.committed, ours.stats.cycles
        overall.append(committed / cycles)
        by_temperature.append(found)
    same, fp8, _ = overall
    assert same > 2.5
    assert fp8 >= 0.97 * same
    for exact, _, int4 in zip(*by_temperature, strict=True):
        print(f"drafts in 4 bits: {int4:.2f} tokens per cycle, drafts in full: {exact:.2f}")
        assert int4 >= 0.95 * exact


class _DraftsAndSteps:
    """Sequences whose priority is odd draft and verify; the others take AR steps."""

    max_groups, max_rows, max_logits = 1, 4, 4

    def plan(self, sequence: SequenceState, batch: int) -> Turn:
        n, table = sequence.newest_position, sequence.block_table
        if sequence.priority % 2 and sequence.schedule_state is None:
            return Turn("draft", (RowGroup(View.DIFFUSION, [1] * 4, n, table, 0, 3),), (True,))
        return Turn("exact", (RowGroup(View.AR, [1], n, table, 0, 1),), (False,))


def test_after_a_pass_of_drafts_comes_a_pass_of_what_waited() -> None:
    ours = Scheduler(
        _DraftsAndSteps(),  # type: ignore[arg-type]
        PagePool(33),
        page_size=4,
        max_num_seqs=4,
        prefill_chunk=8,
        decode_rows=64,
        score_rows=8,
        mixes_views=False,
    )
    for name, priority in (("steps", 0), ("drafts", 1)):
        ours.add(SequenceState(name, 0, SamplingParams(), 0, [0], 1, 99, frozenset(), priority=priority))
    found: list[list[tuple[str, str]]] = []
    for number in range(7):
        if number == 1:
            ours.add(SequenceState("late", 0, SamplingParams(), 0, [0], 1, 99, frozenset(), priority=2))
        planned = ours.plan()
        for part in planned:
            part.sequence.schedule_state = True if part.turn.kind == "draft" else None
            if part.turn.kind != "draft":
                ours.mark_computed(part.sequence, 1)
                part.sequence.append(1)
        found.append([(part.sequence.request_id, part.turn.kind) for part in planned])
    both = [("steps", PREFILL), ("drafts", PREFILL)]
    drafts, exact = [("drafts", "draft")], [("steps", "exact"), ("drafts", "exact")]
    late = [*exact, ("late", PREFILL)]
    assert found == [both, drafts, late, drafts, [*exact, ("late", "exact")], drafts, found[4]]
    assert ours.row_use == 3 / 4


@pytest.mark.parametrize(("format", "mlps"), [("fp8", 1), ("int4", 1), ("fp8+int4", 2)])
def test_the_memory_of_copies_is_counted(tmp_path: Path, format: str, mlps: int) -> None:
    """All numbers of a float32 checkpoint on a CPU take four bytes, in copies too."""
    path = make_checkpoint(tmp_path, hidden_size=128, intermediate_size=256, heads=8)
    config = load_config(path)
    forward = engine(path, draft_weights=format).forward
    assert forward.draft is not None and config.tie_word_embeddings
    norms = 4 * sum(shape[0] for shape in family_of(config).tensor_shapes(config).values() if len(shape) == 1)
    assert forward.exact.nbytes + forward.draft.nbytes + norms == weight_bytes(
        Shard(config), 4, CopyBytes(4 * mlps, 4)
    )


def test_int4_copies_of_mlps_take_little_more_than_half_of_fp8_copies() -> None:
    model = replace(QWEN3_SHAPES["8B"], block_size=32, mask_token_id=151669)
    replaced = weight_bytes(Shard(model), 2) - weight_bytes(Shard(model), 2, CopyBytes(0, 0))
    mlps = 3 * model.num_hidden_layers * model.hidden_size * model.intermediate_size
    others = replaced + copies_bytes(Shard(model), 2, "fp8") - 1.001 * mlps
    found = {name: copies_bytes(Shard(model), 2, name) + replaced - others for name in COPY_BYTES}
    assert 0.56 < found["int4"] / found["fp8"] < 0.57
    assert found["fp8+int4"] == pytest.approx(found["fp8"] + found["int4"])
    config = EngineConfig(model="m", max_model_len=4096, draft_weights="int4")
    plan = MemoryPlan.of(config, model, "H100", None)
    same = MemoryPlan.of(config.model_copy(update={"draft_weights": "same"}), model, "H100", None)
    assert "int4 copies for drafts" in plan.kept_as
    assert plan.weights - same.weights == copies_bytes(Shard(model), 2, "int4")


@pytest.mark.parametrize("copies", ["fp8", "fp8+int4", "int4"])
def test_copies_need_a_gpu_with_fp8_tensor_cores_and_4_bits_a_hopper_gpu(copies: str) -> None:
    model = replace(QWEN3_SHAPES["8B"], block_size=32, mask_token_id=151669)
    config = EngineConfig.model_validate({"model": "m", "max_model_len": 4096, "draft_weights": copies})
    with pytest.raises(
        ConfigError, match=rf"'{re.escape(copies)}' needs a GPU with FP8 tensor cores.* auto or same"
    ):
        MemoryPlan.of(config, model, "A100-80G", None)
    assert f"{copies} copies" in MemoryPlan.of(config, model, "H100", None).kept_as
    for kind in ("L40S", "B200"):
        if copies == "fp8":
            assert "fp8 copies" in MemoryPlan.of(config, model, kind, None).kept_as
            continue
        with pytest.raises(ConfigError, match=r"needs a Hopper GPU.* auto or fp8"):
            MemoryPlan.of(config, model, kind, None)
    assert "two views" in MemoryPlan.of(EngineConfig(model="m"), model, "A100-80G", None).kept_as


def test_int4_copies_need_whole_groups_of_inputs_on_every_rank(checkpoint: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"has 64 inputs, .* multiple of 128: set draft_weights to fp8 or same"
    ):
        engine(checkpoint, draft_weights="int4")
    shared = replace(load_config(ROOT / "models" / "orthrus-tiny"), sum_leaves=2)
    config = EngineConfig(model="m", draft_weights="int4", tensor_parallel_size=2)
    with pytest.raises(ConfigError, match=r"inputs on rank \d of 2, .*: set draft_weights"):
        MemoryPlan.of(config, shared, "H100", None)
    auto = config.model_copy(update={"draft_weights": "auto", "kv_cache_tokens": 2048})
    assert "fp8 copies" in MemoryPlan.of(auto, shared, "H100", None).kept_as


def test_auto_takes_copies_where_the_cache_keeps_three_quarters_of_its_size() -> None:
    model = replace(QWEN3_SHAPES["8B"], block_size=32, mask_token_id=151669)
    extra, both = (copies_bytes(Shard(model), 2, format) for format in ("fp8", "fp8+int4"))
    assert 4.5e9 < extra < 4.6e9, "7.6 GB of copies, less 3.0 GB of projections that they replace"
    assert 3.0e9 < both - extra < 3.1e9
    config = EngineConfig(model="m", max_model_len=4096)

    def choice(memory: float, gpu: tuple[int, int] = (9, 0), **settings: Any) -> str | None:
        return auto_draft_format(config.model_copy(update=settings), Shard(model), 2, memory, gpu)

    assert choice(4.1 * both) == "fp8+int4"
    assert choice(4.1 * both, (8, 9)) == choice(3.9 * both) == choice(4.1 * extra) == "fp8"
    assert choice(3.9 * extra) == "int4"
    assert choice(3.9 * extra, (8, 9)) is choice(1.9 * extra) is None
    assert choice(1.3 * extra, (8, 9), kv_cache_tokens=8192) == "fp8"
    assert choice(1.1 * extra, (8, 9), kv_cache_tokens=8192) is None
    for other in ({"draft_weights": "same"}, {"schedule": "ar"}, {"draft_lead": True}):
        assert choice(100 * extra, **other) is None


def test_all_ranks_take_the_copies_that_the_one_with_least_memory_takes() -> None:
    auto = EngineConfig(model="m")
    choices = [None, "int4", "fp8", "fp8+int4"]
    for other, least in enumerate(choices):
        taken = [smallest_copies(auto, own, partial(min, other)) for own in choices]
        assert taken == [*choices[:other], *[least] * (len(choices) - other)]
    fixed = EngineConfig(model="m", draft_weights="fp8")
    assert smallest_copies(fixed, "fp8", partial(min, 0)) == "fp8"
    assert smallest_copies(auto, "lossless8", partial(min, 0)) == "lossless8"


def test_a_lead_needs_the_same_weights() -> None:
    with pytest.raises(ValueError, match="set draft_weights to same"):
        EngineConfig(model="m", draft_lead=True, draft_weights="fp8")
    with pytest.raises(ValueError, match="draft_weights has no meaning with schedule 'ar'"):
        EngineConfig(model="m", schedule="ar", draft_weights="fp8")
