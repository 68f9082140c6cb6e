"""The Gluon kernels compile with the installed Triton, also where no C++ compiler builds the emulator that runs them.

Gluon's names change from one version to the next.
"""

import os
import subprocess
import sys

import pytest

from tests.imports import ROOT
from tests.ptx.machine import compiler


@pytest.mark.skipif(
    compiler() is not None, reason="the tests in tests/ptx compile these kernels and run them"
)
def test_kernels_for_hopper_compile() -> None:
    """In another process, because this one may use Triton's interpreter, and then it uses it for all kernels."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.build_hopper"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = {line.partition(",")[0].partition(":")[0] for line in done.stdout.splitlines()}
    assert kernels == {"linear", "grouped", "lossless", "attention"}
