"""Data: from a user's rows to examples, and the order in which steps take them."""

from zotune.data.dataset import Dataset, load
from zotune.data.order import BatchOrder

__all__ = ["BatchOrder", "Dataset", "load"]
