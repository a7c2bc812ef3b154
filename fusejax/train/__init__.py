"""Training: the optimiser, the step and the metrics file; the loop (shell) is imported as `fusejax.train.loop`."""

from fusejax.train.metrics import MetricsWriter, read_metrics
from fusejax.train.optimizer import make_optimizer, make_schedule, warmup_steps_from_ratio
from fusejax.train.step import init_train_state, make_train_step

__all__ = [
    "MetricsWriter",
    "init_train_state",
    "make_optimizer",
    "make_schedule",
    "make_train_step",
    "read_metrics",
    "warmup_steps_from_ratio",
]
