"""Reading image files."""

from pathlib import Path

from PIL import Image

IMAGE_SUFFIXES = ('.bmp', '.gif', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')
_MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}


def read_image(path: str | Path, in_chans: int = 3) -> Image.Image:
    """Decode an image file completely.

    Raises:
        ValueError: The file is missing, truncated or no image (the message names it), or `in_chans` is not 1, 3 or 4.
    """
    if in_chans not in _MODES:
        raise ValueError(f'image files have 1, 3 or 4 channels, but the model takes in_chans={in_chans}')
    try:
        with Image.open(path) as image:
            return image.convert(_MODES[in_chans])
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f'cannot read the image {path}: {error}') from error
