"""What can be told before any work: a mistake in the last stage must not be found after days of the first."""

__all__ = ["check_before"]

from collections.abc import Collection

from fusejax.errors import InputError
from fusejax.io.models import open_config
from fusejax.io.tokenizers import check_vocabulary
from fusejax.merging.registry import resolve
from fusejax.stages.capture import describe
from fusejax.stages.context import Run
from fusejax.stages.fit import placement


def check_before(run: Run, names: Collection[str]) -> None:
    """Checks models, tokenizers, mesh, row length and merge of the stages that are going to run.

    Weights are not read; hub names are downloaded here.

    Raises:
      InputError: what would fail later, in the words of the stage that it concerns.
    """
    config = run.config
    if {"capture", "align", "train"} & set(names):
        for ref in (*config.sources, config.target):
            path = run.model_path(ref)
            source = describe(run, ref)
            if source.vocab_size is not None:
                check_vocabulary(run.tokenizer(ref), source.vocab_size, str(path))
            run.encoder(ref)  # has a chat template where the corpus has conversations
    if "train" in names:
        path = run.model_path(config.target)
        model = open_config(path)
        if config.train.seq_len > model.max_positions:
            raise InputError(f"train.seq_len is {config.train.seq_len}, but {path} has {model.max_positions} positions")
        placement(model, config.mesh.model_dump())
    if "merge" in names and config.merge is not None:
        targets = config.merge.targets or config.fusions
        resolve(config.merge.method, config.merge.parameters, len(targets), True)
