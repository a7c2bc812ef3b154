"""What a run found, as tables, curves and one self-contained page. Draws what it is given, judges nothing."""

from fusejax.report.html import build_report
from fusejax.report.metrics import read_series
from fusejax.report.tables import accuracy_table, markdown_table, rich_table

__all__ = ["accuracy_table", "build_report", "markdown_table", "read_series", "rich_table"]
