"""Intensities as networks expect them; the same function serves training and prediction."""

from collections.abc import Sequence

import numpy as np

METHODS = ('none', 'minmax', 'zscore')
SMALLEST = 1e-8  # range or deviation of an image that isn't constant


def normalize_intensity(
    values: np.ndarray,
    method: str = 'none',
    clip: tuple[float, float] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> np.ndarray:
    """Cuts, scales and shifts the values of an image.

    Args:
        values: [C, *size].
        method: 'zscore' makes mean 0 and deviation 1 in each channel of the image, as nnU-Net does; 'minmax' makes the
            image's smallest value 0 and its largest 1.
        clip: Lowest and highest value, such as a window of Hounsfield units; they are mapped to 0 and 1.
        mean: Subtracted from each channel afterwards.
        std: What the result is divided by.

    Returns:
        float32 [C, *size].

    Raises:
        ValueError: Values are not finite, or arguments make no sense.
    """
    if method not in METHODS:
        raise ValueError(f'method is one of {", ".join(METHODS)}, got {method!r}')
    if not np.isfinite(values).all():
        raise ValueError(f'{np.count_nonzero(~np.isfinite(values))} values are not finite; replace them, as by 0')
    values = values.astype(np.float32)  # [C, *size]
    if clip is not None:
        low, high = clip
        if low >= high:
            raise ValueError(f'clip is the lowest and the highest value, got {low} and {high}')
        values = (values.clip(low, high) - low) / (high - low)
    if method == 'zscore':
        axes = tuple(range(1, values.ndim))
        deviation = values.std(axes, dtype=np.float64, keepdims=True)
        values = (values - values.mean(axes, dtype=np.float64, keepdims=True)) / np.maximum(deviation, SMALLEST)
    elif method == 'minmax':
        values = (values - values.min()) / max(values.max() - values.min(), SMALLEST)
    shape = (-1,) + (1,) * (values.ndim - 1)
    for operation, operand in ((np.subtract, mean), (np.divide, std)):
        if operand is not None:
            if len(operand) != len(values):
                raise ValueError(f'the image has {len(values)} channels, but mean or std have {len(operand)}')
            values = operation(values, np.reshape(operand, shape))
    return values.astype(np.float32)
