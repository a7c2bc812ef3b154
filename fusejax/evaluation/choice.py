"""Which model to trust where: weights from held-out bits per byte, and one model per document.

Weights of an ensemble may not come from the documents that it is measured on; those here take numbers from anywhere,
and the caller says where they are from. To take for each document the model that says *it* best is no method but a
bound: no rule that chooses one model per document does better. By what stands before the answer, it is a method
(Top1-PPL, FuseChat's baseline).
"""

from collections.abc import Sequence

import numpy as np

from fusejax.errors import InputError
from fusejax.evaluation.documents import Evaluation
from fusejax.types import Array

__all__ = ["choose", "lowest", "weights_from_bits_per_byte"]


def weights_from_bits_per_byte(bits_per_byte: Array) -> Array:
    """Returns softmax(-bits per byte) over the last axis.

    Args:
      bits_per_byte: [..., S] of S models on the same text.

    Raises:
      InputError: a value that is not finite.
    """
    scores = -_finite(bits_per_byte)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return scores / scores.sum(axis=-1, keepdims=True)


def lowest(scores: Array) -> Array:
    """Returns which of S models has the lowest score, [D] int of [D, S]; of equal ones the first."""
    return np.argmin(_finite(scores), axis=-1)


def choose(evaluations: Sequence[Evaluation], chosen: Array) -> Evaluation:
    """Takes each document's score from one model.

    Args:
      evaluations: of S models on the same D documents.
      chosen: [D] int in [0, S).

    Raises:
      InputError: the models scored different documents, or `chosen` is of another number.
    """
    indices = {tuple(document.index for document in evaluation.documents) for evaluation in evaluations}
    if len(indices) != 1:
        raise InputError("the models scored different documents; evaluate all on the same texts.")
    count = len(evaluations[0].documents)
    if len(chosen) != count:
        raise InputError(f"a model was chosen for {len(chosen)} documents, {count} were scored.")
    documents = tuple(evaluations[int(model)].documents[number] for number, model in enumerate(chosen))
    return Evaluation(documents, evaluations[0].empty)


def _finite(values: Array) -> Array:
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all() or not values.shape or not values.shape[-1]:
        raise InputError(f"bits per byte of models must be finite numbers, got {values.tolist()}.")
    return values
