"""How much text a corpus will hold, before it is made: from its first documents, where there are many."""

__all__ = ["PlannedText", "planned_text"]

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fusejax.config import TextSource
from fusejax.data.corpus import Document, read_corpus
from fusejax.data.extent import share_read
from fusejax.data.readers import ReadCounts
from fusejax.io.manifest import MANIFEST
from fusejax.stages.context import Run
from fusejax.stages.prepare import Sample, read_source, read_text, select

_SAMPLE_BYTES = 16 << 20  # of each source


class PlannedText(NamedTuple):
    """The training text that `prepare` keeps, or would keep."""

    documents: Sequence[Document]  # all of it, or a sample
    scale: float  # so many times as much text as in `documents`
    exact: bool
    bounded: bool = True  # False: a source does not say how much it holds, so there may be much more

    @property
    def note(self) -> str:
        """What to say beside a size that follows from this text."""
        if self.exact:
            return ""
        read = sum(document.n_bytes for document in self.documents) / 1e6
        found = f" (an estimate from the first {read:.1f} MB of text"
        return f"{found})" if self.bounded else f"{found}; a source does not say how much more it holds)"


def planned_text(run: Run) -> PlannedText:
    """Returns the training text of a run without writing anything; of large sources only the first 16 MiB are read."""
    if (run.corpus_dir / MANIFEST).is_file():
        return PlannedText(read_corpus(run.corpus_dir, "train"), 1.0, True)
    corpus, beginnings = run.config.corpus, _Beginnings()
    chosen = select(read_text(corpus, open_source=beginnings.read), corpus, seed=run.config.split_seed, dropped=[0])
    documents = [document for name, document in chosen if name == "train"]
    if corpus.max_train_bytes is not None:
        sample = Sample(corpus.max_train_bytes)
        for document in documents:
            sample.add(document)
        kept = sample.kept() if beginnings.complete else [True] * len(documents)
        documents = [document for document, keep in zip(documents, kept, strict=True) if keep]
    if beginnings.complete:
        return PlannedText(documents, 1.0, True)
    found: dict[str, int] = {}
    for document in documents:
        found[document.domain] = found.get(document.domain, 0) + document.n_bytes
    most = corpus.max_train_bytes or float("inf")
    total = sum(min(size * beginnings.scale, most) for size in found.values())
    return PlannedText(documents, total / max(1, sum(found.values())), False, beginnings.bounded)


class _Beginnings:
    """Reads the beginning of sources and remembers how much more they hold."""

    def __init__(self) -> None:
        self.complete, self.bounded = True, True
        self._read, self._estimated = 0, 0.0

    @property
    def scale(self) -> float:
        """Text of the sources per text read."""
        return self._estimated / max(1, self._read)

    def read(self, source: TextSource) -> Iterator[Document]:
        """The first documents of a source."""
        counts, ended = ReadCounts(), True
        for document in read_source(source, counts):
            yield document
            if counts.bytes >= _SAMPLE_BYTES:
                ended = False
                break
        share = 1.0 if ended else share_read(Path(source.path), counts)
        if share is not None and source.limit:
            share = max(share, (counts.documents / source.limit))
        self.complete &= share == 1.0
        self.bounded &= share is not None
        self._read += counts.bytes
        self._estimated += counts.bytes / (share or 1.0)
