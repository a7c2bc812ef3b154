"""Reading the project's Markdown: fenced code, links, commands."""

import re
from pathlib import Path

from tests.paths import ROOT

__all__ = ["commands", "documents", "links", "snippets"]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


def documents() -> list[Path]:
    """Returns the Markdown files of the project."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def snippets(path: Path, language: str) -> list[str]:
    """Returns the fenced code of a language, in order."""
    return [code for name, code in _FENCE.findall(path.read_text(encoding="utf-8")) if name == language]


def links(path: Path) -> list[str]:
    """Returns the targets of the links to files of the project, without their anchors."""
    found = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    return [link.split("#")[0] for link in found if not re.match(r"[a-z]+:|#", link)]


def commands(path: Path) -> set[str]:
    """Returns the words that follow `fusejax` where it is used as a command."""
    text = path.read_text(encoding="utf-8")
    code = [*re.findall(r"`([^`\n]+)`", text), *"\n".join(snippets(path, "bash")).splitlines()]
    return {match[1] for line in code if (match := re.match(r"(?:\.venv/bin/)?fusejax ([a-z-]+)", line.strip()))}
