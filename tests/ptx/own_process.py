"""Runs tests in a process of their own, whose Triton compiles kernels and does not interpret them.

Triton decides that when it is imported, and other tests of the same pytest process need its interpreter.
So these tests import kernels in their bodies, and not at the top of their files.
"""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest

from tests.ptx.machine import compiler

_LONGEST_SECONDS = 220


def _begin() -> None:
    """Before the process imports Triton. One thread: the tensors are small."""
    os.environ["TRITON_INTERPRET"] = "0"
    import torch

    torch.set_num_threads(1)


@cache
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_begin)


def _call(module: str, name: str, arguments: dict[str, Any]) -> None:
    getattr(import_module(module), name).__wrapped__(**arguments)


def emulated(test: Callable[..., None]) -> Callable[..., None]:
    """A test function whose body runs in the other process. All that it is given must be picklable.

    It is skipped where Triton or a C++ compiler is missing.
    """

    @wraps(test)
    def run(**arguments: Any) -> None:
        if find_spec("triton") is None:
            pytest.skip("Triton is missing: it has packages for Linux only")
        if compiler() is None:
            pytest.skip(
                "a C++ compiler is missing, and the emulator of PTX needs one: install g++ or clang++"
            )
        _process().submit(_call, test.__module__, test.__name__, arguments).result(_LONGEST_SECONDS)

    return run
