"""Zero drift on a GPU, bit for bit, for every format of weights: four layers with random weights at Qwen3-8B's widths.

The reference is AR decoding in batches of 1 to 64 requests. AR decoding with another prefill chunk and another order of requests
is compared with it. So is Orthrus with replayed drafts in other batches. Drafts have weights of their own or share those of the
AR rows. They are chains or trees. The cache is too small for all requests, and prefixes are found in it. For weights in 12 bits,
the reference has weights in 16 bits. For a model that several GPUs share, the reference runs on one GPU.
"""

import gc
import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from orthrus.engine import Engine
from orthrus.kernels.device import has_fp8_mma, has_warpgroup_mma
from orthrus.measure.acceptance import AcceptanceProfile
from orthrus.measure.drift import Check, Result, find_drifts, summarize
from orthrus.measure.random_model import shape_config, shape_engine
from orthrus.measure.replay import replaying
from orthrus.measure.verify import run
from orthrus.models.quantization import read_quantization
from orthrus.requests.request import Request, SamplingParams
from tests.quantised import FP8, GPTQ

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
MODEL = replace(shape_config("8B"), num_hidden_layers=4)
LONGEST = 1024
AUTO, IN_4_BITS = ("fp8+int4", (("int4", 0),)) if has_warpgroup_mma() else ("fp8", ())
"""What `draft_weights: auto` chooses on this GPU, and runs with drafts in 4 bits, which need a Hopper GPU."""
SIZES = (1, 2, 5, 16, 40, 64)


@dataclass(frozen=True)
class Format:
    """A format of the weights, and what is compared."""

    drafts: tuple[tuple[str, int], ...]
    """For each run of Orthrus: `draft_weights` and `draft_tree`."""
    drafted_in: dict[str, str | None]
    """The weight format of the drafts for each of these `draft_weights`; None if they share the weights of the AR rows."""
    weights: str = "bf16"
    """The setting `weights` of the runs that are compared with the reference."""
    stored: dict[str, Any] | None = None
    """The `quantization_config` of a model that is stored quantised, for the reference too."""
    gpus: int = 1
    """How many GPUs share the model in the runs that are compared with the reference."""
    with_logprobs: int = 25_000
    """Number of tokens to compare with their logprobs."""
    launched_ahead: int = 170_000
    """Number of tokens to compare without logprobs. Then a pass is launched before the picks of the previous one are read."""


def published(settings: dict[str, Any]) -> Format:
    """A format in which checkpoints are published."""
    if "group_size" in settings:
        settings = settings | {"group_size": 128}
    # The diffusion view is not quantised, and a kernel takes only one format. So drafts have layers of their own.
    return Format(
        drafts=(("auto", 0), ("auto", 24)),
        drafted_in={"auto": "plain"},
        weights="auto",
        stored=settings,
        launched_ahead=70_000,
    )


FORMATS = {
    "bf16": Format(
        (("auto", 0), ("same", 0), ("auto", 24), ("fp8", 0), *IN_4_BITS),
        {"auto": AUTO, "same": None, "fp8": "fp8", "int4": "int4"},
    ),
    "lossless12": Format((("auto", 0), ("auto", 24)), {"auto": "lossless8"}, "lossless12"),
    "fp8": published(FP8),
    "gptq": published(GPTQ),
} | {
    f"{gpus} GPUs": Format((("auto", 0), ("auto", 24)), {"auto": AUTO}, gpus=gpus)
    for gpus in (2, 4, 8)
    if gpus <= torch.cuda.device_count()
}


def requests(ahead: bool) -> Iterator[Request]:
    """Prompts of 1 to 850 tokens, many with a prefix that others have; greedy and T = 1, filtered and not, some with logprobs."""
    rng = random.Random(f"bits {ahead}")
    prefixes = [[rng.randrange(100_000) for _ in range(rng.choice((64, 200, 448)))] for _ in range(8)]
    for index in itertools.count():
        prompt = [rng.randrange(100_000) for _ in range(rng.choice((1, 30, 150, 400)))]
        filtered = rng.random() < 0.3
        params = SamplingParams(
            temperature=float(index % 2),
            top_k=20 if filtered else 0,
            top_p=0.9 if filtered else 1.0,
            seed=index,
            max_tokens=rng.choice((20, 60, 160, 500)),
            ignore_eos=True,
            logprobs=None if ahead else 1,
        )
        yield Request(str(index), rng.choice(prefixes) + prompt if rng.random() < 0.5 else prompt, params)


def limits(seed: int) -> Iterator[int]:
    """How many requests to keep in flight. Each number lasts for some time, so that there are batches of every size."""
    rng = random.Random(seed)
    while True:
        for size in rng.sample(SIZES, len(SIZES)):
            # About as many passes with each size: a batch of 64 ends 64 requests in the time in which a batch of 1 ends one.
            yield from [size] * (size + 4)


def engine(schedule: str, format: Format = FORMATS["bf16"], **settings: Any) -> Engine:
    stored = None if format.stored is None else read_quantization({"quantization_config": format.stored})
    model = replace(MODEL, quantization=stored)
    if schedule == "ar":
        model = replace(model, block_size=None, mask_token_id=None)
    fixed = {"max_num_seqs": 64, "max_model_len": LONGEST, "kv_cache_tokens": 64 * LONGEST}
    if format.gpus > 1:
        fixed["sum_leaves"] = format.gpus
    return shape_engine(model, schedule, DEVICE, DTYPE, **(fixed | settings))


def free_memory() -> None:
    """End the ranks of engines that are no longer used, and free the memory of the GPUs."""
    gc.collect()
    torch.cuda.empty_cache()


def same_text(
    name: str, tested: Engine, order: list[Request], seed: int, expected: dict[str, Result]
) -> Check:
    """Run the requests in this order, compare their results bit for bit, and print the counts."""
    started = time.perf_counter()
    got = run(tested, order, limits(seed))
    check = summarize(name, tested, got, expected, time.perf_counter() - started)
    print(
        f"{name}: {check.tokens} tokens of {check.requests} requests compared, {check.drifted_tokens} differ, "
        f"{check.drifted_logprobs} logprobs differ; {check.tokens_per_cycle:.2f} tokens per cycle, {check.preemptions} "
        f"preemptions, {check.prefix_hit_tokens} prefix hit tokens, {check.seconds:.1f} s",
        flush=True,
    )
    drifts = find_drifts(name, got, expected)
    assert not drifts, drifts[:5]
    assert check.prefix_hit_tokens > 0
    return check


@pytest.mark.parametrize("ahead", [False, True], ids=["with logprobs", "launched ahead"])
@pytest.mark.parametrize("kept", FORMATS)
def test_no_bit_differs(kept: str, ahead: bool) -> None:
    if (kept in ("fp8", "lossless12") or FORMATS[kept].gpus > 1) and not has_fp8_mma():
        pytest.skip("this GPU does not multiply FP8")
    format = FORMATS[kept]
    reference = engine("ar", format, prefill_chunk=2048)
    asked: list[Request] = []
    expected: dict[str, Result] = {}
    source, tokens = requests(ahead), 0
    while tokens < (format.launched_ahead if ahead else format.with_logprobs):
        some = list(itertools.islice(source, sum(size + 4 for size in SIZES)))
        expected |= run(reference, some, limits(len(asked)))
        asked += some
        tokens = sum(len(result.token_ids) for result in expected.values())
    assert all(
        len(result.logprobs) == (0 if ahead else len(result.token_ids)) for result in expected.values()
    )
    del reference
    free_memory()

    compared = {"weights": format.weights, "tensor_parallel_size": format.gpus}
    name = f"{kept}, {'launched ahead' if ahead else 'with logprobs'}"
    other = engine("ar", format, **compared, prefill_chunk=128, kv_cache_tokens=4 * LONGEST)
    found = same_text(f"{name}, ar", other, random.Random(1).sample(asked, len(asked)), 1, expected)
    assert found.preemptions > 0
    del other
    free_memory()

    # The right token is often the second best draft, so that trees are useful.
    ranks = AcceptanceProfile(((0.7, 0.15, 0.05),), "constant").scaled(4.0, 32)
    # Of all runs together: trees alone may have none, because sequences that draft end sooner.
    preemptions = 0
    for drafts, tree in format.drafts:
        orthrus = engine(
            "orthrus",
            format,
            **compared,
            prefill_chunk=512,
            kv_cache_tokens=8 * LONGEST,
            draft_weights=drafts,
            draft_tree=tree,
        )
        assert orthrus.forward.draft_format == format.drafted_in[drafts]
        schedule = replaying(orthrus, ranks)
        for request in asked:
            schedule.learn(request.prompt, request.params, expected[request.request_id].token_ids)
        order = random.Random(2).sample(asked, len(asked))
        label = f"{name}, orthrus, {drafts} drafts, {f'trees of {tree}' if tree else 'chains'}"
        found = same_text(label, orthrus, order, 2, expected)
        assert found.tokens_per_cycle > 2.5
        preemptions += found.preemptions
        del orthrus, schedule
        free_memory()
    assert preemptions > 0
