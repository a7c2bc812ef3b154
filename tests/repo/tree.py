"""The source files of the project and the imports in them, for the tests of this folder."""

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.paths import ROOT

__all__ = ["PACKAGES", "imports", "module_name", "parse", "sources", "third_parties"]

PACKAGES = ("fusejax", "pallas_kernels")


def sources(*folders: str) -> list[Path]:
    """Returns the Python files below the folders of the repository, sorted."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_name(path: Path) -> str:
    """Returns the dotted name of a source file: `fusejax.io.hf`, `fusejax.io` for a package."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_module(dotted: str) -> bool:
    path = ROOT.joinpath(*dotted.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Yields (dotted module, line) of every import of a file, at any depth of nesting.

    `from package import x` names `package.x` where that is a module, else `package`.
    """
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield (inner if base.split(".")[0] in PACKAGES and _is_module(inner) else base), node.lineno


def third_parties(path: Path) -> Iterator[tuple[str, int]]:
    """Yields (top-level package, line) of the imports that are neither ours nor the standard library's."""
    for name, line in imports(path):
        top = name.split(".")[0]
        if top not in PACKAGES and top not in sys.stdlib_module_names:
            yield top, line
