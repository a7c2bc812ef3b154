"""The ensembles of a run's sources and target, rows of the table beside its models.

| `evaluate.ensembles` | row | what it is |
|---|---|---|
| `mean` | `ensemble` | the mean of the models' probabilities |
| `weighted` | `ensemble-weighted` | weighted by softmax(-bits per byte of the *valid* split), domain by domain |
| `top1` | `ensemble-top1` | one model per document: the lowest bits per byte of what precedes the first trained byte |

Where nothing precedes it (a plain text is trained from its first byte), `top1` goes by the document itself. That looks
at what is measured, so it is no method there but the bound of all that choose a model per document.
"""

__all__ = ["ROWS", "ensembles"]

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusejax.config import ModelRef
from fusejax.data.corpus import Document, read_corpus
from fusejax.errors import InputError
from fusejax.evaluation import (
    Evaluation,
    bits_per_byte,
    by_domain,
    choose,
    ensemble_evaluations,
    lowest,
    weights_from_bits_per_byte,
)
from fusejax.io.progress import say
from fusejax.stages.context import Run
from fusejax.stages.scores import scores_of
from fusejax.types import Array

ROWS = {"mean": "ensemble", "weighted": "ensemble-weighted", "top1": "ensemble-top1"}
_ALL = "all"  # documents of every domain together


def ensembles(
    run: Run, members: Mapping[str, tuple[ModelRef, Evaluation]], documents: Sequence[Document]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the evaluations of the ensembles that the configuration asks for, and how their weights came about.

    Args:
      run: of which.
      members: name -> model and its scores of the test split.
      documents: of the test split.

    Returns:
      Row -> evaluation; row -> facts for people: weights by domain, or how often each model was chosen.
    """
    evaluations = [evaluation for _, evaluation in members.values()]
    refs = {name: ref for name, (ref, _) in members.items()}
    found, facts = {}, {}
    for kind in run.config.evaluate.ensembles:
        row = ROWS[kind]
        if kind == "mean":
            found[row] = ensemble_evaluations(evaluations)
        elif kind == "weighted":
            weights = _weights(run, refs, {document.domain for document in documents})
            of_each = [weights[documents[score.index].domain] for score in evaluations[0].documents]
            found[row] = ensemble_evaluations(evaluations, weights=np.array(of_each))
            named = {domain: dict(zip(members, own.tolist(), strict=True)) for domain, own in weights.items()}
            facts[row] = {"weights": named}
        else:
            found[row], facts[row] = _top1(run, refs, evaluations, documents)
    return found, facts


def _weights(run: Run, refs: Mapping[str, ModelRef], domains: set[str]) -> dict[str, Array]:
    """Weights [S] of every domain, from the valid split; of all its documents where it has none of a domain."""
    documents = read_corpus(run.corpus_dir, "valid")
    if not len(documents):
        raise InputError(
            f"{run.corpus_dir} has no valid documents, from which ensemble-weighted takes its weights: raise "
            "corpus.valid_fraction, give corpus.valid, or leave `weighted` out of evaluate.ensembles"
        )
    of = [document.domain for document in documents]
    tables = []
    for name, ref in refs.items():
        evaluation = scores_of(run, name, ref, documents, part="valid")
        tables.append(by_domain(evaluation, of) | {_ALL: evaluation.bits_per_byte})
    weights = {}
    for domain in sorted(domains):
        seen = domain if all(domain in table for table in tables) else _ALL
        if seen == _ALL:
            say(f"evaluate: no valid document of {domain}: ensemble-weighted takes the weights of all domains there")
        weights[domain] = weights_from_bits_per_byte(np.array([table[seen] for table in tables]))
    return weights


def _top1(
    run: Run, refs: Mapping[str, ModelRef], evaluations: Sequence[Evaluation], documents: Sequence[Document]
) -> tuple[Evaluation, dict[str, Any]]:
    """One model per document, and how often each was chosen and by what."""
    indices = [score.index for score in evaluations[0].documents]
    criteria = np.stack([_by_document(evaluation, indices) for evaluation in evaluations], axis=1)
    by_prompt: Array = np.zeros(len(indices), bool)
    if any(document.spans is not None for document in documents):
        prompts = [scores_of(run, name, ref, documents, part="prompt") for name, ref in refs.items()]
        of_prompts = np.stack([_by_document(evaluation, indices) for evaluation in prompts], axis=1)
        by_prompt = np.isfinite(of_prompts).all(axis=1)
        criteria = np.where(by_prompt[:, None], of_prompts, criteria)
    chosen = lowest(criteria)
    counts = Counter(list(refs)[int(model)] for model in chosen)
    facts = {"chosen": {name: counts[name] for name in refs}, "by_prompt": int(by_prompt.sum())}
    return choose(evaluations, chosen), facts | {"by_document": int((~by_prompt).sum())}


def _by_document(evaluation: Evaluation, indices: Sequence[int]) -> Array:
    """Bits per byte of the documents with these indices, [D]; not a number where one was not scored."""
    found = {d.index: bits_per_byte(d.nll_nats, d.n_bytes) for d in evaluation.documents}
    return np.array([found.get(index, np.nan) for index in indices])
