"""FuseChat 1 and the tie-break by company in plain Python, written from their description, as oracles."""

import math

from tests.alignment.parity.reference import align


def levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(diagonal + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def fusechat_v1_path(source: list[str], target: list[str], marker: str) -> list[list[int]]:
    """Source positions beside each target position: edit distance of strings, a tenth where one holds the other."""
    costs = []
    for s in source:
        a, row = s.replace(marker, ""), []
        for t in target:
            b = t.replace(marker, "")
            distance = levenshtein(a, b)
            row.append(distance if a in b or b in a else 10 * distance)  # in tenths, so that sums are exact
        costs.append(row)
    return align(costs, source_step_first=True)[0]


def fusechat_v1_choice(beside: list[list[int]], source: list[str], target: list[str]) -> list[tuple]:
    """("one", position), ("mix", positions) or ("fallback",) for each target position."""
    found = []
    for own, positions in zip(target, beside, strict=True):
        pieces = [source[j] for j in positions]
        if len(positions) == 1:
            found.append(("one", positions[0]) if own in pieces[0] else ("fallback",))
            continue
        if own in pieces:
            found.append(("one", positions[pieces.index(own)]))
            continue
        inside = [j for j, piece in zip(positions, pieces, strict=True) if own in piece]
        if inside:
            found.append(("one", inside[0]))
            continue
        rest, covered = own, []
        for j, piece in zip(positions, pieces, strict=True):
            if rest.startswith(piece):
                rest, covered = rest[len(piece) :], [*covered, j]
        found.append(("mix", covered) if covered and not rest else ("fallback",))
    return found


def company(documents: list[list[str]], common: set[str], window: int = 5) -> dict[str, dict[str, int]]:
    """How often each string of the common ones stands within the window of every string."""
    counts: dict[str, dict[str, int]] = {}
    for document in documents:
        for at, token in enumerate(document):
            for near in range(max(0, at - window), min(len(document), at + window + 1)):
                if near != at and document[near] in common:
                    row = counts.setdefault(token, {})
                    row[document[near]] = row.get(document[near], 0) + 1
    return counts


def best_company(key: str, tied: list[str], ours: dict, theirs: dict) -> str:
    """The candidate whose company has the highest cosine with the source token's; the first where none has any."""
    mine = ours.get(key, {})
    scores = []
    for candidate in tied:
        row = theirs.get(candidate, {})
        dot = sum(count * row.get(name, 0) for name, count in mine.items())
        size = math.sqrt(sum(c * c for c in row.values())) * math.sqrt(sum(c * c for c in mine.values()))
        scores.append(dot / size if dot else 0.0)
    return tied[scores.index(max(scores))]
