"""What a command returns, and how the commands that take a configuration read it."""

__all__ = ["Result", "parse_config", "parser", "positive_int"]

import argparse
from typing import Any, NamedTuple

from fusejax.config import RunConfig, load_config
from fusejax.errors import InputError


class Result(NamedTuple):
    """The outcome of a command."""

    data: dict[str, Any]  # printed by --json
    text: str = ""  # printed without it
    exit_code: int = 0


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that there are: not `None`, and not `False` of a switch."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """An argument parser for one command; `--json` is taken before it sees the words."""
    made = argparse.ArgumentParser(
        prog=f"fusejax {name}",
        description=description,
        epilog="--json prints one JSON object as the last line of standard output.",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    return made


def positive_int(word: str) -> int:
    """An argument that is a whole number of at least 1."""
    try:
        value = int(word)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no whole number of at least 1")
    return value


def parse_config(name: str, words: list[str], description: str) -> RunConfig:
    """Reads CONFIG and applies the overrides that follow it, such as `--train.learning-rate 2e-5`.

    A section that the configuration leaves out is begun by its options: `--merge.method ties`. Parameters of a merge,
    which have no fixed names, are `--merge.parameters.NAME VALUE ...`.

    Raises:
      InputError: no configuration is named, or it is not valid.
    """
    import tyro

    from fusejax.stages.merge_options import with_merge_options

    help_asked = any(word in ("-h", "--help") for word in words)
    rest = [word for word in words if word not in ("-h", "--help")]
    if not rest or rest[0].startswith("-"):
        if not help_asked:
            raise InputError(f"usage: fusejax {name} CONFIG.yaml [--section.key value ...]; see fusejax {name} --help")
        config = _example()
    else:
        config, rest = with_merge_options(load_config(rest[0]), rest[1:])
    return tyro.cli(
        RunConfig,
        default=config,
        config=(tyro.conf.AvoidSubcommands,),  # `--merge.method`, not `merge:merge-config --merge.method`
        prog=f"fusejax {name} CONFIG",
        description=description,
        args=[*rest, *(["--help"] if help_asked else [])],
    )


def _example() -> RunConfig:
    """Stands in for a configuration file when only help is asked for."""
    return RunConfig.model_validate(
        {
            "output": "runs/example",
            "target": "path/to/target",
            "sources": ["path/to/source"],
            "corpus": {"train": [{"path": "train.jsonl"}]},
        }
    )
