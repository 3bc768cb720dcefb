"""The logger of those processes of a distributed run that log nothing.

train.py gives it to all but the first process. Lightning's own callbacks, such as
LearningRateMonitor, refuse a trainer without a logger in any process. Lightning's DummyLogger
cannot take its place: with it, a run of two processes hangs (Lightning 2.6.6).
"""

from typing import Any

from pytorch_lightning.loggers.logger import Logger


class NoLogger(Logger):
    """Takes everything and writes nothing."""

    @property
    def name(self) -> str:
        return ""  # as that of MetricsCSV, so that callbacks find the same folder in each process

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass
