"""Write small real data sets, made of pictures that packages bring along; nothing is downloaded.

The files are the same each time.

    OUT/coins    scikit-image's coins: boxes and masks in COCO's format, for detection
    OUT/mni152   nilearn's brain template: slices with grey and white matter, in mmseg's layout, for segmentation
    OUT/digits   scikit-learn's handwritten digits in a folder for each class, for classification
"""

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

COINS = dict(train=(60, slice(0, 224)), val=(12, slice(224, 303)))  # pictures, rows of the original: no coin is in both
COIN_SIZE = (128, 160)
HELD_OUT = 8  # every fourth block of so many slices is for validation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', type=Path)
    parser.add_argument('--only', nargs='+', choices=list(MAKERS), default=list(MAKERS), help='data sets to make')
    args = parser.parse_args()
    for name in args.only:
        MAKERS[name](args.out / name)


def make_digits(out: Path) -> None:
    """`out`/<split>/<digit>/<number>.png"""
    from vmzoo.mm import DigitsDataset

    for split in ('train', 'val', 'test'):
        dataset = DigitsDataset(split)
        for index, target, image in zip(dataset.indices, dataset.targets, dataset.images):
            folder = out / split / str(target)
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f'{index:04d}.png')
        print(f'{len(dataset)} images in {out / split}')


def segment_coins(picture: np.ndarray) -> np.ndarray:
    """Label each coin, as scikit-image's region-based segmentation example does.

    Args:
        picture: Grey values [H, W].

    Returns:
        Labels [H, W]; 0 is the background.
    """
    from scipy import ndimage
    from skimage.filters import sobel
    from skimage.segmentation import watershed

    markers = np.zeros_like(picture, dtype=np.int32)
    markers[picture < 30] = 1
    markers[picture > 150] = 2
    coins = ndimage.binary_fill_holes(watershed(sobel(picture), markers) - 1)
    labels, count = ndimage.label(coins)
    sizes = ndimage.sum_labels(coins, labels, range(count + 1))
    return np.where(sizes[labels] > 300, labels, 0)


def make_coins(out: Path) -> None:
    """`out`/{train,val}/*.png and `out`/annotations/{train,val}.json"""
    from skimage.data import coins

    picture = coins()
    labels = segment_coins(picture)
    (out / 'annotations').mkdir(parents=True, exist_ok=True)
    for split, (count, rows) in COINS.items():
        rng = np.random.default_rng(len(split))
        (out / split).mkdir(exist_ok=True)
        content = dict(images=[], annotations=[], categories=[dict(id=1, name='coin')])
        for number in range(count):
            image, masks = coin_picture(picture[rows], labels[rows], rng)
            name = f'{number:03d}.png'
            Image.fromarray(image).save(out / split / name)
            content['images'].append(dict(id=number, file_name=name, height=image.shape[0], width=image.shape[1]))
            for mask in masks:
                content['annotations'].append(
                    dict(id=len(content['annotations']) + 1, image_id=number, category_id=1, iscrowd=0, **outline(mask))
                )
        (out / 'annotations' / f'{split}.json').write_text(json.dumps(content))
        print(f'{count} images with {len(content["annotations"])} coins in {out / split}')


def coin_picture(
    picture: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, list[np.ndarray]]:
    """A random crop, mirrored, turned and lit differently.

    Returns:
        The image uint8 [H, W, 3], and the mask [H, W] of each coin of which at least half is in it.
    """
    height, width = np.minimum(COIN_SIZE, picture.shape)
    top, left = rng.integers(picture.shape[0] - height + 1), rng.integers(picture.shape[1] - width + 1)
    window = np.s_[top : top + height, left : left + width]
    shown, whole = labels[window], np.bincount(labels.ravel())
    masks = [shown == label for label in np.unique(shown) if label and (shown == label).sum() > whole[label] / 2]
    turns, mirrored = rng.integers(4), rng.integers(2)

    def placed(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.rot90(array[:, :: 1 - 2 * mirrored], turns))

    light = np.clip(picture[window] * rng.uniform(0.7, 1.3) + rng.normal(0, 4, shown.shape), 0, 255).astype(np.uint8)
    return np.repeat(placed(light)[..., None], 3, -1), [placed(mask) for mask in masks]


def outline(mask: np.ndarray) -> dict:
    """COCO's box, area and run lengths of a mask [H, W]."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    # The runs alternate, beginning with zeros; the last pixel is repeated inverted, which ends the last run.
    pixels = np.concatenate([[0], mask.ravel(order='F'), [not mask[-1, -1]]]).astype(int)
    counts = np.diff(np.flatnonzero(np.diff(pixels)), prepend=0)
    return dict(
        bbox=[float(value) for value in box],
        area=float(mask.sum()),
        segmentation=dict(size=list(mask.shape), counts=counts.tolist()),
    )


def make_mni152(out: Path) -> None:
    """`out`/images/{train,val}/*.png, and `out`/labels/... with 0 other, 1 grey matter, 2 white matter."""
    spec = importlib.util.find_spec('nilearn')
    if spec is None or importlib.util.find_spec('nibabel') is None:
        raise SystemExit('mni152 needs nilearn, which brings the brain template; run: pip install nilearn')
    import nibabel

    # Read as files: importing nilearn takes pandas and a browser of data on the web.
    folder = Path(spec.submodule_search_locations[0]) / 'datasets/data'
    volumes = [folder / f'mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz' for kind in ('t1', 'gm', 'wm')]
    template, grey, white = (np.asarray(nibabel.load(path).dataobj) for path in volumes)
    other = 255 - np.minimum(grey.astype(int) + white, 255)
    labels = np.stack([other, grey, white]).argmax(0).astype(np.uint8)
    counts = dict(train=0, val=0)
    for z in range(20, template.shape[2] - 30, 2):
        split = 'val' if z // HELD_OUT % 4 == 3 else 'train'
        counts[split] += 1
        for kind, volume in (('images', template), ('labels', labels)):
            path = out / kind / split / f'{z:03d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            # Seen from above, nose up.
            Image.fromarray(np.rot90(volume[:, :, z])).convert('RGB' if kind == 'images' else 'L').save(path)
    for split, count in counts.items():
        print(f'{count} slices in {out / "images" / split}')


MAKERS: dict[str, Callable[[Path], None]] = dict(coins=make_coins, mni152=make_mni152, digits=make_digits)

if __name__ == '__main__':
    main()
