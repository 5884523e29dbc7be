"""Logged data: the dataset, its labels, its files, and how to collect it."""

from safeshield.data.collect import collect
from safeshield.data.dataset import OfflineDataset
from safeshield.data.labels import binary_labels, label_reach

__all__ = ["OfflineDataset", "binary_labels", "collect", "label_reach"]
