"""How commands print tables."""

from collections.abc import Iterable, Sequence

from rich import filesize
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Prints a table; whole names where the output is not a terminal, so that other programs can read it."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=400)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify='right' if column in right else 'left', overflow='fold')
    for row in rows:
        table.add_row(*map(escape, row))  # names with brackets are no markup
    console.print(table)


def print_fields(title: str, fields: Iterable[tuple[str, str]]) -> None:
    """Prints a title and aligned `name  value` lines."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(f'[bold]{title}[/]')
    fields = list(fields)
    width = max(len(name) for name, _ in fields)
    for name, value in fields:
        console.print(f'  [cyan]{name:<{width}}[/]  ', end='')
        console.print(value, markup=False)


def bytes_text(size: int) -> str:
    """`1.5 MB` for 1500000."""
    return filesize.decimal(size)
