"""The Gluon kernels compile with the installed Triton.

Gluon's names change from one version to the next, and it has no interpreter.
"""

import os
import subprocess
import sys

from tests.imports import ROOT


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
    assert len(done.stdout.splitlines()) == 10
