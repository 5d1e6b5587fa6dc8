"""Reports as tables: by rich where it is installed, else in aligned columns of plain text."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def rich_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str]):
    """A rich.table.Table; the columns named in `right` are aligned to the right, the others fold where too long."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def text(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str], width: int = 110
) -> str:
    """The same table as text without colours."""
    try:
        from rich.console import Console
    except ImportError:
        grid = [columns, *rows]
        widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
        flush = [str.rjust if column in right else str.ljust for column in columns]
        lines = ("  ".join(f(cell, w) for f, cell, w in zip(flush, row, widths, strict=True)) for row in grid)
        return "\n".join([title, *(f"  {line.rstrip()}" for line in lines)])
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(rich_table(title, columns, rows, right))
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())
