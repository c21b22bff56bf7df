"""Goes through a data loader once: what is in it that a training run would stumble over."""

from .report import ColumnRow, DataFault, DataReport
from .scanning import scan_data

__all__ = ["ColumnRow", "DataFault", "DataReport", "scan_data"]
