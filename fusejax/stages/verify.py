"""verify: every checksum of every artefact under a directory."""

__all__ = ["command"]

from pathlib import Path

from fusejax.errors import InputError
from fusejax.io.manifest import MANIFEST, verify_directory
from fusejax.io.progress import progress
from fusejax.stages.command import Result, parser


def command(name: str, words: list[str]) -> Result:
    """`fusejax verify DIR`: exit 0, or exit 2 and what is bad."""
    arguments = parser(name, "Check size and checksum of every file listed by a manifest under DIR.")
    arguments.add_argument("directory", type=Path, help="artefact, model or run directory")
    given = arguments.parse_args(words)
    found = sorted(path.parent for path in given.directory.rglob(MANIFEST))
    if not found:
        raise InputError(f"no {MANIFEST} under {given.directory}: there is nothing to verify")
    bad: list[str] = []
    with progress("verify", total=len(found), unit="artefacts") as bar:
        for directory in found:
            try:
                bad += verify_directory(directory)
            except InputError as error:
                bad.append(str(error))
            bar.update(1)
    text = f"{len(found)} artefacts, " + (f"{len(bad)} bad:\n  " + "\n  ".join(bad) if bad else "all good")
    return Result({"artefacts": len(found), "bad": bad}, text, exit_code=2 if bad else 0)
