"""glibc's malloc for large tensors. Imported before torch, so it imports nothing."""

from __future__ import annotations

import os
import sys

# Blocks up to 1 GiB come from the heap and freed memory stays with the process: no page faults on reuse.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}
MARK = "SOLERA_BENCH_MALLOC"  # set once the process has started itself again


def tune() -> None:
    """Start the process again with these settings: malloc reads them when it starts.

    Without them every large result lies on fresh pages, which costs as much as its arithmetic.
    """
    if MARK in os.environ or all(name in os.environ for name in MALLOC):
        return
    os.environ.update({**MALLOC, MARK: "1"})
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
