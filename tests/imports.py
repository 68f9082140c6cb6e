"""Which module imports which, read from the source without running it."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "orthrus", "deployments", "cluster")


class Import(NamedTuple):
    """One dotted name that a file imports, and whether only annotations need it."""

    name: str
    for_types: bool


def generated(path: Path) -> bool:
    """Whether protoc has written the file."""
    return path.stem.endswith(("_pb2", "_pb2_grpc"))


def python_files(*folders: str) -> list[Path]:
    """Python files under these folders of the repository that people have written."""
    found = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [path for path in found if not generated(path)]


@cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[Import]:
    """What a file imports, inside functions too. `from a import b` gives a.b, whether b is a module or a name in it."""

    def walk(node: ast.AST, for_types: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, for_types) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0 and child.module, f"{path}: relative imports are not used here"
                yield from (Import(f"{child.module}.{alias.name}", for_types) for alias in child.names)
            else:
                types = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
                yield from walk(child, for_types or types)

    return walk(parsed(path), False)


def module_name(path: Path) -> str:
    """The name by which a file is imported: the folders beside orthrus/ are packages within `orthrus`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts if parts[0] == "orthrus" else ("orthrus", *parts))


@cache
def modules() -> dict[str, Path]:
    """The modules of all packages, by name; the generated ones too."""
    return {module_name(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def imported_modules(path: Path, *, for_types: bool = True) -> set[Path]:
    """Files of this repository's packages that a file imports. for_types: also what it imports for annotations only."""
    found = set()
    for name, only_types in imports(path):
        while name and name not in modules():
            name = name.rpartition(".")[0]
        if name and (for_types or not only_types):
            found.add(modules()[name])
    return found - {path}
