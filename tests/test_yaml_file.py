"""YAML that can be misread is an error with its place."""

from pathlib import Path

import pytest

from orthrus.errors import ConfigError
from orthrus.training.settings import Settings, read_settings
from orthrus.yaml_file import parse_yaml, read_yaml

FAULTS = {
    "duplicate key": ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n", "f:5:3: b.c: comes twice, first in line 3"),
    "octal": (
        "a: {port: 0755}\n",
        "f:1:11: a.port: YAML 1.1 reads 0755 as octal, which is 493: leave out",
    ),
    "short octal": ("- 010\n", "f:1:3: [0]: YAML 1.1 reads 010 as octal, which is 8"),
    "sexagesimal": ("at: 1:30\n", "f:1:5: at: YAML 1.1 reads 1:30 as 90, counting in sixties"),
    "sexagesimal with a fraction": ("at: 1:30.5\n", "f:1:5: at: YAML 1.1 reads 1:30.5 as 90.5"),
    "no such day": ("at: 2026-13-45\n", "f:1:5: at: 2026-13-45 is no timestamp: month must be in 1..12"),
    "word as a key": ("a:\n  on: 1\n", "f:2:3: a: YAML 1.1 does not read on as text, and a key is text"),
    "number as a key": ("8000: 1\n", "f:1:1: YAML 1.1 does not read 8000 as text, and a key is text"),
    "list as a key": ("? [1]\n: 2\n", "f:1:3: YAML 1.1 does not read this as text"),
    "alias of itself": ("a: &x [*x]\n", "f:1:4: a[0]: an alias refers to a value that contains it"),
    "syntax": ("a: [\n", "f:2:1: not YAML: while parsing a flow node"),
    "two documents": ("a: 1\n---\nb: 1\n", "f:2:1: not YAML: expected a single document"),
    "tag": ("a: !!python/name:os.system\n", "f:1:4: not YAML: could not determine a constructor"),
    "control character": ("a: \x07\n", "f: not YAML: unacceptable character"),
    "depth": ("[" * 5000, "f: nested too deep"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_can_be_misread_is_reported_with_its_place(fault: str) -> None:
    text, said = FAULTS[fault]
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "f")
    assert str(caught.value).startswith(said)


def test_all_faults_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml("a: 0755\na: 1:30\nb: 1:40\n", "f")
    assert [line.split(" ")[0] for line in str(caught.value).splitlines()] == ["f:1:4:", "f:2:1:", "f:3:4:"]


def test_what_every_reader_reads_alike_is_accepted() -> None:
    text = "a: &x {port: 8000, on_: '0755', at: \"1:30\"}\nb:\n  <<: *x\n  port: 9\nc: [0x1F, 0, 1_000, 0.5, ~, yes]\n"
    file = parse_yaml(text, "f")
    assert file.data == {
        "a": {"port": 8000, "on_": "0755", "at": "1:30"},
        "b": {"port": 9, "on_": "0755", "at": "1:30"},
        "c": [31, 0, 1000, 0.5, None, True],
    }
    assert file.place(("b", "port")) == "f:4:3"
    assert file.place(("b", "host", "name")) == "f:2:1"  # What is missing is where it would be.
    assert file.plain["c", 5] == "yes"


def test_each_node_is_checked_once_however_many_aliases_it_has() -> None:
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40)]
    assert set(parse_yaml("\n".join(lines), "f").data) == {f"a{i}" for i in range(40)}


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none\.yaml: No such file"):
        read_yaml(tmp_path / "none.yaml")
    file = tmp_path / "latin.yaml"
    file.write_bytes("name: é".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml is not UTF-8 text"):
        read_yaml(file)
    file.write_text("# nothing\n")
    assert read_yaml(file).data is None


def test_training_settings_are_read_as_strictly(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("steps: 1\nsteps: 2\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:2:1: steps: comes twice"):
        read_settings(Settings, file)
