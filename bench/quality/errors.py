"""Standard errors of means over edits that are not independent: of one concept, or on the model together."""

import math
from collections.abc import Sequence

from unike_kernels.evaluation.metrics import clustered_error


def larger(first: float, second: float) -> float:
    """The larger of two errors; the first where the second is none: of a single sequence."""
    return first if math.isnan(second) else max(first, second)


def error_of(
    values: Sequence[float], labels: Sequence[tuple[str, str]], *sequences: Sequence[tuple[str, str]]
) -> float:
    """The largest standard error of a mean: by concept, and by each of the ways in which edits stood together."""
    error = clustered_error(values, [concept for _, concept in labels])
    for together in sequences:
        if together:
            error = larger(error, clustered_error(values, together))
    return error
