"""The oracle's own gradient, by central differences in float64."""

import numpy as np
import pytest

from tests.pallas_kernels import oracle

OPTIONS = [
    {"divergence": d, "tail": t, "temperature": tau}
    for d in ("kl", "ce", "reverse_kl", "jsd")
    for t in ("bucket", "renormalize", "zero")
    for tau in (1.0, 2.0)
    if d != "reverse_kl" or t == "bucket"
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_oracle_gradient(options):
    rng = np.random.default_rng(0)
    z, p = rng.normal(size=11), np.array([0.4, 0.25, 0.05])
    sets = [{1, 4}, {7}, {0, 2, 9}]
    _, gradient = oracle.position(z, sets, p, 0.3, **options)
    step = 1e-6
    for v in range(len(z)):
        up, down = z.copy(), z.copy()
        up[v] += step
        down[v] -= step
        numeric = oracle.position(up, sets, p, 0.3, **options)[0] - oracle.position(down, sets, p, 0.3, **options)[0]
        assert abs(numeric / (2 * step) - gradient[v]) < 1e-8
