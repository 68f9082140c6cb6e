"""The contestants of `orthrus bench shape` decode the same prompts in turn, round after round."""

import gc
import statistics
import time
from collections.abc import Sequence

from orthrus.engine import Engine
from orthrus.measure.acceptance import AcceptanceProfile
from orthrus.measure.contest import Contestant, Output, Progress, engine_contestant, ratio
from orthrus.measure.hugging_face import COMPILED
from orthrus.measure.replay import ReplaySchedule, replaying
from orthrus.measure.shape_report import Speed
from orthrus.requests.request import SamplingParams
from orthrus.schedules.ar import ARSchedule
from orthrus.schedules.protocol import Schedule


def our_contestants(
    engine: Engine, profiles: Sequence[tuple[str, Sequence[AcceptanceProfile]]], fixed_rows: Sequence[int]
) -> list[Contestant]:
    """The contestant `ar`, and for each entry of `profiles` Orthrus with planned blocks, and with blocks of each of `fixed_rows`.

    profiles: names, each with the acceptance profiles that texts get in turn.
    """
    replayed: dict[str, ReplaySchedule] = {}
    for name, acceptance in profiles:
        replayed[f"orthrus at {name}"] = replaying(engine, *acceptance, adaptive=True)
        for rows in fixed_rows:
            replayed[f"{rows} rows at {name}"] = replaying(engine, *acceptance, block_rows=rows)
    ar = recorded(scheduled("ar", engine, ARSchedule()), list(replayed.values()))
    return [ar, *(scheduled(name, engine, schedule) for name, schedule in replayed.items())]


def race(
    contestants: Sequence[Contestant],
    ours: Sequence[str],
    prompts: list[list[int]],
    new_tokens: int,
    rounds: int,
    progress: Progress,
) -> tuple[list[Speed], bool]:
    """The speed of each contestant, and whether all of `ours` gave the tokens of `ar`, the first contestant.

    Only decoding is timed, and only until the first text ends: after that the batch is smaller. Tokens per cycle are those of
    whole texts. new_tokens: at least 2, since the first one comes from the prompt.
    """
    seconds: dict[str, list[float]] = {c.name: [] for c in contestants}
    outputs: dict[str, Output] = {}
    for contestant in contestants:
        contestant.run(prompts, new_tokens)  # Compiles, records the AR texts, and lets the planner learn.
    gc.collect()
    gc.freeze()  # As a replica does. Here this also covers what Hugging Face's compiler has left.
    for number in range(rounds):
        for contestant in contestants:
            own, outputs[contestant.name] = _seconds_per_token(contestant, prompts, new_tokens)
            seconds[contestant.name].append(own)
        progress(f"batch {len(prompts)}: round {number + 1} of {rounds}")
    speeds = [
        Speed(
            contestant=name,
            batch=len(prompts),
            tokens_per_second=1 / statistics.median(own),
            over_ar=ratio(own, seconds["ar"]),
            over_compiled=ratio(own, seconds[COMPILED]) if COMPILED in seconds else None,
            tokens_per_cycle=outputs[name].tokens_per_cycle,
        )
        for name, own in seconds.items()
    ]
    for speed in speeds:  # Shown at once, in case a long run is interrupted.
        progress(
            f"batch {speed.batch}: {speed.contestant} {speed.tokens_per_second:.1f} tok/s, {speed.over_ar} ar"
        )
    return speeds, all(outputs[name].token_ids == outputs["ar"].token_ids for name in ours)


def scheduled(name: str, engine: Engine, schedule: Schedule) -> Contestant:
    """The engine with `schedule`. All such contestants share its weights and cache."""
    contestant = engine_contestant(engine)

    def run(prompts: list[list[int]], new_tokens: int) -> Output:
        engine.use_schedule(schedule)
        return contestant.run(prompts, new_tokens)

    return Contestant(name, run)


def recorded(contestant: Contestant, schedules: Sequence[ReplaySchedule]) -> Contestant:
    """The AR contestant, whose texts all `schedules` learn, to replay drafts from them."""

    def run(prompts: list[list[int]], new_tokens: int) -> Output:
        output = contestant.run(prompts, new_tokens)
        for prompt, tokens in zip(prompts, output.token_ids, strict=True):
            for schedule in schedules:
                schedule.learn(prompt, SamplingParams(temperature=0.0), tokens)
        return output

    return Contestant(contestant.name, run)


def _seconds_per_token(
    contestant: Contestant, prompts: list[list[int]], new_tokens: int
) -> tuple[float, Output]:
    """Seconds of decoding for each token of all texts, and the output.

    Of contestants that don't tell when texts are decoded together, whole runs are timed, and the time of the prompts is
    subtracted. They return token ids as Python numbers, so the GPU has finished by then.
    """
    begin = time.perf_counter()
    output = contestant.run(prompts, new_tokens)
    whole = time.perf_counter() - begin
    if (together := output.together) is not None:
        return together.seconds / together.tokens, output
    begin = time.perf_counter()
    contestant.run(prompts, 1)
    prompt_seconds = time.perf_counter() - begin
    return (whole - prompt_seconds) / (len(prompts) * (new_tokens - 1)), output
