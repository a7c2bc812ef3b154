"""What the documents name exists: files, commands, modules, pages."""

import re
import subprocess
import sys

import pytest
import yaml

from fusejax.cli import COMMANDS
from tests.paths import ROOT
from tests.repo.markdown import commands, documents, links

pytestmark = pytest.mark.once

DOCUMENTS = [pytest.param(path, id=str(path.relative_to(ROOT))) for path in documents()]


@pytest.mark.parametrize("path", DOCUMENTS)
def test_links_lead_somewhere(path):
    broken = [link for link in links(path) if not (path.parent / link).exists()]
    assert not broken, f"no such file: {broken}"


@pytest.mark.parametrize("path", DOCUMENTS)
def test_commands_exist(path):
    unknown = commands(path) - set(COMMANDS)
    assert not unknown, f"no such command: {sorted(unknown)}"


@pytest.mark.parametrize("path", DOCUMENTS)
def test_paths_in_code_exist(path):
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"`((?:fusejax|pallas_kernels|tests|scripts|configs|benchmarks)/[\w./-]+)`", text)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing, f"no such file: {missing}"


@pytest.mark.parametrize("path", DOCUMENTS)
def test_modules_shown_from_docstrings_exist(path):
    for name in re.findall(r"^::: ([\w.]+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
        file = ROOT.joinpath(*name.split("."))
        assert file.with_suffix(".py").is_file() or (file / "__init__.py").is_file(), f"no module {name}"


def test_the_command_page_lists_every_command():
    assert commands(ROOT / "docs" / "cli.md") == set(COMMANDS)
    assert not set(COMMANDS) - set(re.findall(r"[a-z]+", (ROOT / "README.md").read_text(encoding="utf-8")))


def test_the_site_shows_every_page():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = set(re.findall(r"[\w/]+\.md", str(site["nav"])))
    notes = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs" / "notes").rglob("*.md")}
    assert pages == {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")} - notes


def test_help_names_every_command():
    result = subprocess.run([sys.executable, "-m", "fusejax", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert set(COMMANDS) <= set(re.findall(r"^  ([a-z]+) ", result.stdout, flags=re.MULTILINE))
