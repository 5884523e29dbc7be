"""Logged data: the dataset, its labels, its files and card, and how to collect it."""

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
