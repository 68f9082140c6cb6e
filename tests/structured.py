"""Structured answers of the small model, for `make test-structured` and the tests."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jsonschema
import torch

from orthrus.engine import Engine
from orthrus.engine.config import EngineConfig
from orthrus.requests.request import SamplingParams
from orthrus.text.grammar import json_grammar
from tests.schemas import SCHEMAS

PROMPTS = (
    "# The data as JSON:\n",
    "config = ",
    "Return the person as JSON.\n",
    '"""An example record."""\n',
    "def load(path):\n",
)
MAX_TOKENS = 400


@dataclass(frozen=True)
class Answer:
    schema: str
    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    cycles: int


def engine(schedule: Literal["ar", "orthrus"]) -> Engine:
    """The served model. It always drafts: on a busy machine, the cost model might choose not to."""
    config = EngineConfig(
        model=str(Path(__file__).resolve().parent.parent / "models" / "orthrus-tiny"),
        schedule=schedule,
        device="cpu",
        max_num_seqs=32,
        kv_cache_tokens=32 * 640,
        draft_length=6 if schedule == "orthrus" else None,
        adaptive_draft=False,
    )
    return Engine.from_pretrained(config)


def answers(of: Engine, asked: Sequence[tuple[str, int]]) -> list[Answer]:
    """An answer at temperature 1 for each name of a schema and seed."""
    prompts = [of.tokenizer.encode(PROMPTS[seed % len(PROMPTS)]) for _, seed in asked]
    params = [
        SamplingParams(temperature=1.0, seed=seed, max_tokens=MAX_TOKENS, grammar=json_grammar(SCHEMAS[name]))
        for name, seed in asked
    ]
    return [
        Answer(
            name,
            of.tokenizer.decode(choice.token_ids, skip_special_tokens=True),
            choice.token_ids,
            choice.finish_reason,
            choice.stats.cycles,
        )
        for (name, _), [choice] in zip(asked, of.generate(prompts, params), strict=True)
    ]


def both_schedules(asked: Sequence[tuple[str, int]]) -> tuple[list[Answer], list[Answer]]:
    """The answers by plain decoding and with drafts, in a process of one thread."""
    torch.set_num_threads(1)
    return answers(engine("ar"), asked), answers(engine("orthrus"), asked)


def check(plain: Sequence[Answer], drafted: Sequence[Answer]) -> None:
    """Equal texts, and those that ended are strict JSON and valid."""
    for one, other in zip(plain, drafted, strict=True):
        assert (one.tokens, one.finish_reason) == (other.tokens, other.finish_reason), one.schema
        if one.finish_reason == "stop":
            schema = SCHEMAS[one.schema]
            value = strict_json(one.text)
            jsonschema.validate(value, schema, cls=jsonschema.validators.validator_for(schema))
        else:
            assert one.finish_reason == "length", one.schema


def tokens_per_cycle(drafted: Sequence[Answer]) -> float:
    return sum(len(a.tokens) - 1 for a in drafted) / max(1, sum(a.cycles for a in drafted))


def strict_json(text: str) -> Any:
    """JSON as RFC 8259 recommends it: keys come once, texts are Unicode, and numbers are finite."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len({key for key, _ in pairs}) == len(pairs), pairs
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    value = json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    return value
