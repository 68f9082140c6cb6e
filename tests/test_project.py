"""The shape of the project: its layout, which package may import which, and the traps of its names."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "cluster": {"cluster", "deployments", "orthrus", "kernels"},
    "deployments": {"deployments", "orthrus", "kernels"},
    "orthrus": {"orthrus", "kernels"},
    "kernels": {"kernels"},
}
# The command line is where the packages meet: `orthrus serve` starts the deployments, `orthrus config` knows the cluster.
MAY_IMPORT_MORE = {
    Path("orthrus/cli") / name: {"cluster", "deployments"}
    for name in ("serve.py", "config.py", "keys.py", "bench_serve.py")
}


def imported_names(path: Path) -> Iterator[str]:
    """Top-level names that a file imports absolutely, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


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


@pytest.mark.parametrize("package", PACKAGES)
def test_dependencies_point_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        allowed = PACKAGES[package] | MAY_IMPORT_MORE.get(path.relative_to(ROOT), set())
        wrong = {name for name in imported_names(path) if name in PACKAGES} - allowed
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_engine_knows_nothing_of_ray() -> None:
    for package in ("orthrus", "kernels"):
        for path in (ROOT / package).rglob("*.py"):
            assert "ray" not in imported_names(path), f"{path.relative_to(ROOT)} imports ray"


def test_transformers_does_not_take_our_kernels_for_its_own() -> None:
    # In a fresh interpreter: the answer is cached at the first call, and imports of `kernels` happen underway.
    program = "from transformers.utils.import_utils import is_kernels_available as f; print(f())"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"]


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
