"""Medusa heads: the text is that of AR decoding, several tokens at a time, and never more slowly."""

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import starlette.routing
import torch
from safetensors.torch import load_file, save_file

from orthrus.engine import Engine, EngineConfig
from orthrus.engine.observer import PassRecord
from orthrus.errors import CheckpointError, ConfigError
from orthrus.kernels.rows.sampling import gumbel_noise, noise_keys
from orthrus.models.families import load_config
from orthrus.models.medusa import WEIGHTS_FILE, save_medusa
from orthrus.models.medusa_config import CONFIG_FILE, MedusaConfig
from orthrus.plan import num_right
from orthrus.requests.request import Completion, Request, SamplingParams, joined_chunks
from orthrus.runner.eager import EagerRunner
from orthrus.runner.head_picks import head_picks
from orthrus.runner.sampler import PickRows
from orthrus.schedules.ar import STEP
from orthrus.schedules.medusa import MEDUSA_STEP, MEDUSA_VERIFY, MedusaCost, MedusaSchedule
from orthrus.schedules.pass_cost import PassCost
from orthrus.schedules.planner import DraftPlanner
from orthrus.text.tokenizer import load_tokenizer
from tests.checkpoints import make_checkpoint

TINY = Path(__file__).parents[2] / "models" / "orthrus-tiny"
TOKENS = 48
GREEDY = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, seed=5, max_tokens=TOKENS, ignore_eos=True)
STEPS = PassCost((1, 2, 4, 8, 16), (1.0, 1.2, 1.5, 2.2, 3.6))
CHEAP = MedusaCost(STEPS, PassCost((2, 4, 8, 16, 32), (1.1, 1.15, 1.3, 1.6, 2.2)))
DEAR = MedusaCost(STEPS, PassCost((2, 4, 8, 16, 32), (7.0, 8.0, 9.0, 12.0, 20.0)))
"""With these, no draft ever pays."""


def add_heads(model: Path, folder: Path, heads: int = 3, own: bool = False) -> Path:
    """Random heads for the checkpoint `model`, in `folder`."""
    config = MedusaConfig.of(load_config(model), heads, own)
    generator = torch.Generator().manual_seed(1)
    shapes = config.tensor_shapes()
    save_medusa(folder, config, {n: 0.1 * torch.randn(s, generator=generator) for n, s in shapes.items()})
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its heads are beside it."""
    path = make_checkpoint(tmp_path_factory.mktemp("medusa") / "model", diffusion=False, vocab_size=64)
    return add_heads(path, path)


def engine(path: Path, schedule: str = "medusa", **settings: Any) -> Engine:
    fixed = {"model": str(path), "schedule": schedule, "adaptive_draft": False, "device": "cpu"}
    return Engine.from_pretrained(EngineConfig.model_validate(fixed | {"kv_cache_tokens": 4096} | settings))


def texts(results: list[list[Completion]]) -> list[tuple[Any, ...]]:
    return [(c.token_ids, c.logprobs, c.finish_reason) for choices in results for c in choices]


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(count)
    return [[rng.randrange(60) for _ in range(rng.randint(1, 40))] for _ in range(count)]


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own projections"])
@pytest.mark.parametrize("ahead", [False, True], ids=["waiting", "ahead"])
def test_the_text_is_that_of_ar_decoding(checkpoint: Path, tmp_path: Path, own: bool, ahead: bool) -> None:
    ours = engine(checkpoint, medusa_heads=str(add_heads(checkpoint, tmp_path, own=own)))
    ours.use_runner(EagerRunner(ours.forward, ours.cache, feeds_tokens=ahead))
    ar = engine(checkpoint, "ar")
    mixed = [
        replace(GREEDY, logprobs=2),
        SAMPLED,
        replace(SAMPLED, repetition_penalty=1.3, max_tokens=31),
        replace(GREEDY, schedule="ar"),
        replace(GREEDY, logit_bias={7: 6.0, 11: 6.0}, max_tokens=1),
    ]
    asked = prompts(len(mixed))
    assert texts(ours.generate(asked, mixed)) == texts(ar.generate(asked, mixed))
    assert ours.stats.tokens_per_cycle > 1.02


def test_heads_of_the_model_in_models_are_right_often() -> None:
    """On source that no training has seen."""
    tokens = load_tokenizer(TINY).encode(Path(starlette.routing.__file__).read_text(), verbose=False)
    asked = [tokens[at : at + 48] for at in range(0, 1200, 300)]
    ours, ar = engine(TINY), engine(TINY, "ar")
    for params, least in ((GREEDY, 1.3), (replace(SAMPLED, temperature=0.7), 1.2)):
        found = ours.generate(asked, params)
        assert texts(found) == texts(ar.generate(asked, params))
        stats = [completion.stats for [completion] in found]
        assert sum(s.completion_tokens - 1 for s in stats) / sum(s.cycles for s in stats) > least


def test_heads_read_the_row_behind_the_last_right_draft(checkpoint: Path) -> None:
    """Groups of different lengths, greedy and sampled, with all, some and no drafts right."""
    forward, generator = engine(checkpoint).forward, torch.Generator().manual_seed(2)
    picks = torch.randint(0, 60, (9,), generator=generator)
    hidden = torch.randn(9, forward.config.hidden_size, generator=generator)
    own = picks.tolist()
    sampled = SamplingParams(temperature=1.0, seed=1)
    groups = [
        PickRows(GREEDY, seed=0, position=5, count=3, draft_tokens=own[:2], heads=3),
        PickRows(GREEDY, seed=0, position=5, count=1),
        PickRows(sampled, seed=9, position=20, count=4, draft_tokens=[own[4], 61, own[6]], heads=3),
        PickRows(sampled, seed=9, position=30, count=1, heads=3),
    ]
    found = head_picks(forward, hidden, picks.int(), groups).view(3, 3).tolist()
    expected = []
    for first, group in ((0, groups[0]), (4, groups[2]), (8, groups[3])):
        right = num_right(group.draft_tokens, own[first : first + group.count])
        scores = forward.medusa_logits(hidden[None, first + right])[0]
        if not group.params.greedy:
            # The first head drafts for the position behind that of the row's own pick.
            positions = [group.position + right + 1 + head for head in range(3)]
            scores = scores + gumbel_noise(torch.from_numpy(noise_keys([9] * 3, positions)), scores.shape[1])
        expected.append(scores.argmax(-1).tolist())
    assert found == expected


def run(cost: MedusaCost, checkpoint: Path) -> tuple[Engine, Counter[str]]:
    """The kinds of turns of an engine that plans with the costs `cost`, whatever passes take."""
    ours = engine(checkpoint)
    ours.use_schedule(MedusaSchedule(DraftPlanner(4, cost, 512, lead=False), 3))
    kinds: Counter[str] = Counter()

    def observe(record: PassRecord) -> None:
        kinds.update(turn.turn.kind for turn in record.turns)

    ours.observer = observe
    asked = prompts(1)
    assert texts(ours.generate(asked, GREEDY)) == texts(engine(checkpoint, "ar").generate(asked, GREEDY))
    return ours, kinds


def test_where_no_draft_pays_heads_never_run(checkpoint: Path) -> None:
    ours, kinds = run(DEAR, checkpoint)
    assert kinds[STEP] == TOKENS - 1
    assert not kinds[MEDUSA_STEP] and not kinds[MEDUSA_VERIFY]
    assert ours.stats.tokens_per_cycle == 1


def test_where_drafts_may_pay_they_are_tried(checkpoint: Path) -> None:
    ours, kinds = run(CHEAP, checkpoint)
    assert kinds[MEDUSA_STEP] >= 1 and kinds[MEDUSA_VERIFY] >= 1
    assert ours.stats.tokens_per_cycle > 1.02


def test_passes_are_timed_with_heads(checkpoint: Path) -> None:
    timer = engine(checkpoint).schedule_context().timer
    cost = MedusaCost.measured(timer, 3)
    assert cost.ar(1, greedy=True) > 0 and cost.cycle(4, 1, greedy=False) > 0
    assert cost.cycle(4, 4, greedy=True) >= cost.cycle(2, 4, greedy=True)


def test_chunks_tell_what_heads_drafted(checkpoint: Path) -> None:
    ours = engine(checkpoint)
    ours.submit(Request("told", prompts(1)[0], replace(GREEDY, return_drafts=True)))
    chunks = []
    while ours.has_work:
        chunks += ours.step()
    cycles = joined_chunks(chunks).cycles
    assert sum(cycle.num_tokens for cycle in cycles) == TOKENS - 1
    assert any(cycle.drafts for cycle in cycles)


def test_heads_that_do_not_fit_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "plain", diffusion=False, vocab_size=64)
    with pytest.raises(ConfigError, match=r"has no Medusa heads .* train some"):
        engine(plain)
    with pytest.raises(ValueError, match="set schedule to medusa"):
        engine(checkpoint, "auto", medusa_heads=str(checkpoint))
    with pytest.raises(ValueError, match="set tensor_parallel_size to 1"):
        engine(checkpoint, tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="choose from 1 to 6"):
        MedusaConfig.of(load_config(checkpoint), 7, False)
    other = make_checkpoint(tmp_path / "other", diffusion=False, vocab_size=96)
    with pytest.raises(CheckpointError, match="were trained for this model"):
        engine(other, medusa_heads=str(checkpoint))
    folder = add_heads(checkpoint, tmp_path / "heads")
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    del tensors["medusa.1.linear.weight"]
    save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=r"medusa\.1\.linear\.weight: expected shape \[64, 64\]"):
        engine(checkpoint, medusa_heads=str(folder))
    for wrong in ({"medusa_num_heads": "5"}, {"own_projections": 1}, {"medusa_num_heads": True}):
        stored = {"medusa_num_heads": 2, "own_projections": False} | wrong
        (folder / CONFIG_FILE).write_text(json.dumps(stored))
        with pytest.raises(
            CheckpointError, match=f"lacks a valid '{next(iter(wrong))}': save the heads again"
        ):
            engine(checkpoint, medusa_heads=str(folder))
