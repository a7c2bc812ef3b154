"""Files, functions, docstrings and lists of public names stay small enough to be read."""

import ast

import pytest

from tests.paths import ROOT
from tests.repo.tree import PACKAGES, parse, sources

pytestmark = pytest.mark.once

MAX_FILE, MAX_FUNCTION, MAX_DOCSTRING, MAX_NAMES, MAX_SCRIPT = 400, 80, 25, 25, 80
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)

LIBRARY = sources(*PACKAGES)
EVERYTHING = [*LIBRARY, *sources("tests", "benchmarks", "scripts")]


def public_names(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return ast.literal_eval(node.value)
    return None


def definitions(tree: ast.Module) -> dict[str, ast.AST]:
    return {node.name: node for node in tree.body if isinstance(node, (*FUNCTION, ast.ClassDef))}


def show(problems) -> str:
    return "\n" + "\n".join(problems)


def test_files_are_short():
    sizes = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in EVERYTHING}
    assert len(sizes) > 100
    assert not (long := {str(path): size for path, size in sizes.items() if size > MAX_FILE}), long


def test_functions_are_short():
    long = []
    for path in EVERYTHING:
        for node in ast.walk(parse(path)):
            if not isinstance(node, FUNCTION):
                continue
            size = node.end_lineno - node.lineno + 1
            # A kernel body is one straight piece of code for one program of the grid: exempt by its name.
            if size > MAX_FUNCTION and not (path.is_relative_to(ROOT / "pallas_kernels") and "kernel" in node.name):
                long.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} has {size} lines")
    assert not long, show(long)


def test_docstrings_are_short():
    long = []
    for path in LIBRARY:
        for node in ast.walk(parse(path)):
            if isinstance(node, (*FUNCTION, ast.ClassDef)):
                size = len((ast.get_docstring(node) or "").splitlines())
                if size > MAX_DOCSTRING:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno}: docstring of {node.name} has {size} lines")
    assert not long, show(long)


def test_public_names_are_listed():
    wrong = []
    for path in LIBRARY:
        tree, place = parse(path), path.relative_to(ROOT)
        names = public_names(tree)
        holds_code = any(not isinstance(node, ast.Expr) for node in tree.body)
        private = path.name.startswith("_") and path.name != "__init__.py"
        if names is None:
            wrong += [f"{place}: a public module needs __all__"] if holds_code and not private else []
        elif len(names) > MAX_NAMES or len(set(names)) < len(names):
            wrong.append(f"{place}: {len(names)} public names, {len(set(names))} of them different")
    assert not wrong, show(wrong)


def test_what_is_public_is_documented():
    wrong = []
    for path in LIBRARY:
        tree, place = parse(path), path.relative_to(ROOT)
        if ast.get_docstring(tree) is None and tree.body:
            wrong.append(f"{place}: no module docstring, which is the design note")
        found = definitions(tree)
        wrong += [
            f"{place}: {name} is public and has no docstring"
            for name in public_names(tree) or []
            if name in found and not ast.get_docstring(found[name])
        ]
    assert not wrong, show(wrong)


def test_scripts_are_short():
    files = [path for path in (ROOT / "scripts").iterdir() if path.is_file()]
    sizes = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not (long := {name: size for name, size in sizes.items() if size > MAX_SCRIPT}), long
