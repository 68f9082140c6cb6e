"""`orthrus compare` on the model in models/: which methods change the output, and how much."""

import json
import math
import shutil
from pathlib import Path

import pytest
import starlette.websockets

from orthrus.errors import ConfigError
from orthrus.measure.compare import METHODS, CompareOptions, compare
from orthrus.measure.compare_report import CompareReport
from orthrus.measure.plots import check_plot
from tests.checkpoints import make_checkpoint
from tests.imports import ROOT
from tests.quantised import FP8, make_quantised

TINY = str(ROOT / "models" / "orthrus-tiny")
TEXT = Path(starlette.websockets.__file__)
"""Source that the model has not been trained on: half a row to read, and some rows to calibrate on."""


@pytest.fixture(scope="module")
def report() -> CompareReport:
    return compare(
        CompareOptions(
            TINY,
            device="cpu",
            batches=(1,),
            new_tokens=12,
            rounds=1,
            text=TEXT,
            text_tokens=256,
            answers=6,
            answer_tokens=8,
            # On a busy machine, measured costs might say that drafts do not pay.
            adaptive_draft=False,
        )
    )


def test_schedules_change_nothing_and_fewer_bits_do(report: CompareReport) -> None:
    assert [method.name for method in report.methods] == [method.name for method in METHODS]
    assert not report.left_out
    methods = {method.name: method for method in report.methods}
    reference = methods["ar"].drift
    for name in ("ar", "orthrus", "medusa", "ngram"):
        drift = methods[name].drift
        assert drift.exact and drift.equal_answers == report.answers == 6
        assert (drift.max_kl, drift.top_1_agreement) == (0, 1) and drift.perplexity == reference.perplexity
    for name in ("fp8", "int8", "pruned", "wanda"):
        assert not methods[name].drift.exact and methods[name].drift.max_kl > 0
    # The worse the weights are approximated, the further the output is away.
    kl = {name: methods[name].drift.mean_kl for name in methods}
    assert 0 < kl["int8"] < kl["fp8"] < min(kl["pruned"], kl["wanda"])
    assert methods["pruned"].drift.perplexity > 1.1 * reference.perplexity
    assert 1 < reference.perplexity < 100
    by_position = methods["pruned"].drift.still_equal_by_position
    assert len(by_position) == 8 and list(by_position) == sorted(by_position, reverse=True)


def test_speeds_memory_and_setup_are_reported(report: CompareReport) -> None:
    methods = {method.name: method for method in report.methods}
    [speed] = methods["orthrus"].speeds
    assert speed.tokens_per_second > 0 and math.isfinite(speed.over_ar.median)
    assert speed.tokens_per_cycle > 1.5
    assert methods["ar"].speeds[0].tokens_per_cycle == 1
    assert methods["ar"].weight_ratio == 1 < methods["orthrus"].weight_ratio < 1.3
    assert methods["medusa"].weight_ratio == pytest.approx(1 + 4 * 384**2 / 17.4e6, abs=0.01)
    assert methods["fp8"].weight_ratio < methods["int8"].weight_ratio < 1
    assert "made in" in methods["fp8"].setup
    text = report.to_text()
    assert "methods with no difference on this text and these answers: orthrus, medusa, ngram" in text
    assert all(method.name in text for method in METHODS)
    assert json.loads(report.to_json())["methods"][0]["name"] == "ar"


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is quantised"):
        compare(CompareOptions(str(make_quantised(tmp_path / "fp8", FP8))))
    with pytest.raises(ConfigError, match="has no tokenizer"):
        compare(CompareOptions(str(make_checkpoint(tmp_path / "model"))))
    short = tmp_path / "short.txt"
    short.write_text("def f(): pass")
    with pytest.raises(ConfigError, match="give one of at least"):
        compare(CompareOptions(TINY, device="cpu", text=short))
    with pytest.raises(ConfigError, match="for 10000 openings: give one of at least 480000"):
        compare(CompareOptions(TINY, device="cpu", answers=10_000))
    with pytest.raises(ConfigError, match="context of 2048 tokens, and 3049 are needed"):
        compare(CompareOptions(TINY, device="cpu", answer_tokens=3000))
    with pytest.raises(ConfigError, match="can't be read"):
        compare(CompareOptions(TINY, device="cpu", text=tmp_path / "none.txt"))


def test_methods_that_do_not_work_with_a_checkpoint_or_text_are_left_out(tmp_path: Path) -> None:
    path = make_checkpoint(
        tmp_path / "plain",
        diffusion=False,
        vocab_size=8192,
        hidden_size=128,
        heads=8,
        max_position_embeddings=1024,
    )
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(TINY) / file, path)
    text = tmp_path / "text.txt"
    text.write_text("def f(x): return x + 1\n" * 60)
    options = CompareOptions(
        str(path), device="cpu", text=text, batches=(1,), new_tokens=2, rounds=1, answers=2, answer_tokens=2
    )
    report = compare(options)
    assert [method.name for method in report.methods] == ["ar", "ngram", "fp8", "int8", "pruned"]
    diffusion, medusa, wanda = report.left_out
    assert diffusion == "orthrus: the checkpoint has no diffusion heads"
    assert medusa == "medusa: the checkpoint has no Medusa heads"
    assert wanda.startswith("wanda: the text has no row of 512 tokens to calibrate on")


def test_a_plot_that_cannot_be_written_is_refused_before_the_measurement(tmp_path: Path) -> None:
    check_plot(tmp_path / "compare.svg")
    with pytest.raises(ConfigError, match=r"end it in one of .*svg"):
        check_plot(tmp_path / "compare.doc")
    with pytest.raises(ConfigError, match="none does not exist"):
        check_plot(tmp_path / "none" / "compare.svg")
