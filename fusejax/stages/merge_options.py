"""`fusejax <command> CONFIG --merge...`: the options of the section that may be absent."""

from fusejax.config import MergeConfig, RunConfig
from fusejax.stages.merge_recipes import flags_to_parameters

__all__ = ["with_merge_options"]

_SECTION, _PARAMETERS = "--merge.", "--merge.parameters."


def with_merge_options(config: RunConfig, words: list[str]) -> tuple[RunConfig, list[str]]:
    """Takes what the command line of a configuration says of merges and tyro cannot.

    Args:
        config: as it was read.
        words: the options that follow it.

    Returns:
        The configuration, with a section `merge` if an option is of it, and `--merge.parameters.*` set; the words that
        are left.
    """
    if not any(word.startswith(_SECTION) for word in words):
        return config, words
    left: list[str] = []
    taken: list[str] = []
    current = left
    for word in words:
        if word.startswith("--"):
            current = taken if word.startswith(_PARAMETERS) else left
        current.append("--" + word.removeprefix(_PARAMETERS) if current is taken and word.startswith("--") else word)
    merge = config.merge or MergeConfig()
    parameters = merge.parameters | flags_to_parameters(taken)
    return config.model_copy(update={"merge": merge.model_copy(update={"parameters": parameters})}), left
