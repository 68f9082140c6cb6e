"""The emulator finds faults: kernels are broken on purpose."""

import re
from collections.abc import Callable
from typing import NamedTuple

import pytest

from tests.ptx.machine import WAYS, EmulationError, Way
from tests.ptx.own_process import emulated


class Broken(NamedTuple):
    """A change of a kernel's PTX, and what must be found."""

    name: str
    kernel: str
    pattern: str
    replacement: str
    found: str
    way: Way = WAYS[2]


BROKEN = [
    Broken(
        "does not wait for its products", "linear",
        r"wgmma\.wait_group\.sync\.aligned 1;", "wgmma.wait_group.sync.aligned 2;",
        "unfinished wgmma is overwritten", WAYS[0],
    ),
    Broken(
        "does not wait for the last products", "linear",
        r"wgmma\.wait_group\.sync\.aligned 0;", "",
        "end with unfinished wgmma",
    ),
    Broken(
        "reads another swizzle", "linear",
        r"or\.b64\s+(%rd\d+, %rd\d+), 4611686293305294848", r"or.b64 \1, 9223372174293794816",
        "",
    ),
    Broken(
        "does not wait for the launches before", "linear",
        r"griddepcontrol\.wait ;", "",
        "before griddepcontrol.wait",
    ),
    Broken(
        "waits for too few bytes", "grouped",
        r"(expect_tx\S* _, \[%r\d+\], )16896;", r"\g<1>16640;",
        "",
    ),
    Broken(
        "waits for too many bytes", "grouped",
        r"(expect_tx\S* _, \[%r\d+\], )16896;", r"\g<1>16912;",
        "deadlock",
    ),
    Broken(
        "gives memory back too soon", "grouped",
        r"(wgmma\.wait_group\.sync\.aligned) 0;", r"\1 1;",
        "race|unfinished wgmma is overwritten", WAYS[0],
    ),
    Broken(
        "does not give memory back", "grouped",
        r"@%p\d+ mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];", "",
        "deadlock",
    ),
    Broken(
        "takes too many registers", "grouped",
        r"setmaxnreg\.inc(\S+)\s+232;", r"setmaxnreg.inc\1 240;",
        "deadlock",
    ),
    Broken(
        "waits for too few bytes", "codes",
        r"(expect_tx\S* _, \[%r\d+\], )18432;", r"\g<1>18176;",
        "",
    ),
    Broken(
        "does not give memory back", "codes",
        r"@%p\d+ mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];", "",
        "deadlock",
    ),
    Broken(
        "gives memory back too soon", "codes",
        r"(wgmma\.wait_group\.sync\.aligned) 0;", r"\1 1;",
        "race|unfinished wgmma", WAYS[0],
    ),
    Broken(
        "has no proxy fence", "lossless",
        r"fence\.proxy\.async\.shared::cta;", "",
        "no proxy fence",
    ),
    Broken(
        "has no barriers", "lossless",
        r"bar\.sync\s+\d+, 128;", "",
        "race",
    ),
    Broken(
        "has barriers for other warps", "lossless",
        r"bar\.sync\s+0, 128;", "bar.sync 0, 160;",
        "barrier counts differ|deadlock",
    ),
    Broken(
        "has no barriers", "attention",
        r"bar\.sync\s+\d+, 128;", "",
        "race", WAYS[0],
    ),
    Broken(
        "is a cluster", "attention",
        r"griddepcontrol\.launch_dependents ;", "barrier.cluster.arrive.aligned;",
        "clusters are not emulated",
    ),
]  # fmt: skip


def check_with(kernel: str, way: Way, edit: Callable[[str], str]) -> None:
    from tests.ptx import attention, codes, grouped, linear, lossless

    if kernel == "linear":
        linear.check_layer(way, 16, 1, fp8=False, ins=2048, edit=edit)
    elif kernel == "grouped":
        grouped.check_layer(way, "fp8", 16, 192, 2048, edit=edit)
    elif kernel == "codes":
        codes.check_layer(way, 16, 192, 4096, 2, edit=edit)
    elif kernel == "lossless":
        lossless.check_layer(way, 16, 1, 1536, 3, edit=edit)
    else:
        groups = attention.groups_of([(20, 700, False), (3, 129, True)])
        attention.check_groups(way, groups, 4, 128, 0, edit=edit)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: f"{broken.kernel} {broken.name}")
@emulated
def test_fault_is_found(broken: Broken) -> None:
    def edit(ptx: str) -> str:
        changed, count = re.subn(broken.pattern, broken.replacement, ptx)
        assert count, "the PTX has no such instruction"
        return changed

    with pytest.raises((EmulationError, AssertionError), match=broken.found) as raised:
        check_with(broken.kernel, broken.way, edit)
    assert "has no such instruction" not in str(raised.value)


@emulated
def test_write_beyond_a_tensor_is_found() -> None:
    from tests.ptx import linear
    from tests.ptx.tensors import unset

    layer, _ = linear.make_layer(1, 192, 512, fp8=False)
    x, _ = linear.make_inputs(16, 512, fp8=False)
    with pytest.raises(EmulationError, match="out of bounds"):
        linear.launch(WAYS[0], x, layer, unset(16, 191), None, 1)
