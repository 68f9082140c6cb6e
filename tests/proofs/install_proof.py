"""Installing beside other packages, in virtual environments: `make test-install` runs it. Minutes; needs a package index.

Hugging Face's `kernels` is the real package. Packages named `cluster` and `deployments` are made here. All other packages that
Orthrus needs are linked from the environment that runs the tests.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from orthrus.deployments.launch.environment import free_port
from tests.imports import ROOT

PROBE = """
import importlib.metadata, json, kernels, cluster, deployments, orthrus
import orthrus.kernels.rows.sampling, orthrus.deployments.app, orthrus.cluster.check
import transformers.integrations.hub_kernels
from transformers.utils.import_utils import is_kernels_available
from kernels import get_kernel
print(json.dumps({
    "theirs": [kernels.__file__, cluster.__file__, deployments.__file__],
    "ours": [m.__file__ for m in (orthrus.kernels.rows.sampling, orthrus.deployments.app, orthrus.cluster.check)],
    "get_kernel": get_kernel.__module__,
    "transformers": is_kernels_available(MIN_VERSION=importlib.metadata.version("kernels"), MAX_VERSION="99"),
}))
"""
THEIRS = ("kernels", "cluster", "deployments")


class Environment:
    """A virtual environment whose packages, other than ours, are those of the environment that runs the tests."""

    def __init__(self, path: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", path], check=True)
        self.bin = path / "bin"
        (self.site,) = path.glob("lib/python*/site-packages")
        borrowed = path / "borrowed"
        borrowed.mkdir()
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if not entry.name.startswith((*THEIRS, "orthrus", "__editable__", "__pycache__")):
                (borrowed / entry.name).symlink_to(entry)
        (self.site / "borrowed.pth").write_text(f"{borrowed}\n")

    def run(self, *command: object, cwd: Path) -> str:
        """stdout of a program of the environment."""
        program, *arguments = map(str, command)
        done = subprocess.run(
            [self.bin / program, *arguments], cwd=cwd, env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def install(self, *arguments: object) -> None:
        """Install packages, without what they need."""
        pip = (sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "--quiet", "install")
        options = ("--no-deps", "--no-build-isolation", *map(str, arguments))
        subprocess.run([*pip, *options], check=True, env=environment())


def environment() -> dict[str, str]:
    """This process's environment variables, without those that would put this repository on a path."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources of packages named cluster and deployments."""
    path = tmp_path_factory.mktemp("packages")
    for name in ("cluster", "deployments"):
        (path / name / name).mkdir(parents=True)
        (path / name / name / "__init__.py").touch()
        (path / name / "pyproject.toml").write_text(f'[project]\nname = "{name}"\nversion = "1.0"\n')
    return path


@pytest.fixture(
    scope="module",
    params=itertools.product(("wheel", "editable"), ("ours first", "theirs first")),
    ids=lambda param: " ".join(param),
)
def installed(
    request: pytest.FixtureRequest, packages: Path, tmp_path_factory: pytest.TempPathFactory
) -> Environment:
    """An environment with Orthrus and the packages of `THEIRS`, installed in this order."""
    kind, order = request.param
    made = Environment(tmp_path_factory.mktemp("environment"))
    ours = ("-e", ROOT) if kind == "editable" else (ROOT,)
    theirs = ("kernels", packages / "cluster", packages / "deployments")
    for step in (ours, theirs) if order == "ours first" else (theirs, ours):
        made.install(*step)
    return made


def test_both_are_found_from_anywhere(installed: Environment, tmp_path: Path) -> None:
    """From the root of the repository too, where Python looks first and finds folders of these names."""
    for cwd in (tmp_path, ROOT):
        found = json.loads(installed.run("python", "-c", PROBE, cwd=cwd))
        assert found["theirs"] == [f"{installed.site}/{name}/__init__.py" for name in THEIRS]
        assert all("/orthrus/" in file for file in found["ours"])
        assert found["get_kernel"].startswith("kernels.")
        assert found["transformers"] is True


def test_no_file_belongs_to_two_packages(installed: Environment) -> None:
    files = [
        {line.split(",")[0] for line in record.read_text().splitlines()}
        for record in installed.site.glob("*.dist-info/RECORD")
        if record.parent.name.startswith((*THEIRS, "orthrus_serve"))
    ]
    assert len(files) == len(THEIRS) + 1
    assert len(set().union(*files)) == sum(map(len, files))


def test_the_command_works(installed: Environment, tmp_path: Path) -> None:
    assert "several tokens per forward pass" in installed.run("orthrus", "--help", cwd=tmp_path)
    config = config_file(tmp_path)
    cluster = ROOT / "ray_cluster.yaml"
    assert installed.run("orthrus", "config", "check", config, "--cluster", cluster, cwd=tmp_path).endswith(
        "ok\n"
    )


def test_it_serves(installed: Environment, tmp_path: Path) -> None:
    """Replicas too, which Ray starts elsewhere, find our packages and not those of the same names."""
    config = config_file(tmp_path)
    url = f"http://127.0.0.1:{yaml.safe_load(config.read_text())['http_options']['port']}/v1/completions"
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [installed.bin / "orthrus", "serve", config],
            cwd=tmp_path,
            env=environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        answer = first_answer(url, server, tmp_path / "log")
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
    assert answer["usage"]["completion_tokens"] == 4


def config_file(folder: Path) -> Path:
    """configs/tiny-cpu.yaml with free ports and the absolute path of the model."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "tiny-cpu.yaml").read_text())
    config["http_options"] |= {"host": "127.0.0.1", "port": free_port()}
    config["grpc_options"]["port"] = free_port()
    engine = config["applications"][0]["args"]["engine"]
    engine["model"] = str(ROOT / engine["model"])
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def first_answer(url: str, server: "subprocess.Popen[bytes]", log: Path) -> dict[str, Any]:
    """The answer to a completion, as soon as there is one."""
    body = json.dumps({"model": "orthrus-tiny", "prompt": "def f", "max_tokens": 4, "ignore_eos": True})
    deadline = time.monotonic() + 240
    while True:
        assert server.poll() is None and time.monotonic() < deadline, log.read_text()
        request = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read())
        except OSError:
            time.sleep(1)
