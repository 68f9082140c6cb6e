"""What an installation adds: one package named orthrus, so that packages named kernels, deployments or cluster stay whole."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.imports import PACKAGES, ROOT, imports, python_files

BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
SHARED_NAMES = {"kernels", "deployments", "cluster"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, since setuptools writes beside it."""
    path = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, path / package, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, path)
    return path


def built(source: Path, tmp_path: Path, hook: str) -> zipfile.ZipFile:
    """The wheel that a hook of setuptools makes: `build_wheel` or `build_editable`."""
    subprocess.run(
        [sys.executable, "-c", BUILD, hook, str(tmp_path)], cwd=source, check=True, capture_output=True
    )
    (file,) = tmp_path.glob("*.whl")
    return zipfile.ZipFile(file)


def test_a_wheel_holds_every_file_in_one_package(source: Path, tmp_path: Path) -> None:
    with built(source, tmp_path, "build_wheel") as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {
        (path.relative_to(ROOT) if package == "orthrus" else "orthrus" / path.relative_to(ROOT)).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected


def test_an_editable_installation_leaves_the_root_off_the_path(source: Path, tmp_path: Path) -> None:
    """It finds `orthrus` by name. With the root on the path, `kernels` would be found there."""
    with built(source, tmp_path, "build_editable") as wheel:
        paths = [wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".pth")]
        (finder,) = (name for name in wheel.namelist() if name.endswith("_finder.py"))
        mapping = next(
            line for line in wheel.read(finder).decode().splitlines() if line.startswith("MAPPING")
        )
    assert all(path.startswith("import ") for path in paths)
    assert mapping.endswith(f"= {{'orthrus': '{source}/orthrus'}}")


def test_a_package_of_the_same_name_wins_over_our_folder(tmp_path: Path) -> None:
    """Also where the root comes first on the path: folders without __init__.py give way to a real package."""
    for name in SHARED_NAMES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    program = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import cluster, deployments, kernels; from importlib.util import find_spec\n"
        "print(*(module.__file__ for module in (cluster, deployments, kernels)))\n"
        "print(*(find_spec(name).origin for name in ('orthrus.kernels.device', 'orthrus.deployments.app')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT), str(tmp_path)], capture_output=True, text=True, check=True
    )
    theirs, ours = done.stdout.splitlines()
    assert theirs.split() == [f"{tmp_path}/{name}/__init__.py" for name in sorted(SHARED_NAMES)]
    assert ours.split() == [f"{ROOT}/orthrus/{name}" for name in ("kernels/device.py", "deployments/app.py")]


def test_our_code_never_means_a_package_of_the_same_name() -> None:
    for path in python_files(*PACKAGES, "tests"):
        wrong = {name for name, _ in imports(path) if name.split(".")[0] in SHARED_NAMES}
        assert not wrong, f"{path.relative_to(ROOT)}: import {sorted(wrong)} from `orthrus`"


def test_transformers_does_not_take_our_folder_for_hugging_faces_kernels() -> None:
    # In a fresh interpreter: the answer is cached at the first call.
    program = (
        "from transformers.utils.import_utils import is_kernels_available as f\n"
        "print(f(MIN_VERSION='0', MAX_VERSION='99'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"]
