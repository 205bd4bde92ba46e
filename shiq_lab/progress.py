"""A progress bar that shows itself only when the work lasts longer than two seconds."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
PATIENCE = 2.0  # seconds
_outermost = True  # a bar inside another one stays silent: a terminal shows one at a time


def progress(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Yield the items; after two seconds draw a bar on standard error (which a pipe of standard output never sees)."""
    global _outermost
    if not _outermost:
        yield from items
        return
    total = len(items) if total is None and hasattr(items, "__len__") else total  # type: ignore[arg-type]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    task = bar.add_task(label, total=total)
    begun, shown, _outermost = time.monotonic(), False, False
    try:
        for item in items:
            if not shown and time.monotonic() - begun > PATIENCE:
                bar.start()
                shown = True
            yield item
            bar.advance(task)
    finally:
        _outermost = True
        if shown:
            bar.stop()
