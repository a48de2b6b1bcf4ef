"""Segmentation of images and volumes of any size, window by window, in bounded memory.

Windows overlap, and their logits are blended with Gaussian weights (as in nnU-Net and MONAI). The weights are a product
of one factor an axis, so that they are normalised beforehand: they sum to one at every pixel, no map of weights is
accumulated, and rows are final as soon as the last window over them is done. What is kept is one row of windows.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

SIGMA = 1 / 8  # of the Gaussian, as a share of the window's side


def window_starts(size: int, window: int, overlap: float) -> list[int]:
    """Where windows begin along an axis: evenly spread, the first at 0 and the last ending at `size`.

    Args:
        size: Length of the axis.
        window: Length of a window; a longer one than `size` is the only one.
        overlap: Smallest share of a window that its neighbour covers too, in [0, 1).
    """
    if size <= window:
        return [0]
    steps = math.ceil((size - window) / max(1, int(window * (1 - overlap))))
    return [round(i * (size - window) / steps) for i in range(steps + 1)]


def blend_weights(starts: Sequence[int], size: int, window: int) -> Tensor:
    """Weights of the windows along an axis, which sum to one at every position of it.

    Returns:
        float32 [len(starts), min(window, size)].
    """
    window = min(window, size)
    distance = torch.arange(window, dtype=torch.float64) - (window - 1) / 2
    bell = torch.exp(-0.5 * (distance / (SIGMA * window)) ** 2)
    total = torch.zeros(size, dtype=torch.float64)
    for start in starts:
        total[start : start + window] += bell
    return torch.stack([bell / total[start : start + window] for start in starts]).float()


def _outer(factors: Sequence[Tensor]) -> Tensor:
    """Product of one factor an axis: n tensors [side] -> [side, side, ...]."""
    product = factors[0]
    for factor in factors[1:]:
        product = product.unsqueeze(-1) * factor
    return product


def _check(image: Any, window: Sequence[int], overlap: float, mirror: Sequence[int], batch_size: int) -> None:
    if not 2 <= len(window) < image.ndim <= 4 or min(image.shape) < 1:
        raise ValueError(
            f'an image [C, H, W] or volume [C, D, H, W] and a window of its axes are needed, got {tuple(image.shape)} '
            f'and a window of {tuple(window)}'
        )
    if min(window) < 1:
        raise ValueError(f'sides of a window are at least 1, got {tuple(window)}')
    if not 0 <= overlap < 1:
        raise ValueError(f'overlap is a share of the window in [0, 1), got {overlap}')
    if any(axis not in range(len(window)) for axis in mirror) or len(set(mirror)) < len(mirror):
        raise ValueError(f'mirror names axes of the window, each once, in 0..{len(window) - 1}, got {tuple(mirror)}')
    if batch_size < 1:
        raise ValueError(f'batch_size is at least 1, got {batch_size}')


def _read_window(image: Any, places: Sequence[slice], window: Sequence[int]) -> Tensor:
    """Cuts a window [C, *window] out of an image, repeating its border where the image is smaller."""
    patch = image[(slice(None), *places)]
    # A copy of an array: it may be read-only, or of a byte order that torch does not have.
    patch = patch.float() if isinstance(patch, Tensor) else torch.from_numpy(np.array(patch, dtype=np.float32))
    for axis, side in enumerate(window, start=1):
        if (missing := side - patch.shape[axis]) > 0:
            before = missing // 2
            index = torch.arange(-before, side - before).clamp(0, patch.shape[axis] - 1)
            patch = patch.index_select(axis, index.to(patch.device))
    return patch


def _crop(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Undoes the padding of `_read_window`: [B, K, *window] -> [B, K, *size]."""
    for axis, side in enumerate(size, start=2):
        logits = logits.narrow(axis, (logits.shape[axis] - side) // 2, side)
    return logits


def _forward(model: Callable[[Tensor], Tensor], x: Tensor, mirror: Sequence[int]) -> Tensor:
    """Logits [B, K, *size] in float32 of images [B, C, *size], averaged over all reflections along the given axes."""
    subsets = itertools.chain.from_iterable(itertools.combinations(mirror, n) for n in range(len(mirror) + 1))
    total = None
    for subset in subsets:
        axes = [axis + 2 for axis in subset]
        logits = model(x.flip(axes))
        if not isinstance(logits, Tensor) or logits.ndim != x.ndim or logits.shape[2:] != x.shape[2:]:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f'the model must return logits [B, K, {", ".join(map(str, x.shape[2:]))}] of images of that size, '
                f'got {got}: a classifier or a backbone is no segmentation network, and deep supervision must be off'
            )
        logits = logits.flip(axes).float() if axes else logits.float()
        total = logits if total is None else total + logits
    return total / 2 ** len(mirror) if mirror else total


@torch.inference_mode()
def sliding_window(
    model: Callable[[Tensor], Tensor],
    image: Any,
    window: Sequence[int],
    overlap: float = 0.5,
    mirror: Sequence[int] = (),
    batch_size: int = 1,
    device: str | torch.device | None = None,
    progress: bool | str = False,
) -> Iterator[tuple[int, Tensor]]:
    """Yields the logits of an image slab by slab, along its first axis after the channels.

    Kept are one slab as deep as a window on the CPU, and a batch of windows on the device. Put the longest axis first
    to keep slabs small.

    Args:
        model: [B, C, *window] -> logits [B, K, *window], in evaluation mode.
        image: Image [C, H, W] or volume [C, D, H, W]: a tensor, or an array that is sliced, such as `numpy.memmap`.
        window: Size that the model gets; two sides for a volume mean a model of images, applied to each slice. Smaller
            images are padded with their border.
        overlap: Smallest share of a window that its neighbour covers too.
        mirror: Axes of the window along which predictions are also made for the reflected image; their logits, over all
            2^n combinations, are averaged.
        batch_size: Windows in one call of the model.
        device: Where the model is; by default that of the image, or the CPU.
        progress: Show a bar on a terminal; a string is its text.

    Yields:
        Start of the slab, and its logits float32 [K, rows, ...] on the CPU. Slabs follow each other without a gap.

    Raises:
        ValueError: Arguments don't fit each other, or the model doesn't return logits of its input's size.
    """
    _check(image, window, overlap, mirror, batch_size)
    size = tuple(image.shape[1:])
    of_slices = len(window) < len(size)  # the model gets [B, C, H, W] of a volume [C, D, H, W]
    window = (1, *window) if of_slices else tuple(window)
    device = torch.device(device or getattr(image, 'device', 'cpu'))
    starts = [window_starts(n, w, overlap) for n, w in zip(size, window)]
    weights = [blend_weights(s, n, w).to(device) for s, n, w in zip(starts, size, window)]
    covered = [min(n, w) for n, w in zip(size, window)]

    first, slab = 0, None  # the first row that isn't final, and the logits [K, covered[0], ...] from there on
    indices = list(itertools.product(*map(range, map(len, starts))))
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    for batch in _with_progress(batches, progress):
        places = [[slice(starts[a][i], starts[a][i] + covered[a]) for a, i in enumerate(index)] for index in batch]
        x = torch.stack([_read_window(image, place, window) for place in places]).to(device)
        logits = _forward(model, x.squeeze(2), mirror).unsqueeze(2) if of_slices else _forward(model, x, mirror)
        logits = _crop(logits, covered)
        blend = torch.stack([_outer([w[i] for w, i in zip(weights, index)]) for index in batch])  # [B, *covered]
        logits = logits * blend.unsqueeze(1)
        for place, values in zip(places, logits.cpu()):
            if slab is None:
                slab = values.new_zeros(len(values), covered[0], *size[1:])
            if (rows := place[0].start - first) > 0:
                yield first, slab[:, :rows]
                slab = torch.cat([slab[:, rows:], torch.zeros_like(slab[:, :rows])], 1)
                first += rows
            slab[(slice(None), slice(None), *place[1:])] += values
    yield first, slab


def _with_progress(batches: Sequence[Any], progress: bool | str) -> Iterable[Any]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track

    text = escape(progress) if isinstance(progress, str) else 'segmenting'
    console = Console(stderr=True)
    return track(batches, text, console=console, transient=True, disable=not (progress and console.is_terminal))


def predict_logits(model: Callable[[Tensor], Tensor], image: Any, window: Sequence[int], **kwargs: Any) -> Tensor:
    """Logits float32 [K, *size] of a whole image, on the CPU; arguments as for `sliding_window`."""
    return torch.cat([logits for _, logits in sliding_window(model, image, window, **kwargs)], 1)


def predict_labels(
    model: Callable[[Tensor], Tensor], image: Any, window: Sequence[int], out: Any = None, **kwargs: Any
) -> Any:
    """Segment an image without ever having the logits of all of it.

    Args:
        model: As for `sliding_window`. One logit a pixel (K = 1) means two classes: label 1 where it is positive.
        image: Image [C, H, W] or volume [C, D, H, W].
        window: Size that the model gets.
        out: Labels [*size] to write to, a tensor or an array (`numpy.memmap`); by default a new tensor, uint8 for up to
            256 classes and else int32.
        **kwargs: Further arguments of `sliding_window`.

    Returns:
        `out`.

    Raises:
        FloatingPointError: Logits are not finite.
        ValueError: See `sliding_window`.
    """
    for start, logits in sliding_window(model, image, window, **kwargs):
        if not logits.isfinite().all():
            raise FloatingPointError('the logits are not finite: look for NaN in the image, and try float32')
        if out is None:
            out = torch.zeros(tuple(image.shape[1:]), dtype=torch.uint8 if len(logits) <= 256 else torch.int32)
        labels = logits[0] > 0 if len(logits) == 1 else logits.argmax(0)
        labels = labels.to(out.dtype) if isinstance(out, Tensor) else labels.numpy()
        out[start : start + labels.shape[0]] = labels
    return out
