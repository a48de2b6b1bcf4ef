"""The pictures of `vmzoo predict` and `vmzoo segment`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from vmzoo.images import read_image
from vmzoo_kernels import get_routes

if TYPE_CHECKING:
    from .predict import Prediction
    from .segment import View

RIGHT, WRONG, NEUTRAL, PALE = '#1b7f4d', '#c0392b', '#2c3e70', '#d5dae3'
TILES, LEGEND = 16, 16
PIXELS = 1024  # of a side, in overlays


def _figure(width: float, height: float) -> Figure:
    # Not through pyplot, which would keep global state and might ask for a display.
    figure = Figure(figsize=(width, height), dpi=150, layout='constrained')
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    FigureCanvasAgg(figure)
    return figure


def _show_image(axes, image) -> None:
    axes.imshow(image, interpolation='nearest' if max(image.size) <= 64 else 'antialiased')
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_color('#888888')


def _choose(predictions: Sequence['Prediction']) -> list['Prediction']:
    """At most `TILES` images: all or some of the mistakes, and others evenly spaced."""
    if len(predictions) <= TILES:
        return list(predictions)
    mistakes = [p for p in predictions if p.target is not None and p.best[0] != p.target][: TILES // 4]
    others = [p for p in predictions if p.target is None or p.best[0] == p.target]
    count = min(len(others), TILES - len(mistakes))
    return [others[i * len(others) // count] for i in range(count)] + mistakes


def draw_predictions(predictions: Sequence['Prediction'], classes: Sequence[str], path: Path) -> Path:
    """Images with their best classes as bars: green is right, red is wrong, blue is an image without a known class."""
    chosen = _choose(predictions)
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = _figure(3.6 * columns, 1.75 * rows + 0.4)
    for cell, prediction in zip(figure.subfigures(rows, columns, squeeze=False).flat, chosen):
        picture, bars = cell.subplots(1, 2, width_ratios=(1, 1.15))
        _show_image(picture, read_image(prediction.path))
        name = classes[prediction.best[0]]
        colour, text = NEUTRAL, name
        if prediction.target is not None:
            right = prediction.best[0] == prediction.target
            colour = RIGHT if right else WRONG
            text = name if right else f'{name}, but is {classes[prediction.target]}'
        picture.set_title(_short(text, 24), color=colour, fontsize=9, fontweight='bold', loc='left')
        places = range(len(prediction.best))
        bars.barh(places, [1] * len(prediction.best), color='#f1f3f7', height=0.72)
        bars.barh(places, prediction.probabilities, color=[colour, *[PALE] * 4][: len(places)], height=0.72)
        for place, (index, probability) in enumerate(zip(prediction.best, prediction.probabilities)):
            inside = 'white' if place == 0 and probability > 0.35 else '#222222'
            bars.text(0.03, place, _short(classes[index], 16), va='center', fontsize=7, color=inside)
            bars.text(1.3, place, f'{100 * probability:.1f} %', ha='right', va='center', fontsize=7, color='#444444')
        bars.set(xlim=(0, 1.36), xticks=[], yticks=[])
        bars.set_ylim(4.6, -0.6)
        bars.set_frame_on(False)
    figure.suptitle(
        f'{len(chosen)} of {len(predictions)} images' if len(chosen) < len(predictions) else '', fontsize=10
    )
    figure.savefig(path)
    return path


def draw_confusion(predictions: Sequence['Prediction'], classes: Sequence[str], path: Path) -> Path:
    """Confusion matrix of images whose class is known: rows are true classes, columns predicted ones."""
    count = len(classes)
    matrix = np.zeros((count, count), dtype=int)
    for prediction in predictions:
        matrix[prediction.target, prediction.best[0]] += 1
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = min(10.0, max(4.5, 0.5 * count + 1.5))
    figure = _figure(side, side)
    axes = figure.subplots()
    # The square root lifts rare mistakes out of the white.
    axes.imshow(np.sqrt(share), cmap='Blues', vmin=0, vmax=1)
    if count <= 30:
        size = 9 if count <= 15 else 6
        for row, column in np.argwhere(matrix):
            colour = 'white' if share[row, column] > 0.4 else (WRONG if row != column else '#222222')
            axes.text(column, row, matrix[row, column], ha='center', va='center', fontsize=size, color=colour)
        labels = [_short(name, 18) for name in classes]
        axes.set_xticks(range(count), labels, rotation=90 if max(map(len, labels)) > 3 else 0, fontsize=size)
        axes.set_yticks(range(count), labels, fontsize=size)
        axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
        axes.grid(which='minor', color='white', linewidth=1.5)
        axes.tick_params(which='both', length=0)
    axes.set(xlabel='predicted', ylabel='true')
    for spine in axes.spines.values():
        spine.set_visible(False)
    right = int(matrix.trace())
    axes.set_title(f'{right} of {len(predictions)} right ({100 * right / len(predictions):.1f} %)', fontsize=11)
    figure.savefig(path)
    return path


def draw_routes(image_path: Path, scan: str, size: tuple[int, int], reductions: Sequence[int], path: Path) -> Path:
    """The routes along which a model scans an image, each over the image; colour runs from first to last position.

    Args:
        image_path: The image.
        scan: Name of the routes, see `vmzoo_kernels.get_routes`.
        size: (H, W) that the model gets.
        reductions: By how much the model's maps are smaller; the finest map of at most 14×14 positions is drawn.
        path: The file to write.

    Returns:
        `path`.
    """
    maps = [(max(1, size[0] // r), max(1, size[1] // r)) for r in reductions]
    height, width = next((m for m in maps if max(m) <= 14), maps[-1])
    routes = get_routes(scan, height, width)
    image = read_image(image_path).resize((size[1], size[0]))
    orders = list(routes.gather)  # each [S, T]
    figure = _figure(3.4 * len(orders), 4.0)
    colours = matplotlib.colormaps['plasma']
    for number, (axes, order) in enumerate(zip(figure.subplots(1, len(orders), squeeze=False).flat, orders), 1):
        axes.imshow(image, extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation='nearest', alpha=0.45)
        for edge in range(width + 1):
            axes.axvline(edge - 0.5, color='white', linewidth=0.4, alpha=0.5)
        for edge in range(height + 1):
            axes.axhline(edge - 0.5, color='white', linewidth=0.4, alpha=0.5)
        for sequence in order.tolist():
            points = np.array([(p % width, p // width) for p in sequence if p >= 0], dtype=float)  # [T, (x, y)]
            time = np.linspace(0, 0.92, len(points))
            segments = np.stack([points[:-1], points[1:]], axis=1)  # [T - 1, 2, 2]
            steps = np.abs(segments[:, 1] - segments[:, 0]).max(1) <= 1
            for chosen, line in ((steps, 2.4), (~steps, 0.8)):  # jumps between lines are thin
                colour = colours(time[:-1][chosen])
                axes.add_collection(LineCollection(segments[chosen], colors=colour, linewidths=line, capstyle='round'))
            axes.scatter(*points.T, c=colours(time), s=14, zorder=3, linewidths=0)
        first, last = points[0], points[-1]
        axes.scatter(*first, s=110, marker='o', facecolor='white', edgecolor=colours(0.0), linewidth=2, zorder=4)
        axes.scatter(*last, s=110, marker='s', facecolor='white', edgecolor=colours(0.92), linewidth=2, zorder=4)
        axes.set_title(f'route {number} of {len(orders)}', fontsize=11)
        axes.set(xticks=[], yticks=[])
    figure.suptitle(f'{scan} scan, map of {height} by {width} positions: circle first, square last', fontsize=11)
    figure.savefig(path)
    return path


def draw_segmentation(views: Sequence['View'], classes: Sequence[str], shares: Sequence[float], path: Path) -> Path:
    """Pictures, and below them the same under their labels; the legend has each label's share of the whole.

    Args:
        views: The picture, or planes of a volume.
        classes: Names of the labels; the first is the background, which is not coloured.
        shares: Share of each label in the image or volume.
        path: The file to write.

    Returns:
        `path`.
    """
    figure = _figure(4.0 * len(views), 8.4)
    # The strong ones of each pair of colours first.
    order = [*range(0, 20, 2), *range(1, 20, 2)]
    tab20 = matplotlib.colormaps['tab20']
    colours = [(0, 0, 0, 0), *(tab20(order[index % 20]) for index in range(len(classes) - 1))]
    for column, view in zip(figure.subplots(2, len(views), squeeze=False).T, views):
        step = -(-max(view.labels.shape) // PIXELS)
        image, labels = view.image[::step, ::step], view.labels[::step, ::step]
        overlay = np.asarray(colours)[labels]  # [H, W, 4]
        overlay[..., 3] *= 0.55
        for axes in column:
            axes.imshow(image, cmap='gray', vmin=0, vmax=1, aspect=view.aspect)
            axes.set(xticks=[], yticks=[])
        column[1].imshow(overlay, aspect=view.aspect, interpolation='nearest')
        column[0].set_title(view.title, fontsize=10)
    found = [index for index in range(1, len(classes)) if shares[index]]
    patches = [
        Patch(color=colours[index], label=f'{_short(classes[index], 24)} {100 * shares[index]:.2g} %')
        for index in found[:LEGEND]
    ]
    if patches:
        figure.legend(handles=patches, loc='outside lower center', ncols=min(len(patches), 2 * len(views)), fontsize=8)
    else:
        figure.suptitle('background only', fontsize=10)
    figure.savefig(path)
    return path


def _short(text: str, length: int) -> str:
    text = text if len(text) <= length else text[: length - 1] + '…'
    return text.replace('$', r'\$')  # which would begin a formula
