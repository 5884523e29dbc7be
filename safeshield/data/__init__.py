"""Logged data: the dataset, its labels and files, its card, and the collection of logs."""

from safeshield.data.card import DatasetCard, card_of
from safeshield.data.collect import collect
from safeshield.data.dataset import OfflineDataset
from safeshield.data.labels import binary_labels, label_reach

__all__ = [
    "DatasetCard",
    "OfflineDataset",
    "binary_labels",
    "card_of",
    "collect",
    "label_reach",
]
