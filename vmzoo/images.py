"""Reading image files."""

from pathlib import Path

import numpy as np
from PIL import Image

IMAGE_SUFFIXES = ('.bmp', '.gif', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')
_MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}


def read_image(path: str | Path, in_chans: int = 3) -> Image.Image:
    """Decode an image file completely, into 8 bits a channel; 16-bit greys are scaled to them.

    Raises:
        ValueError: The file is missing, truncated, no image or one of unknown range (the message names it), or
            `in_chans` is not 1, 3 or 4.
    """
    if in_chans not in _MODES:
        raise ValueError(f'image files have 1, 3 or 4 channels, but the model takes in_chans={in_chans}')
    try:
        with Image.open(path) as image:
            return _to_8_bits(image).convert(_MODES[in_chans])
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f'cannot read the image {path}: {error}') from error


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scales greys of 16 bits; Pillow would clip them to 255, which leaves a white image."""
    if not image.mode.startswith(('I', 'F')):
        return image
    values = np.asarray(image)  # [H, W]
    if image.mode == 'F' or values.min() < 0 or values.max() > 65535:
        raise ValueError(f'its values (mode {image.mode}) have no known range; save it with 8 or 16 bits')
    return Image.fromarray((values.astype(np.uint32) // 257).astype(np.uint8))
