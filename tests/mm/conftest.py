"""A small folder of real images, and the train command as a function."""

import pytest

pytest.importorskip('mmengine')

from vmzoo.cli.main import main

SMALL = (
    *('train_dataloader.batch_size=8', 'train_dataloader.num_workers=0'),
    *('val_dataloader.num_workers=0', 'test_dataloader.num_workers=0'),
)


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory):
    """Crops of two of scikit-image's pictures: 16 + 8 images of 48×40 pixels in two classes."""
    from skimage import data
    from skimage.io import imsave

    root = tmp_path_factory.mktemp('images')
    for name, picture in (('cat', data.chelsea()), ('coffee', data.coffee())):
        for split, count, top in (('train', 8, 20), ('val', 4, 180)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                imsave(folder / f'{i}.png', picture[top : top + 48, 30 * i : 30 * i + 40], check_contrast=False)
    return root


def folder_arguments(data, work_dir, *options, cfg_options=SMALL):
    return [
        *('train', 'image_folder', '--model', 'vmamba_nano', '--data', str(data), '--work-dir', str(work_dir)),
        *options,
        *('--cfg-options', *cfg_options),
    ]


@pytest.fixture
def train_folder(image_folder, tmp_path):
    """Trains on the image folder; returns the exit code."""

    def train(*options, data=image_folder, work_dir=tmp_path / 'work', cfg_options=()):
        return main(folder_arguments(data, work_dir, *options, cfg_options=(*SMALL, *cfg_options)))

    return train
