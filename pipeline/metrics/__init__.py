"""Metrics are values: accumulated on the device, merged across batches and ranks, computed on the host.

A metric is a function of ``(outputs, target)``, such as those here, or an object with ``update``,
``compute`` and ``reset``, such as any of torchmetrics, as it is. Functions read nothing from the device
before the end. What an object does in ``update`` is its own affair: of torchmetrics, the multi-class
accuracy and what is like it read nothing, but the binary ones look at the values of every batch, with
``validate_args`` three times, and then each batch waits for the device (`Settings.detect_host_reads`
names the line).
"""

from pipeline.metrics.classification import accuracy, top_k_accuracy
from pipeline.metrics.collection import MetricSet
from pipeline.metrics.mean import Mean
from pipeline.metrics.over_ranks import merge_over_ranks

__all__ = ["Mean", "MetricSet", "accuracy", "merge_over_ranks", "top_k_accuracy"]
