"""How far a long run is: a bar with rate and time left where rich and a terminal are, else lines of text."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Callback = Callable[[int, int], None]
_LINE_EVERY = 10.0  # seconds between lines of text


@contextmanager
def progress_bar(
    wanted: bool | Callback | None, total: int, title: str
) -> Iterator[Callable[[int], None]]:
    """A function to be told of every further piece of bytes.

    wanted: None draws a bar if standard error is a terminal, True without one prints lines, False is silent;
    a function is called with (bytes done, bytes in all).
    """
    done = 0
    if callable(wanted):
        wanted(0, total)

        def tell(more: int) -> None:
            nonlocal done
            done += more
            wanted(done, total)

        yield tell
        return
    terminal = sys.stderr.isatty()
    if wanted is False or (wanted is None and not terminal):
        yield lambda more: None
        return
    bar = _bar() if terminal else None
    if bar is None:
        yield _printer(total, title)
        return
    with bar:
        task = bar.add_task(title, total=total)
        yield lambda more: bar.advance(task, more)


def _bar():
    try:
        from rich import progress as parts
        from rich.console import Console
    except ImportError:
        return None
    return parts.Progress(
        parts.TextColumn("{task.description}"),
        parts.BarColumn(),
        parts.TaskProgressColumn(),
        parts.DownloadColumn(),
        parts.TransferSpeedColumn(),
        parts.TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _printer(total: int, title: str) -> Callable[[int], None]:
    begun = time.monotonic()
    done, printed = 0, begun

    def tell(more: int) -> None:
        nonlocal done, printed
        done += more
        now = time.monotonic()
        if now - printed < _LINE_EVERY and done < total:
            return
        printed = now
        rate = done / max(now - begun, 1e-9)
        left = (total - done) / rate if rate else 0.0
        print(
            f"{title}: {100 * done / max(total, 1):.0f}%, {rate / 1e6:.0f} MB/s, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    return tell
