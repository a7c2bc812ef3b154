"""The table of bits per byte in its three forms."""

import io
import math

from rich.console import Console

from fusejax.report.tables import layout, markdown_table, rich_table

RESULTS = {
    "source:a": {"prose": 2.0, "code": 3.0, "mean": 2.5},
    "target": {"prose": 2.4, "code": 2.2, "mean": 2.3},
    "fused": {"prose": 2.0004, "mean": math.nan},
}


def test_columns_keep_their_order_and_the_mean_is_last():
    columns, rows = layout({"a": {"mean": 1.0, "x": 1.0}, "b": {"y": 2.0}})
    assert columns == ["x", "y", "mean"]
    assert rows[1] == ("b", [("", False), ("2.000", True), ("", False)])


def test_the_lowest_printed_value_of_a_column_is_marked_whoever_has_it():
    _, rows = layout(RESULTS)
    marked = {model: [best for _, best in cells] for model, cells in rows}
    assert marked == {"source:a": [True, False, False], "target": [False, True, True], "fused": [True, False, False]}


def test_markdown():
    assert markdown_table(RESULTS) == (
        "| bits per byte | prose | code | mean |\n"
        "|---|---:|---:|---:|\n"
        "| source:a | **2.000** | 3.000 | 2.500 |\n"
        "| target | 2.400 | **2.200** | **2.300** |\n"
        "| fused | **2.000** |  | nan |\n"
    )


def test_markdown_cells_cannot_break_the_table():
    assert "| a\\|b c |" in markdown_table({"a|b\nc": {"x": 1.0}})


def test_the_terminal_shows_every_number_and_names_with_brackets():
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(rich_table({"[bold]m": {"[x]": 1.25}, **RESULTS}))
    text = console.file.getvalue()
    assert "[bold]m" in text
    assert "[x]" in text
    assert all(number in text for number in ("1.250", "2.400", "3.000"))


def test_no_results_is_an_empty_table():
    assert layout({}) == ([], [])
