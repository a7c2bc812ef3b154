"""One page about an alignment: what became of the positions, how coarse the symbols are, where the sides disagree.

White space inside tokens and text is made visible: a space is "·", a line break "⏎", a tabulator "⇥". Everything
that comes from the text is escaped.
"""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusejax.report.page import page, picture, section, table, write_page
from fusejax.report.plots import plot_alignment
from fusejax.report.spans import VISIBLE

__all__ = ["build_alignment_report"]

CONTEXT, LONGEST = 60, 240  # bytes around a span, bytes of a span that are shown


def build_alignment_report(
    directory: Path,
    facts: Mapping[str, Any],
    details: Mapping[str, Any],
    *,
    texts: Sequence[str],
    source: str,
    target: str,
) -> Path:
    """Writes `alignment.html` and `alignment.png`.

    Args:
        directory: made where it is missing.
        facts: from `fusejax.alignment.summary`; the `doc_id` of a worst span is an index into `texts`.
        details: from `fusejax.alignment.details.alignment_details`.
        texts: the documents.
        source, target: names of the tokenizers.

    Returns:
        Path of the page, complete or not there at all.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    outcomes = {name: float(facts[name]) for name in ("aligned", "conditioned", "dropped")}
    image = plot_alignment(
        outcomes, details["group_sizes"], directory / "alignment.png", agreement=facts["symbol_agreement"]
    )
    sections = [
        section(
            "Positions",
            "A position of the target is aligned where a position of the source ends at the same byte; elsewhere the "
            "target is trained by the causal LM loss alone. Agreement: both true next tokens have the same symbol. "
            "Full resolution: that symbol is the target's token itself.",
            _numbers(facts, details),
            picture(image, "Shares of aligned and dropped positions, and the sizes of the groups of true symbols"),
        ),
        section(
            "Disagreements",
            "The most frequent pairs of true next tokens that have different symbols: there supervision contradicts "
            "the text.",
            _disagreements(details["disagreements"]),
        ),
        section(
            "Longest stretches without agreeing supervision",
            "In bold what no aligned, agreeing position predicts, with the text around it.",
            _spans(facts["worst_spans"], texts),
        ),
        section(
            "Largest groups",
            "Symbols that stand for many target tokens: of these only the common beginning is supervised. Use: share "
            "of the agreeing positions whose true next token is in the group.",
            _groups(details["largest_groups"]),
        ),
    ]
    head = f"{facts['documents']:,} documents · {facts['n_bytes']:,} bytes · {facts['positions']:,} target positions"
    title = f"Alignment: {target} from {source}"
    return write_page(directory / "alignment.html", page(title, html.escape(head), "".join(sections)))


def _numbers(facts: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    rows = [
        ("aligned, of all positions", _percent(facts["aligned_share"])),
        ("agreement, of aligned positions", _percent(facts["symbol_agreement"])),
        ("full resolution, of aligned positions", _percent(facts["full_resolution_share"])),
        ("true symbol in a group of more than 256, of agreeing positions", _percent(details["larger_than_last"])),
        ("mean log2 of the group size", f"{details['mean_log2_members']:.2f}"),
        ("documents whose bytes a tokenizer changed", f"{facts['inexact']:,}"),
    ]
    return table(["", "value"], [(name, f"<td>{value}</td>") for name, value in rows])


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.2f} %"


def _disagreements(pairs: Sequence[Mapping[str, Any]]) -> str:
    if not pairs:
        return "<p>None.</p>\n"
    columns = ("source", "target", "source_symbol", "target_symbol")
    rows = [
        (f"{pair['count']:,}", "".join(f"<td><code>{_visible(pair[column])}</code></td>" for column in columns))
        for pair in pairs
    ]
    return table(["count", "source's token", "target's token", "source's symbol", "target's symbol"], rows)


def _groups(groups: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            f"{group['members']:,}",
            f"<td><code>{_visible(group['symbol'])}</code></td><td>{_percent(group['share'])}</td>",
        )
        for group in groups
        if group["members"] > 1
    ]
    return table(["tokens", "symbol", "use"], rows) if rows else ""


def _spans(spans: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> str:
    rows = []
    for span in spans:
        text = texts[int(span["doc_id"])].encode("utf-8", "replace")
        start, stop = span["start"], span["stop"]
        shown = min(stop, start + LONGEST)
        parts = (text[max(0, start - CONTEXT) : start], text[start:shown], text[stop : stop + CONTEXT])
        before, inside, after = (_visible(part.decode("utf-8", "replace")) for part in parts)
        cut = "" if shown == stop else " […] "
        where = f"{int(span['doc_id'])}: {start:,}-{stop:,}"
        rows.append((where, f'<td class="text"><code>{before}<b>{inside}</b>{cut}{after}</code></td>'))
    return table(["document: bytes", "text"], rows) if rows else ""


def _visible(text: str | None) -> str:
    return "no symbol" if text is None else html.escape(text.translate(VISIBLE))
