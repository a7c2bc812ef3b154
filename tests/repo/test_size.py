"""Files, functions, docstrings and lists of public names stay small enough to be read."""

import ast

import pytest

from tests.paths import ROOT
from tests.repo.tree import PACKAGES, module_name, parse, sources

MAX_FILE, MAX_FUNCTION, MAX_DOCSTRING, MAX_NAMES, MAX_SCRIPT = 400, 80, 25, 25, 80
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)

ALL_FILES = sources(*PACKAGES, "tests", "benchmarks", "scripts")
EVERYWHERE = [pytest.param(p, id=str(p.relative_to(ROOT))) for p in ALL_FILES]
LIBRARY = [pytest.param(p, id=module_name(p)) for p in sources(*PACKAGES)]


def public_names(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return ast.literal_eval(node.value)
    return None


def definitions(tree: ast.Module) -> dict[str, ast.AST]:
    return {node.name: node for node in tree.body if isinstance(node, (*FUNCTION, ast.ClassDef))}


@pytest.mark.parametrize("path", EVERYWHERE)
def test_files_and_functions(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE, f"{lines} lines, at most {MAX_FILE}"
    long = []
    for node in ast.walk(parse(path)):
        if isinstance(node, FUNCTION):
            size = node.end_lineno - node.lineno + 1
            # A kernel body is one straight piece of code for one program of the grid: exempt by its name.
            if size > MAX_FUNCTION and not (path.is_relative_to(ROOT / "pallas_kernels") and "kernel" in node.name):
                long.append(f"{node.name}: {size} lines, at most {MAX_FUNCTION}")
    assert not long, "\n".join(long)


@pytest.mark.parametrize("path", LIBRARY)
def test_public_names_are_listed(path):
    if path.name.startswith("_") and path.name != "__init__.py":
        return
    tree = parse(path)
    names = public_names(tree)
    if names is None:
        holds_code = any(not isinstance(node, ast.Expr) for node in tree.body)
        assert not holds_code, "a public module needs __all__"
        return
    assert len(names) <= MAX_NAMES, f"{len(names)} public names, at most {MAX_NAMES}"
    assert len(set(names)) == len(names), "a name is listed twice"


@pytest.mark.parametrize("path", LIBRARY)
def test_what_is_public_is_documented(path):
    tree = parse(path)
    if tree.body:
        assert ast.get_docstring(tree) is not None, "the module docstring is the design note"
    found = definitions(tree)
    undocumented = [n for n in public_names(tree) or [] if n in found and not ast.get_docstring(found[n])]
    assert not undocumented, f"public without a docstring: {', '.join(undocumented)}"


@pytest.mark.parametrize("path", LIBRARY)
def test_docstrings_are_short(path):
    long = []
    for node in ast.walk(parse(path)):
        if isinstance(node, (*FUNCTION, ast.ClassDef)):
            size = len((ast.get_docstring(node) or "").splitlines())
            if size > MAX_DOCSTRING:
                long.append(f"{node.name}: docstring of {size} lines, at most {MAX_DOCSTRING}")
    assert not long, "\n".join(long)


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").iterdir()), ids=lambda p: p.name)
def test_scripts_are_short(path):
    if path.is_file():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= MAX_SCRIPT, f"{lines} lines, at most {MAX_SCRIPT}"
