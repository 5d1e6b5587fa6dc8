"""The terminal: tables and a progress bar by rich where it is installed, plain text elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

try:
    import rich.console
    import rich.progress
    import rich.table
except ImportError:
    rich = None

Row = Sequence[str]


def say(text: str) -> None:
    """A line of prose."""
    if rich:
        rich.console.Console(highlight=False).print(text, markup=False, soft_wrap=True)
    else:
        print(text, flush=True)


def table(title: str, columns: Row, rows: Sequence[Row]) -> None:
    """A table whose first column is text and whose others are figures."""
    if not rich:
        print(f"\n{title}\n{plain(columns, rows)}", flush=True)
        return
    shown = rich.table.Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        shown.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    console = rich.console.Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe has no width to fit in
        console = rich.console.Console(highlight=False, width=190)
    console.print(shown)


def plain(columns: Row, rows: Sequence[Row]) -> str:
    """The same table as aligned text."""
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]

    def line(cells: Row) -> str:
        first, *others = cells
        padded = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
        return "  ".join(padded).rstrip()

    return "\n".join([line(columns), "  ".join("-" * width for width in widths), *map(line, rows)])


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[str], None]]:
    """Yields a function to call at the start of each of ``total`` steps, with what the step is about."""
    if rich and sys.stdout.isatty():
        with _rich_bar() as bar:
            task = bar.add_task(title, total=total, what="")
            started = False

            def advance(what: str) -> None:
                nonlocal started
                bar.update(task, advance=int(started), what=what)
                started = True

            yield advance
            bar.update(task, completed=total, what="")
        return

    began, spoken, step = time.monotonic(), time.monotonic(), 0

    def note(what: str) -> None:
        nonlocal spoken, step
        step += 1
        if time.monotonic() - spoken > 10:
            spoken = time.monotonic()
            print(f"{title}: {step} of {total}, {spoken - began:.0f} s so far ({what})", flush=True)

    yield note
    print(f"{title}: done in {time.monotonic() - began:.0f} s", flush=True)


def _rich_bar():
    p = rich.progress
    columns = ("[bold]{task.description}", p.BarColumn(), p.MofNCompleteColumn(), p.TimeElapsedColumn())
    return p.Progress(*columns, p.TimeRemainingColumn(), "{task.fields[what]}", transient=True)
