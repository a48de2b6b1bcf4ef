"""Data sets of segmentation for a plain `torch.utils.data.DataLoader`; mmseg reads folders with its own."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vmzoo.images import IMAGE_SUFFIXES, read_image

from ._extra import require

Transform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

ARRAY_SUFFIXES = ('.npz', '.npy.h5', '.h5', '.hdf5')
MASK_ENDINGS = ('', '_segmentation', '_mask', '_label', '_gt')
SYNAPSE_CLASSES = (
    *('background', 'aorta', 'gallbladder', 'left kidney', 'right kidney'),
    *('liver', 'pancreas', 'spleen', 'stomach'),
)
ACDC_CLASSES = ('background', 'right ventricle', 'myocardium', 'left ventricle')


def check_labels(
    labels: np.ndarray, num_classes: int, source: str | Path, ignore_index: int | None = None
) -> np.ndarray:
    """Labels as int64.

    Raises:
        ValueError: Some are neither in 0..num_classes - 1 nor `ignore_index`; the message lists them.
    """
    values = np.unique(labels)
    wrong = [value for value in values.tolist() if value != ignore_index and value not in range(num_classes)]
    if wrong:
        shown = ', '.join(map(str, wrong[:5])) + (', ...' if len(wrong) > 5 else '')
        raise ValueError(
            f'{source} has labels outside 0..{num_classes - 1}: {shown}; give the number of classes, or say which '
            'label each value means (mapping)'
        )
    return labels.astype(np.int64)


class ArrayDataset(Dataset):
    """Images and labels as arrays in .npz or HDF5 files, as the splits of Synapse and ACDC are published.

    Items are dicts of `image` float32 [1, *size] (or [C, *size] if the file has channels), `label` int64 [*size] and
    `name`. Values of the image are those of the file.

    Args:
        root: Folder of the files.
        names: Names of the cases, with or without suffix, one a line in a file; None for all files of the folder.
        num_classes: Number of classes; other labels are an error.
        image_keys: What the image may be called in a file.
        label_key: What the labels are called.
        classes: Names of the classes.
        transform: Called with image and label; returns both.

    Raises:
        FileNotFoundError: A folder, list or file is missing, or there is no file.
    """

    def __init__(
        self,
        root: str | Path,
        num_classes: int,
        names: str | Path | None = None,
        image_keys: tuple[str, ...] = ('image', 'img'),
        label_key: str = 'label',
        classes: tuple[str, ...] | None = None,
        transform: Transform | None = None,
    ):
        self.root, self.num_classes = Path(root), num_classes
        self.image_keys, self.label_key = image_keys, label_key
        self.classes = classes or tuple(map(str, range(num_classes)))
        self.transform = transform
        if not self.root.is_dir():
            raise FileNotFoundError(f'there is no folder {root}')
        if names is None:
            self.paths = sorted(p for p in self.root.iterdir() if p.name.endswith(ARRAY_SUFFIXES) and p.name[0] != '.')
        else:
            self.paths = [self._find(name, names) for name in _read_names(names)]
        if not self.paths:
            raise FileNotFoundError(f'no case in {names or root}: files end in {", ".join(ARRAY_SUFFIXES)}')

    def _find(self, name: str, names: str | Path) -> Path:
        candidates = [self.root / f'{name}{suffix}' for suffix in ('', *ARRAY_SUFFIXES)]
        found = next((path for path in candidates if path.is_file()), None)
        if found is None:
            raise FileNotFoundError(f'{names} lists {name}, but there is no {candidates[1]} (or {ARRAY_SUFFIXES[1:]})')
        return found

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        arrays = read_arrays(path)
        image_key = next((key for key in self.image_keys if key in arrays), None)
        if image_key is None or self.label_key not in arrays:
            wanted = f'{" or ".join(self.image_keys)}, and {self.label_key}'
            raise ValueError(f'{path} holds {", ".join(arrays) or "nothing"}; needed are {wanted}')
        image, label = arrays[image_key], arrays[self.label_key]
        image = image if image.ndim == label.ndim + 1 else image[None]
        if image.shape[1:] != label.shape:
            raise ValueError(f'{path}: the image is {arrays[image_key].shape}, but its labels are {label.shape}')
        label = check_labels(label, self.num_classes, path)
        return _item(image.astype(np.float32), label, path.name.partition('.')[0], self.transform)


def read_arrays(path: Path) -> Mapping[str, np.ndarray]:
    """All arrays of an .npz or HDF5 file, by name.

    Raises:
        ValueError: It is not readable. Pickled objects are refused: reading them would run what the file says.
    """
    try:
        if path.suffix == '.npz':
            with np.load(path, allow_pickle=False) as file:
                return {key: file[key] for key in file.files}
        h5py = require('h5py', 'reading HDF5 files')
        with h5py.File(path, 'r') as file:
            return {key: value[()] for key, value in file.items() if isinstance(value, h5py.Dataset) and value.shape}
    except (OSError, EOFError, ValueError, BadZipFile) as error:
        raise ValueError(f'cannot read {path}: {error}') from error


def _read_names(path: str | Path) -> list[str]:
    try:
        lines = Path(path).read_text(encoding='utf-8').splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f'there is no list of cases {path}') from None
    return [line.strip() for line in lines if line.strip()]


def _item(image: np.ndarray, label: np.ndarray, name: str, transform: Transform | None) -> dict[str, Any]:
    image, label = torch.from_numpy(np.ascontiguousarray(image)), torch.from_numpy(np.ascontiguousarray(label))
    if transform is not None:
        image, label = transform(image, label)
    return dict(image=image, label=label, name=name)


def synapse(root: str | Path, split: str, transform: Transform | None = None) -> ArrayDataset:
    """Synapse's abdominal CT with eight organs, as TransUNet's authors have prepared and split it.

    Args:
        root: Folder with `train_npz` (slices) and `test_vol_h5` (volumes), and the lists `train.txt` and `test_vol.txt`
            in `lists/lists_Synapse`; without lists, all files.
        split: 'train' (slices [1, H, W]) or 'test' (volumes [1, D, H, W]).
        transform: See `ArrayDataset`.
    """
    folder, names = _choose({'train': ('train_npz', 'train.txt'), 'test': ('test_vol_h5', 'test_vol.txt')}, split)
    names = Path(root) / 'lists/lists_Synapse' / names
    return ArrayDataset(
        Path(root) / folder, 9, names if names.is_file() else None, classes=SYNAPSE_CLASSES, transform=transform
    )


def acdc(root: str | Path, split: str, transform: Transform | None = None) -> ArrayDataset:
    """ACDC's cardiac MRI with three structures, in either published layout.

    Args:
        root: Folder with `train`, `valid` and `test` (npz); or with `data` (HDF5 volumes), `data/slices`, and the lists
            `train_slices.list`, `val.list` and `test.list`.
        split: 'train' (slices), 'val' or 'test' (volumes, or slices where they are published so).
        transform: See `ArrayDataset`.
    """
    root = Path(root)
    options = dict(classes=ACDC_CLASSES, transform=transform)
    if (root / 'data').is_dir():
        lists = {'train': 'train_slices.list', 'val': 'val.list', 'test': 'test.list'}
        folder = root / 'data/slices' if split == 'train' else root / 'data'
        return ArrayDataset(folder, 4, root / _choose(lists, split), **options)
    return ArrayDataset(root / _choose({'train': 'train', 'val': 'valid', 'test': 'test'}, split), 4, **options)


def _choose(options: Mapping[str, Any], split: str) -> Any:
    if split not in options:
        raise ValueError(f'there is no split {split!r}; known are {", ".join(options)}')
    return options[split]


class MaskFolderDataset(Dataset):
    """Images and masks in two folders, paired by name: `a.jpg` with `a.png`, `a_segmentation.png`, `a_mask.png`, ...

    All pairs are looked for, and their sizes compared, at once; labels are checked when they are read. Items are dicts
    of `image` float32 [C, H, W] in 0..1, `label` int64 [H, W] and `name`.

    Args:
        images: Folder of images.
        masks: Folder of label maps, in a format without loss.
        num_classes: Number of classes.
        mapping: Label of each value of a mask, as `{0: 0, 255: 1}`; None if values are the labels.
        in_chans: Channels of the image: 1, 3 or 4.
        ignore_index: A label that is allowed beside the classes.
        transform: Called with image and label; returns both.

    Raises:
        FileNotFoundError: A folder, all images, or the mask of an image is missing.
        ValueError: A mask has no image, an image several masks, or a pair differs in size.
    """

    def __init__(
        self,
        images: str | Path,
        masks: str | Path,
        num_classes: int,
        mapping: Mapping[int, int] | None = None,
        in_chans: int = 3,
        ignore_index: int | None = None,
        transform: Transform | None = None,
    ):
        self.num_classes, self.mapping, self.in_chans = num_classes, mapping, in_chans
        self.ignore_index, self.transform = ignore_index, transform
        self.pairs = _pair(_list_images(images), _list_images(masks))
        for image, mask in self.pairs:
            sizes = [_size(path) for path in (image, mask)]
            if sizes[0] != sizes[1]:
                raise ValueError(f'{image} is {sizes[0]} pixels, but its mask {mask} is {sizes[1]}')

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, mask = self.pairs[index]
        image = np.asarray(read_image(path, self.in_chans), dtype=np.float32) / 255
        image = image.transpose(2, 0, 1) if image.ndim == 3 else image[None]
        labels = read_mask(mask)
        if self.mapping is not None:
            labels = _map_values(labels, self.mapping, mask)
        return _item(image, check_labels(labels, self.num_classes, mask, self.ignore_index), path.stem, self.transform)


def isic(root: str | Path, split: str = 'train', transform: Transform | None = None) -> MaskFolderDataset:
    """ISIC's skin lesions: `root`/<split>/images and `root`/<split>/masks, with values 0 and 255."""
    folder = Path(root) / split
    return MaskFolderDataset(folder / 'images', folder / 'masks', 2, {0: 0, 255: 1}, transform=transform)


def read_mask(path: Path) -> np.ndarray:
    """Values of a label map [H, W]; those of a palette are its indices.

    Raises:
        ValueError: It is not readable, a colour picture, or in a format that loses values.
    """
    if path.suffix.lower() in ('.jpg', '.jpeg'):
        raise ValueError(f'{path}: JPEG changes labels; save masks as PNG')
    try:
        with Image.open(path) as image:
            labels = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f'cannot read the mask {path}: {error}') from error
    if labels.ndim == 3 and (labels[..., :1] == labels[..., :3]).all():
        labels = labels[..., 0]  # a grey picture that was saved as colour
    if labels.ndim != 2:
        raise ValueError(f'{path} is a colour picture; a mask has one number a pixel')
    return labels.astype(np.int64)


def _map_values(labels: np.ndarray, mapping: Mapping[int, int], path: Path) -> np.ndarray:
    values, inverse = np.unique(labels, return_inverse=True)
    unknown = [value for value in values.tolist() if value not in mapping]
    if unknown:
        raise ValueError(f'{path} has the values {unknown[:5]}, which are not among {list(mapping)} of the mapping')
    return np.array([mapping[value] for value in values.tolist()])[inverse].reshape(labels.shape)


def _list_images(folder: str | Path) -> list[Path]:
    if not Path(folder).is_dir():
        raise FileNotFoundError(f'there is no folder {folder}')
    paths = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != '.')
    if not paths:
        raise FileNotFoundError(f'no image in {folder}')
    return paths


def _pair(images: list[Path], masks: list[Path]) -> list[tuple[Path, Path]]:
    by_stem: dict[str, list[Path]] = {}
    for mask in masks:
        by_stem.setdefault(mask.stem, []).append(mask)
    pairs = []
    for image in images:
        found = [mask for ending in MASK_ENDINGS for mask in by_stem.get(f'{image.stem}{ending}', [])]
        if not found:
            raise FileNotFoundError(
                f'{image} has no mask {masks[0].parent / image.stem}.png (or with {MASK_ENDINGS[1:]})'
            )
        if len(found) > 1:
            raise ValueError(f'{image} has several masks: {", ".join(map(str, found))}')
        pairs.append((image, found[0]))
    used = {mask for _, mask in pairs}
    if len(used) < len(pairs):
        raise ValueError(f'two images in {images[0].parent} differ in their suffix alone, and would share a mask')
    if left := [mask for mask in masks if mask not in used]:
        raise ValueError(f'{len(left)} masks have no image, such as {left[0]}')
    return pairs


def _size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f'cannot read the image {path}: {error}') from error
