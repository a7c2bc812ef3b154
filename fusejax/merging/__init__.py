"""Merging of parameter trees: pure functions of one matrix, and what applies them to whole trees."""

from fusejax.merging.registry import MERGE_METHODS, MergeMethod, Parameter
from fusejax.merging.trees import merge_leaf, merge_trees

__all__ = ["MERGE_METHODS", "MergeMethod", "Parameter", "merge_leaf", "merge_trees"]
