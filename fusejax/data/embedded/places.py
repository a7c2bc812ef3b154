"""Which files of the running interpreter may enter the embedded corpus, and under which names.

Only the interpreter's own directories are read: the standard library, the installed packages and the C headers that
come with both. A file is known by its *label*, `<group>/<path in the group>`, which holds nothing of the machine; a
*group* is an installed package, `stdlib`, `pydoc` or `include`, and sampling takes turns between groups.

Deliberately not read: tests, vendored copies of other packages, fusejax itself (an installed and a checked-out
fusejax give the same corpus), `/usr/include`, user files, links that lead out of the interpreter's directories.
"""

__all__ = ["SourceFile", "find_files"]

import dataclasses
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator

_SKIPPED_DIRECTORIES = frozenset(
    re.findall(
        r"\S+",
        "__pycache__ test tests idle_test testdata _vendor vendor vendored _vendored site-packages dist-packages "
        "encodings lib2to3 turtledemo ensurepip node_modules fusejax pallas_kernels",
    )
)
_SKIPPED_FILES = ("_sysconfigdata", "pydoc_topics", "topics.py", "direct_url.json", "entry_points", "CMakeLists")


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class SourceFile:
    """One file: its group, its label without machine paths, and where it is here."""

    group: str
    label: str
    path: str

    @property
    def suffix(self) -> str:
        return os.path.splitext(self.path)[1]


def find_files(roots: Iterable[tuple[str, str | os.PathLike[str]]] | None = None) -> list[SourceFile]:
    """Lists the files that may be read, sorted by label.

    Args:
      roots: pairs (group, directory); an empty group means that each entry of the directory is a group of its own
        (site-packages). Default: the directories of the running interpreter.
    """
    found: dict[str, SourceFile] = {}
    roots = list(_interpreter_roots() if roots is None else roots)
    inside = tuple(os.path.realpath(path) for _, path in roots)
    for group, root in roots:
        for file in _walk(group, os.fspath(root), inside):
            found.setdefault(file.label, file)
    return sorted(found.values())


def _interpreter_roots() -> Iterator[tuple[str, str]]:
    paths = sysconfig.get_paths()
    yield "stdlib", paths["stdlib"]
    yield "include", paths["include"]
    prefixes = tuple({os.path.realpath(p) for p in (sys.prefix, sys.base_prefix)})
    listed = [p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages")]
    for path in dict.fromkeys([paths["purelib"], paths["platlib"], *listed]):
        if os.path.isdir(path) and os.path.realpath(path).startswith(prefixes):
            yield "", path


def _walk(group: str, root: str, inside: tuple[str, ...]) -> Iterator[SourceFile]:
    for directory, names, files in os.walk(root):
        names[:] = sorted(n for n in names if n not in _SKIPPED_DIRECTORIES and not n.startswith("."))
        for name in files:
            path = os.path.join(directory, name)
            if (
                name.startswith(_SKIPPED_FILES)
                or name.endswith("_test.py")
                or (os.path.islink(path) and not _leads_inside(path, inside))
            ):
                continue
            relative = path[len(root) :].replace(os.sep, "/").lstrip("/")
            label = f"{group}/{relative}" if group else relative
            yield SourceFile(group or _package(relative), label, path)


def _package(relative: str) -> str:
    """The package a file in site-packages belongs to; a distribution's metadata joins the package's group."""
    top = relative.split("/", 1)[0]
    if top.endswith((".dist-info", ".egg-info")):
        top = top.split("-", 1)[0]
    return top.removesuffix(".py").lower()


def _leads_inside(path: str, inside: tuple[str, ...]) -> bool:
    real = os.path.realpath(path)
    return any(os.path.commonpath([real, root]) == root for root in inside)
