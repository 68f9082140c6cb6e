"""The project: its layout, its versions and its pins."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_layout() -> None:
    for folder in ("cluster", "deployments", "orthrus", "kernels", "configs", "tests"):
        assert (ROOT / folder).is_dir()
    for file in (
        "pyproject.toml",
        "ray_cluster.yaml",
        "Makefile",
        "constraints.txt",
        "LICENSE",
        "README.md",
        ".ci/run",
    ):
        assert (ROOT / file).is_file()


def test_versions_agree() -> None:
    import orthrus

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == orthrus.__version__


def test_every_direct_dependency_is_pinned() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {
        r.name.lower(): r for r in (Requirement(line) for line in lines if line and not line.startswith("#"))
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        requirement = Requirement(text)
        if requirement.name == "triton":
            continue  # torch for CUDA brings its own; a pin for CPUs would contradict it.
        pin = next(iter(pins[requirement.name.lower()].specifier))
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{text} excludes the pinned {pin.version}"
