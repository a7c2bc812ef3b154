"""`fusejax <command> CONFIG --merge...`: the options of merges, of which there may be none, one or several."""

import re

from fusejax.config import MergeConfig, RunConfig
from fusejax.config.merges import default_name
from fusejax.errors import InputError
from fusejax.stages.merge_recipes import flags_to_parameters

__all__ = ["with_merge_options"]

_OPTION = re.compile(r"--merge\.(?:(\d+)\.)?(.+)", re.DOTALL)
_PARAMETERS = "parameters."


def with_merge_options(config: RunConfig, words: list[str]) -> tuple[RunConfig, list[str]]:
    """Takes what the command line of a configuration says of merges and tyro cannot.

    Options are `--merge.method` where there is one merge or none, `--merge.1.method` where there are several.

    Args:
        config: as it was read.
        words: the options that follow it.

    Returns:
        The configuration, with a merge if an option is of one, and `--merge.parameters.*` set; the words that are
        left, their merges numbered.

    Raises:
        InputError: an option names none of several merges, or one that is not there.
    """
    if not any(_OPTION.match(word) for word in words):
        return config, words
    merges = list(config.merge) or [MergeConfig()]
    left: list[str] = []
    taken: list[list[str]] = [[] for _ in merges]
    current = left
    for word in words:
        if (found := _OPTION.match(word)) is not None:
            index = _index(found, merges)
            ours = found[2].startswith(_PARAMETERS)
            current = taken[index] if ours else left
            word = "--" + found[2].removeprefix(_PARAMETERS) if ours else f"--merge.{index}.{found[2]}"
        elif word.startswith("--"):
            current = left
        current.append(word)
    for index, (merge, flags) in enumerate(zip(merges, taken, strict=True)):
        changes = {"parameters": merge.parameters | flags_to_parameters(flags)} | _renamed(merge, index, left)
        merges[index] = merge.model_copy(update=changes)
    return config.model_copy(update={"merge": tuple(merges)}), left


def _index(found: re.Match[str], merges: list[MergeConfig]) -> int:
    """Which merge an option is of."""
    names = ", ".join(f"{index} ({merge.name})" for index, merge in enumerate(merges))
    if found[1] is None and len(merges) > 1:
        raise InputError(f"{found[0]} may be of several merges: {names}. Say which: --merge.0.{found[2]}")
    index = int(found[1] or 0)
    if index >= len(merges):
        raise InputError(f"{found[0]}: there is no merge {index}; merges are {names}")
    return index


def _renamed(merge: MergeConfig, index: int, words: list[str]) -> dict[str, str]:
    """The name that goes with another method, where the merge is called after its method."""
    flag = f"--merge.{index}.method"
    for position, word in enumerate(words):
        if word.split("=")[0] == flag and merge.name == default_name(merge.method):
            method = word.partition("=")[2] or "".join(words[position + 1 : position + 2])
            return {"name": default_name(method)}
    return {}
