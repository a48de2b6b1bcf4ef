"""Classification data: scikit-learn's handwritten digits and a user's folder of images."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from mmengine.registry import DATASETS, FUNCTIONS
from PIL import Image
from timm.data import create_transform
from torch.utils.data import Dataset, default_collate
from torchvision import transforms

from vmzoo.images import IMAGE_SUFFIXES, read_image

SPLIT_FOLDERS = {'train': ('train',), 'val': ('val', 'validation'), 'test': ('test', 'val', 'validation')}


def natural_key(name: str) -> tuple:
    """Sort key that puts '2' before '10'."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def class_folders(root: str | Path) -> list[str]:
    """Names of the classes in a data folder, in the order of their indices.

    Raises:
        FileNotFoundError: There is no `root`/train, or fewer than two class folders in it.
    """
    train = Path(root) / 'train'
    folders = [p for p in train.iterdir() if p.is_dir() and not p.name.startswith('.')] if train.is_dir() else []
    names = sorted((folder.name for folder in folders), key=natural_key)
    if len(names) < 2:
        raise FileNotFoundError(
            f'{train} must hold one folder of images for each class, at least two ({train}/<class>/*.jpg); '
            f'found {len(names)}'
        )
    return names


@FUNCTIONS.register_module()
def collate_readable(samples: Sequence[dict]) -> dict:
    """Stack samples into a batch; `ImagePreprocessor` reports the files that could not be read.

    Returns:
        `inputs` uint8 [B, C, H, W], `targets` int64 [B], `paths`, and for unreadable files `broken` (names of those to
        skip) and `errors` (messages of those to stop at). Without a readable file there are no `inputs`.
    """
    readable = [sample for sample in samples if 'inputs' in sample]
    return {
        **(default_collate(readable) if readable else {}),
        'broken': [sample['broken'] for sample in samples if 'broken' in sample],
        'errors': [sample['error'] for sample in samples if 'error' in sample],
    }


@DATASETS.register_module()
class ImageFolderDataset(Dataset):
    """Images in `root`/<split>/<class>/; the classes are those of `root`/train.

    Args:
        root: The data folder.
        split: 'train', 'val' or 'test'; without a test folder, 'test' is the validation folder.
        input_size: (C, H, W) that the model takes.
        interpolation: 'bicubic', 'bilinear', ... as in the model's `pretrained_cfg`.
        crop_pct: Share of the image that evaluation keeps.
        augment: Further arguments of `timm.data.create_transform` for training (scale, hflip, auto_augment, ...);
            None means evaluation.
        skip_broken: Leave out files that are not readable images, naming them, where otherwise training stops.
    """

    def __init__(
        self,
        root: str,
        split: str,
        input_size: tuple[int, int, int],
        interpolation: str = 'bicubic',
        crop_pct: float = 1.0,
        augment: dict | None = None,
        skip_broken: bool = False,
    ) -> None:
        self.classes = class_folders(root)
        self.skip_broken = skip_broken
        self.input_size, self.interpolation, self.crop_pct = tuple(input_size), interpolation, crop_pct
        self.in_chans = input_size[0]
        self.samples = self._list_images(Path(root), split)
        common = dict(input_size=self.input_size, interpolation=interpolation, normalize=False)
        if augment is None:
            self.transform = create_transform(**common, crop_pct=crop_pct)
        else:
            self.transform = create_transform(**common, is_training=True, **augment)

    def _list_images(self, root: Path, split: str) -> list[tuple[str, int]]:
        folders = [root / name for name in SPLIT_FOLDERS[split] if (root / name).is_dir()]
        if not folders:
            wanted = ' or '.join(str(root / name) for name in SPLIT_FOLDERS[split])
            raise FileNotFoundError(f'there is no folder {wanted}; put the {split} images in {wanted}/<class>/*.jpg')
        samples = []
        for folder in sorted(p for p in folders[0].iterdir() if p.is_dir() and not p.name.startswith('.')):
            before = len(samples)
            if folder.name not in self.classes:
                raise ValueError(f'{folder} is no class of {root / "train"}; its classes are {", ".join(self.classes)}')
            for path in sorted(folder.rglob('*')):
                if path.name.startswith('.') or path.name == 'Thumbs.db':
                    continue
                # The suffix first: asking the file system about a million files takes minutes.
                if path.suffix.lower() in IMAGE_SUFFIXES or (self.skip_broken and not path.is_dir()):
                    samples.append((str(path), self.classes.index(folder.name)))
                elif not path.is_dir():
                    raise ValueError(
                        f'{path} is not an image (known are {", ".join(IMAGE_SUFFIXES)}); '
                        'remove it, or train with --skip-broken'
                    )
            if split == 'train' and len(samples) == before:
                raise FileNotFoundError(f'{folder} holds no image; put images of that class there, or remove it')
        if not samples:
            raise FileNotFoundError(f'{folders[0]} holds no image')
        return samples

    @property
    def metainfo(self) -> dict:
        return dict(classes=self.classes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        path, target = self.samples[index]
        try:
            image = read_image(path, self.in_chans)
        except ValueError as error:
            # Handed on as data: an exception in a loader's worker would arrive wrapped in that worker's traceback.
            if self.skip_broken:
                return dict(broken=path)
            return dict(error=f'{error}; remove the file, or train with --skip-broken')
        return dict(inputs=self.transform(image), targets=target, paths=path)


@DATASETS.register_module()
class DigitsDataset(Dataset):
    """The 1,797 handwritten digits that scikit-learn carries (UCI, 8×8 pixels), enlarged; nothing is downloaded.

    The split is fixed and stratified: 1,197 images to train, 240 to choose the best epoch, 360 to test.

    Args:
        split: 'train', 'val' or 'test'.
        input_size: (3, H, W) of the enlarged images.
        augment: Whether to rotate, shift and scale the images slightly.
    """

    def __init__(self, split: str, input_size: tuple[int, int, int] = (3, 32, 32), augment: bool = False) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        kept, test = train_test_split(range(len(digits.target)), test_size=360, stratify=digits.target, random_state=0)
        train, val = train_test_split(kept, test_size=240, stratify=digits.target[kept], random_state=0)
        self.indices = dict(train=train, val=val, test=test)[split]
        self.split = split
        self.input_size, self.interpolation, self.crop_pct = tuple(input_size), 'bicubic', 1.0
        self.targets = digits.target[self.indices].tolist()
        pixels = (digits.images[self.indices] * (255 / 16)).round().astype(np.uint8)
        size = (input_size[2], input_size[1])
        self.images = [Image.fromarray(p).resize(size, Image.Resampling.BICUBIC).convert('RGB') for p in pixels]
        self.augment = augment

    @cached_property
    def transform(self) -> Callable[[Image.Image], torch.Tensor]:
        move = transforms.RandomAffine(
            degrees=12, translate=(0.08, 0.08), scale=(0.9, 1.1), interpolation=transforms.InterpolationMode.BILINEAR
        )
        return transforms.Compose([move, transforms.PILToTensor()]) if self.augment else transforms.PILToTensor()

    @property
    def metainfo(self) -> dict:
        return dict(classes=[str(digit) for digit in range(10)])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict:
        name = f'{self.split}/{self.indices[index]:04d}'
        return dict(inputs=self.transform(self.images[index]), targets=self.targets[index], paths=name)
