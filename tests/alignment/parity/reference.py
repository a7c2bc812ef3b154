"""The papers' dynamic program in plain Python, as an oracle."""

import math


def align(costs, *, source_step_first: bool) -> tuple[list[list[int]], int]:
    """(source positions beside each target position, cost of the path) of an [n][m] table of costs."""
    n, m = len(costs), len(costs[0])
    table = [[math.inf] * (m + 1) for _ in range(n + 1)]
    table[0][0] = 0
    for i in range(n):
        for j in range(m):
            table[i + 1][j + 1] = costs[i][j] + min(table[i][j + 1], table[i + 1][j], table[i][j])
    i, j = n - 1, m - 1
    beside: list[list[int]] = [[] for _ in range(m)]
    beside[j].append(i)
    while i or j:
        up, left = (table[i][j + 1], (i - 1, j)), (table[i + 1][j], (i, j - 1))
        options = [(table[i][j], (i - 1, j - 1)), *((up, left) if source_step_first else (left, up))]
        _, (i, j) = min(options, key=lambda option: option[0])
        beside[j].insert(0, i)
    return beside, table[n][m]
