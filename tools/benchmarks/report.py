"""Benchmark rows as a table in Markdown, as CSV and as curves."""

import csv
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .ops import BASELINES, PASSES
from .timing import Row

# Panels of the plot: the sweep, its title, whether time is per pixel
PANELS = (
    ('equal work', 'batches of about as many pixels', True),
    ('one image', 'one image', False),
    ('batch', 'images of {side}x{side}', False),
)
COLOURS = ('#c0392b', '#2c3e70', '#1b7f4d')


class Table:
    """Prints rows as they come; a new heading where the operator, the sweep or the columns change."""

    def __init__(self):
        self._widths, self._title = {}, None

    def add(self, row: Row) -> None:
        title = ', '.join(str(row[key]) for key in ('op', 'sweep') if key in row)
        cells = {key: _text(value) for key, value in row.items() if key not in ('op', 'sweep')}
        if title != self._title or cells.keys() != self._widths.keys():
            self._title, self._widths = title, {key: max(len(key), len(cell), 8) for key, cell in cells.items()}
            print(f'\n{title}\n' if title else '')
            self._print({key: key for key in cells})
            print('|' + '|'.join('-' * (width + 1) + ':' for width in self._widths.values()) + '|')
        self._print(cells)

    def _print(self, cells: dict[str, str]) -> None:
        print('| ' + ' | '.join(f'{cells[key]:>{width}}' for key, width in self._widths.items()) + ' |', flush=True)


def _text(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return '-'
    return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{path.name}.partial')
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Writes all rows, with the columns of any; a number that there is not is an empty cell."""
    with _replaced(path) as partial, partial.open('w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: '' if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})


def read_csv(path: Path) -> list[Row]:
    """The rows of `write_csv`, without their empty cells."""

    def value(text: str) -> object:
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        return text

    with path.open(newline='', encoding='utf-8') as file:
        return [{k: value(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draws the sweeps: time over the size of the map and over the batch, ours and the baseline.

    Raises:
        ValueError: There is no sweep among the rows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if 'sweep' in row]
    if not rows:
        raise ValueError('there is no sweep to draw; make one: tools/benchmark.py ops --sweep --csv FILE.csv')
    figure = Figure(figsize=(15, 5), dpi=120, layout='constrained')
    FigureCanvasAgg(figure)  # not through pyplot, which might ask for a display
    for axes, (sweep, title, per_pixel) in zip(figure.subplots(1, len(PANELS)), PANELS):
        panel = [row for row in rows if row['sweep'] == sweep]
        for label, style, points in _curves(panel):
            x = [row['batch'] if sweep == 'batch' else row['side'] ** 2 for row, _ in points]
            y = [1e6 * ms / (row['batch'] * row['side'] ** 2) if per_pixel else ms for row, ms in points]
            axes.plot(x, y, label=label, marker='o', markersize=4, **style)
        axes.set_title(title.format_map(panel[0]) if panel else title)
        axes.set(xscale='log', yscale='log', ylabel='ns per pixel' if per_pixel else 'ms')
        axes.set_xlabel('batch' if sweep == 'batch' else 'L, pixels of an image')
        axes.grid(which='both', alpha=0.25)
    figure.axes[-1].legend(fontsize=8)
    first = rows[0]
    figure.suptitle(f'{first["op"]}, {first["channels"]} channels, {first["dtype"]}, {first["device"]}')
    with _replaced(path) as partial:
        figure.savefig(partial, format=path.suffix[1:])


def _curves(rows: Sequence[Row]) -> Iterator[tuple[str, dict, list[tuple[Row, float]]]]:
    """Label, style and points (row, ms) of the passes of each backend, and of the baseline that they share."""
    by_backend = {}
    for row in rows:
        by_backend.setdefault(row['backend'], []).append(row)
    sources = [(name, '', colour, own) for (name, own), colour in zip(by_backend.items(), COLOURS)]
    sources += [(name, f'{name} ', '#888888', own) for name in BASELINES for own in [*by_backend.values()][:1]]
    for name, prefix, colour, own in sources:
        for passed, line in zip(PASSES, ('-', '--')):
            column = f'{prefix}{passed} ms'
            if points := [(row, row[column]) for row in own if column in row]:
                yield f'{name} {passed}', {'color': colour, 'linestyle': line}, points
