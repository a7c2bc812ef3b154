"""What is declared, built and tracked: dependencies, the wheel, no address of a machine or an index, sound scripts."""

import configparser
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fusejax
from tests.paths import ROOT
from tests.repo.tree import PACKAGES, sources, third_parties

pytestmark = pytest.mark.once

# Imported name -> distribution, where they differ; `google` is `google.protobuf`.
DISTRIBUTIONS = {"yaml": "pyyaml", "orbax": "orbax-checkpoint", "google": "protobuf", "lm_eval": "lm-eval"}
# Declared although nothing here imports them.
INDIRECT = {
    "jinja2": "transformers renders chat templates with it and does not install it",
    "transformers": "reads and writes the tokenizers and configurations of other programs",
    "safetensors": "weights; the reader may be our own",
}


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirement_names(text: str) -> set[str]:
    """Returns the normalised names of the requirements of one field."""
    names = (re.match(r"[A-Za-z0-9._-]+", line.strip()) for line in text.splitlines())
    return {name[0].lower().replace("_", "-") for name in names if name}


def imported() -> dict[str, str]:
    """Returns distribution -> a file that imports it."""
    found = {}
    for path in sources(*PACKAGES):
        for top, line in third_parties(path):
            name = DISTRIBUTIONS.get(top, top).lower().replace("_", "-")
            found.setdefault(name, f"{path.relative_to(ROOT)}:{line}")
    return found


def tracked() -> list[Path]:
    """Returns the files under version control, skipping where there is none (an unpacked archive)."""
    result = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in result.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_every_import_is_declared():
    config = setup_cfg()
    declared = requirement_names(config["options"]["install_requires"])
    optional = set().union(*(requirement_names(config["options.extras_require"][x]) for x in ("torch", "eval")))
    missing = {name: where for name, where in imported().items() if name not in declared | optional | {"jaxlib"}}
    assert not missing, f"imported but not in setup.cfg: {missing}"


def test_every_dependency_is_used():
    declared = requirement_names(setup_cfg()["options"]["install_requires"])
    unused = declared - set(imported()) - set(INDIRECT)
    assert not unused, f"in setup.cfg but imported by nothing: {sorted(unused)}"


def test_the_base_install_has_neither_torch_nor_tensorflow():
    declared = requirement_names(setup_cfg()["options"]["install_requires"])
    assert not declared & {"torch", "tensorflow", "tensorflow-cpu", "torchvision"}


def test_tested_versions_cover_the_dependencies_and_name_no_index():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert all(re.fullmatch(r'[\w.-]+==[\w.]+( ; python_version (<|>=) "3\.12")?', line) for line in lines)
    pinned = requirement_names(text)
    config = setup_cfg()
    needed = requirement_names(config["options"]["install_requires"])
    needed |= requirement_names(config["options.extras_require"]["test"])
    assert not needed - pinned, f"not in constraints.txt: {sorted(needed - pinned)}"


@pytest.mark.slow
def test_the_wheel_holds_the_two_packages_and_nothing_else(tmp_path):
    try:
        version = int(importlib.metadata.version("setuptools").split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        version = 0
    if version < 77:
        pytest.skip("needs setuptools 77 or newer, which the test extra installs")
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in (*PACKAGES, "tests", "benchmarks", "scripts", "configs"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        "out",
    ]
    result = subprocess.run([*command, "-q"], cwd=copy, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (wheel,) = (copy / "out").glob("*.whl")
    assert wheel.name == f"fusejax-{fusejax.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    info = f"fusejax-{fusejax.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {*PACKAGES, info}
    expected = {str(path.relative_to(ROOT)) for path in sources(*PACKAGES)} | {f"{name}/py.typed" for name in PACKAGES}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "fusejax" / "parallel" / "flags").glob("*.yaml")}
    assert {name for name in names if not name.startswith(info)} == expected
    assert f"{info}/licenses/LICENSE" in names
    entry_points = zipfile.ZipFile(wheel).read(f"{info}/entry_points.txt").decode()
    assert "fusejax = fusejax.cli:main" in entry_points


def test_no_machine_path_and_no_index_address_is_tracked():
    slash = "/"  # the patterns are put together here so that they do not find this file
    homes = "|".join(("home" + slash + r"\w", "root" + slash, "Users" + slash + r"\w", "work" + slash))
    indexes = "|".join(("--(extra-)?index" + "-url", "--find" + "-links", r"https?://[^ \"]+\.whl", "opt/" + "pypi"))
    pattern = re.compile(rf"(?<![\w.$}}-])/({homes})|{indexes}")
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
            for number, line in enumerate(text.splitlines(), start=1)
            if pattern.search(line)
        ]
    assert not found, "\n".join(found)


def test_large_files_are_not_tracked():
    large = [str(path.relative_to(ROOT)) for path in tracked() if path.stat().st_size > 1_000_000]
    assert not large, f"above 1 MB: {large}"


def test_scripts_are_executable_and_sound():
    scripts = [*sorted((ROOT / "scripts").rglob("*.sh")), ROOT / "scripts" / "slurm.sbatch", ROOT / ".ci" / "run"]
    assert all(os.access(path, os.X_OK) for path in scripts if not path.name.endswith("common.sh"))
    for path in scripts:
        assert subprocess.run(["bash", "-n", path]).returncode == 0
    beside = Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.is_file() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed; the test extra installs it")
    result = subprocess.run([program, "-x", *map(str, scripts)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
