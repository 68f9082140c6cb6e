"""The shape of the code: which room may import which, no import circles, and how long a file and a function may be."""

import ast
from pathlib import Path

import pytest

from tests.imports import PACKAGES, ROOT, imported_modules, imports, modules, python_files

# The lowest room first. A file belongs to the longest entry that its path begins with, and imports from its own room and
# from earlier entries: knowledge points one way. The command line comes last and may import all.
ROOMS = (
    "kernels/capabilities.py",
    "kernels/device.py",
    "kernels/gluon_names.py",
    "kernels/leaves.py",
    "kernels/int4_sizes.py",
    "kernels/lossless_sizes.py",
    "kernels/peer_sizes.py",
    "kernels/rounding.py",
    "kernels/workspace.py",
    "kernels/rounding_triton.py",
    "kernels/rows",
    "kernels/ranks",
    "kernels/linear",
    "kernels/attention",
    "kernels",
    "orthrus",  # What every room may use: errors, files, settings in YAML, the plan of a pass.
    "orthrus/text",
    "orthrus/models/rope.py",
    "orthrus/models/quantization.py",
    "orthrus/models/config.py",
    "orthrus/cache",
    "orthrus/requests",
    "orthrus/models",
    "orthrus/schedules/registry.py",
    "orthrus/engine/config.py",
    "orthrus/schedules",
    "orthrus/runner",
    "orthrus/engine",
    "orthrus/generate",
    "orthrus/measure",
    "orthrus/training",
    "orthrus/__init__.py",
    "deployments/proto",
    "deployments/link",
    "deployments/failures",
    "deployments/bodies",
    "deployments/config",
    "deployments/access",
    "deployments/chat",
    "deployments/generation",
    "deployments/http",
    "deployments/openai",
    "deployments/tokenizer",
    "deployments/operations",
    "deployments/messages",
    "deployments/page",
    "deployments/responses",
    "deployments/grpc",
    "deployments/ingress",
    "deployments/replica",
    "deployments/routing",
    "deployments",
    "deployments/launch",
    "deployments/bench",
    "cluster",
    "orthrus/cli",
)
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# What does not hold yet. Each list may only shrink: an entry that is no longer needed fails its test.
UPWARD: set[tuple[str, str]] = set()
CIRCLES: set[str] = set()
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room(path: Path) -> int:
    """The place in ROOMS of a file's room."""
    own = shown(path)
    places = [i for i, entry in enumerate(ROOMS) if own == entry or own.startswith(f"{entry}/")]
    return max(places, key=lambda i: len(ROOMS[i]))


def circles(graph: dict[Path, set[Path]]) -> set[frozenset[Path]]:
    """Sets of files each of which imports, through others, every other one (strongly connected components)."""
    reached: dict[Path, set[Path]] = {}
    for start in graph:
        seen: set[Path] = set()
        todo = [start]
        while todo:
            new = graph.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        reached[start] = seen
    return {
        frozenset(other for other in reached[start] if start in reached.get(other, set()))
        for start in graph
        if start in reached[start]
    }


def test_every_folder_is_a_room() -> None:
    folders = {shown(path.parent) for path in python_files(*PACKAGES)}
    rooms = {"/".join(folder.split("/")[:2]) for folder in folders}
    missing = rooms - set(ROOMS)
    assert not missing, (
        f"give {sorted(missing)} a place in ROOMS, and say in docs/rooms.yaml what they are for"
    )
    assert all((ROOT / entry).exists() for entry in ROOMS), [e for e in ROOMS if not (ROOT / e).exists()]


def test_knowledge_points_one_way() -> None:
    upward = {
        (shown(path), shown(target))
        for path in python_files(*PACKAGES)
        for target in imported_modules(path)
        if room(target) > room(path)
    }
    assert upward == UPWARD, f"new: {sorted(upward - UPWARD)}; no longer so: {sorted(UPWARD - upward)}"


def test_no_import_circles() -> None:
    graph = {path: imported_modules(path, for_types=False) for path in modules().values()}
    found = {" ".join(sorted(map(shown, circle))) for circle in circles(graph)}
    assert found == CIRCLES, f"new: {sorted(found - CIRCLES)}; no longer so: {sorted(CIRCLES - found)}"


def test_circles_are_found() -> None:
    a, b, c, d = (Path(name) for name in "abcd")
    assert circles({a: {b}, b: {c}, c: {a}, d: {a}}) == {frozenset({a, b, c})}
    assert circles({a: {b, d}, b: {c}, c: set(), d: {c}}) == set()


@pytest.mark.parametrize("package", ["orthrus", "kernels"])
def test_the_engine_knows_nothing_of_ray(package: str) -> None:
    for path in python_files(package):
        assert not any(name.split(".")[0] == "ray" for name, _ in imports(path)), shown(path)


def test_files_are_short() -> None:
    long = {
        shown(path)
        for path in python_files(*PACKAGES, "tests")
        if len(path.read_text(encoding="utf-8").splitlines()) > MAX_FILE_LINES
    }
    assert long == LONG_FILES, f"new: {sorted(long - LONG_FILES)}; no longer so: {sorted(LONG_FILES - long)}"


def test_functions_are_short() -> None:
    """Outside kernels/, where a kernel is one function."""
    long = set()
    for path in python_files(*(package for package in PACKAGES if package != "kernels"), "tests"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES:
                    long.add(f"{shown(path)} {node.name}")
    unknown, gone = sorted(long - LONG_FUNCTIONS), sorted(LONG_FUNCTIONS - long)
    assert long == LONG_FUNCTIONS, f"new: {unknown}; no longer so: {gone}"
