"""The command line: what it prints, where, and with which exit status."""

import io
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

import orthrus
from orthrus.cli import main
from orthrus.cli.terminal import stream_text
from orthrus.engine import Engine
from orthrus.engine.config import EngineConfig
from orthrus.errors import ConfigError
from orthrus.measure.bench import BenchOptions, bench
from orthrus.models.checkpoint import load_weights
from orthrus.models.families import load_config
from orthrus.requests.request import SamplingParams
from orthrus.text.tokenizer import load_tokenizer
from tests.checkpoints import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
Output = pytest.CaptureFixture[str]


def save_byte_tokenizer(path: Path, **settings: str) -> None:
    """One token per byte: 256 ids that decode to any text."""
    tokenizer = Tokenizer(BPE({char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint(tmp_path_factory.mktemp("text"), vocab_size=258)
    save_byte_tokenizer(path, chat_template=TEMPLATE)
    return path


@pytest.fixture(scope="module")
def small_context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint(tmp_path_factory.mktemp("small"), vocab_size=258, max_position_embeddings=64)
    save_byte_tokenizer(path, chat_template=TEMPLATE)
    return path


def type_lines(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_help_is_fast() -> None:
    program = "import sys, orthrus.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for command in ("generate", "chat", "serve", "verify", "bench", "train"):
        assert f"\n    {command} " in done.stdout
    assert not {"torch", "ray", "transformers"} & set(done.stdout.splitlines()[-1].split())


def test_config_check_is_fast() -> None:
    """torch and transformers take seconds to import: by names and headers a model is checked without them."""
    program = (
        "import sys, orthrus.cli as c\nprint(c.main(['config', 'check', sys.argv[1]]))\nprint(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT / "configs" / "tiny-cpu.yaml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    *_, status, modules = done.stdout.splitlines()
    assert status == "0"
    assert not {"torch", "transformers"} & set(modules.split())


def test_version(capsys: Output) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"orthrus {orthrus.__version__}\n"


def test_generate_streams_text_to_stdout_and_stats_to_stderr(model: Path, capsys: Output) -> None:
    arguments = [
        "--model",
        str(model),
        "--device",
        "cpu",
        "--prompt",
        "abc",
        "--max-tokens",
        "12",
        "--ignore-eos",
    ]
    assert main(["generate", *arguments, "--schedule", "ar"]) == 0
    by_ar = capsys.readouterr()
    assert main(["generate", *arguments, "--schedule", "orthrus"]) == 0
    by_orthrus = capsys.readouterr()
    assert by_ar.out == by_orthrus.out
    assert len(by_ar.out) > 1
    assert by_ar.err.startswith(f"loading {model}\nloading the weights of {model.name}\n12 tokens in ")
    assert "1.00 tokens per cycle" in by_ar.err
    assert "seed" not in by_ar.err


def generate_by_ar(model: Path) -> list[str]:
    return ["generate", "--model", str(model), "--device", "cpu", "--schedule", "ar"]


def test_generate_prints_the_seed_it_drew(model: Path, capsys: Output) -> None:
    arguments = [*generate_by_ar(model), "--prompt", "x", "--temperature", "1", "--max-tokens", "8"]
    assert main(arguments) == 0
    first = capsys.readouterr()
    seed = first.err.split("seed ")[1].strip()
    assert main([*arguments, "--seed", seed]) == 0
    assert capsys.readouterr().out == first.out


def test_generate_reads_stdin(model: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*generate_by_ar(model), "--max-tokens", "4"]
    assert main([*arguments, "--prompt", "abc\n"]) == 0
    expected = capsys.readouterr().out
    type_lines(monkeypatch, "abc")
    assert main(arguments) == 0
    assert capsys.readouterr().out == expected


def test_bytes_that_are_no_text_are_refused(
    model: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stdin(errors: str) -> io.TextIOWrapper:
        return io.TextIOWrapper(io.BytesIO(b"a\xff\n"), encoding="utf-8", errors=errors)

    # As Python reads in a UTF-8 locale, and in the C locale.
    for errors in ("strict", "surrogateescape"):
        monkeypatch.setattr(sys, "stdin", stdin(errors))
        assert main(generate_by_ar(model)) == 2
        assert capsys.readouterr().err == "orthrus: the prompt is not UTF-8 text\n"
    type_lines(monkeypatch, "a\udcff", "/exit")
    assert main(["chat", "--model", str(model), "--device", "cpu"]) == 0
    assert "that is not UTF-8 text" in capsys.readouterr().err
    assert main(["chat", "--model", str(model), "--device", "cpu", "--system", "a\udcff"]) == 2
    assert capsys.readouterr().err == "orthrus: the system message is not UTF-8 text\n"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_chat_ends_with_its_input_though_that_ends_inside_a_character(
    model: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch, errors: str
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"/help\na\xe2"), encoding="utf-8", errors=errors)
    reads = itertools.count()

    def read(prompt: str, read: Callable[[str], str] = input) -> str:
        assert next(reads) < 5
        return read(prompt)

    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr("builtins.input", read)
    assert main(["chat", "--model", str(model), "--device", "cpu"]) == 0
    assert capsys.readouterr().err.count("that is not UTF-8 text") == 1


def test_chat_keeps_the_conversation(model: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["chat", "--model", str(model), "--device", "cpu", "--max-tokens", "6", "--ignore-eos"]
    type_lines(monkeypatch, "hello", "again", "/reset", "hello", "/help", "/exit", "unread")
    assert main(arguments) == 0
    printed = capsys.readouterr()
    stats = [line for line in printed.err.splitlines() if line.startswith("[6 tokens in ")]
    assert len(stats) == 3
    assert all("tokens per cycle" in line for line in stats)
    assert printed.err.count("/exit") == 2  # at the start, and after the unknown command
    assert sys.stdin.readline() == "unread\n"
    first, second, reset, third = printed.out.split("> ")[1:5]
    assert reset == ""
    assert first == third  # /reset forgot what was said before
    assert first != second


def test_chat_without_room_says_so_and_goes_on(
    small_context: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    type_lines(monkeypatch, "x" * 80, "hi")
    assert main(["chat", "--model", str(small_context), "--device", "cpu", "--max-tokens", "4"]) == 0
    printed = capsys.readouterr()
    assert "shorten the prompt; /reset makes room" in printed.err
    assert "tokens per cycle" in printed.err


def test_chat_needs_a_template(tmp_path: Path, capsys: Output) -> None:
    save_byte_tokenizer(make_checkpoint(tmp_path, vocab_size=258))
    assert main(["chat", "--model", str(tmp_path), "--device", "cpu"]) == 2
    assert "has no chat template: use `orthrus generate`" in capsys.readouterr().err


def test_ctrl_c_stops_an_answer_and_leaves_the_engine_free(model: Path) -> None:
    engine = Engine.from_pretrained(EngineConfig(model=str(model), device="cpu", schedule="ar"))
    shown: list[str] = []

    def press_ctrl_c(piece: str) -> None:
        shown.append(piece)
        if len(shown) == 3:
            raise KeyboardInterrupt

    answer = stream_text(
        engine, [1, 2, 3], SamplingParams(temperature=0, max_tokens=200, ignore_eos=True), press_ctrl_c
    )
    assert answer.stats is None
    assert answer.text == "".join(shown)
    assert not engine.has_work
    assert engine.stats.running == 0


def test_an_answer_that_the_engine_broke_off_is_an_error(model: Path) -> None:
    """Scores that are NaN say nothing of the next token."""
    weights = load_weights(model, load_config(model), "cpu")
    weights["model.norm.weight"].fill_(float("nan"))
    settings = EngineConfig(model=str(model), device="cpu", schedule="ar")
    engine = Engine(settings, load_config(model), weights, load_tokenizer(model))
    with pytest.raises(ConfigError, match="NaN or infinite"):
        stream_text(engine, [1, 2, 3], SamplingParams(temperature=0, max_tokens=4), lambda piece: None)
    assert not engine.has_work


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--temperature", "-1"], "temperature must be between 0 and 100, got -1.0"),
        (["--max-tokens", "0"], "max_tokens must be at least 1, got 0"),
        (["--prompt", ""], "the prompt must have at least one token"),
        (["--prompt", "a\udcff"], "the prompt is not UTF-8 text"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    arguments: list[str], message: str, model: Path, capsys: Output
) -> None:
    assert main(["generate", "--model", str(model), "--device", "cpu", "--prompt", "x", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    *before, last = printed.err.splitlines()
    assert last.startswith("orthrus: ") and message in last
    assert all(line.startswith(("loading ", "measuring ")) for line in before)


@pytest.mark.parametrize(
    "arguments", [["bench", "--batch", "0"], ["generate", "--schedule", "tree"], ["fly"], []]
)
def test_wrong_options_are_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_bench_sets_all_side_by_side(model: Path) -> None:
    report = bench(BenchOptions(str(model), device="cpu", batches=(1, 3), new_tokens=12, rounds=2))
    rows = [(m.batch, m.contestant) for m in report.measurements]
    assert rows == [(b, c) for b in (1, 3) for c in ("hugging face", "ar", "orthrus", "ngram")]
    assert report.exact
    for measurement in report.measurements:
        assert measurement.tokens_per_second > 0
        for ratio in (measurement.over_hugging_face, measurement.over_ar):
            assert 0 < ratio.low <= ratio.median <= ratio.high
        assert measurement.agreement == 1.0  # greedy in float32, far from ties
    assert all(m.over_hugging_face.median == 1.0 for m in report.measurements[::4])
    assert all(m.over_ar.median == 1.0 for m in report.measurements[1::4])
    text = report.to_text()
    assert report.hardware in text
    assert "all schedules gave the same tokens" in text


def test_bench_without_a_tokenizer_uses_token_ids(tiny_qwen3: Path, capsys: Output) -> None:
    arguments = [
        "--model",
        str(tiny_qwen3),
        "--device",
        "cpu",
        "--batch",
        "2",
        "--new-tokens",
        "4",
        "--rounds",
        "1",
    ]
    assert main(["bench", *arguments, "--json"]) == 0
    assert '"contestant": "ar"' in capsys.readouterr().out
