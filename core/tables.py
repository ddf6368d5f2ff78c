"""Parquet tables of artifacts."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq


def read_table(path: Path, **options: Any) -> Any:
    """A Parquet file as an Arrow table, read by this thread: without memory for a thread of its own, Arrow waits forever."""
    return pq.read_table(path, use_threads=False, pre_buffer=False, **options)
