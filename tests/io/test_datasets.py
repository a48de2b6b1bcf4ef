"""Data sets of segmentation: published layouts, folders of images and masks, and what is refused."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vmzoo.io import ArrayDataset, MaskFolderDataset, acdc, isic, synapse

h5py = pytest.importorskip('h5py')


def arrays(shape, classes, seed=0):
    rng = np.random.default_rng(seed)
    return rng.random(shape, dtype=np.float32), rng.integers(0, classes, shape).astype(np.float32)


def write_npz(path, image, label, key='image'):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{key: image, 'label': label})


def write_h5(path, image, label):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, 'w') as file:
        file['image'], file['label'], file['scribble'] = image, label, label


def test_synapse(tmp_path):
    slices = {f'case0005_slice{i:03d}': arrays((12, 10), 9, i) for i in range(3)}
    for name, pair in slices.items():
        write_npz(tmp_path / f'train_npz/{name}.npz', *pair)
    volume = arrays((4, 12, 10), 9, 7)
    write_h5(tmp_path / 'test_vol_h5/case0008.npy.h5', *volume)
    assert len(synapse(tmp_path, 'train')) == 3  # without lists
    lists = tmp_path / 'lists/lists_Synapse'
    lists.mkdir(parents=True)
    (lists / 'train.txt').write_text('case0005_slice002\ncase0005_slice000\n')
    (lists / 'test_vol.txt').write_text('case0008\n')

    dataset = synapse(tmp_path, 'train')
    assert len(dataset.classes) == 9
    batch = next(iter(DataLoader(dataset, batch_size=2)))
    assert batch['name'] == ['case0005_slice002', 'case0005_slice000']
    assert batch['image'].shape == (2, 1, 12, 10) and batch['label'].dtype == torch.int64
    for index, name in enumerate(batch['name']):
        assert (batch['image'][index, 0].numpy() == slices[name][0]).all()
        assert (batch['label'][index].numpy() == slices[name][1]).all()
    (case,) = synapse(tmp_path, 'test')
    assert case['name'] == 'case0008' and (case['image'][0].numpy() == volume[0]).all()
    assert (case['label'].numpy() == volume[1]).all()
    with pytest.raises(ValueError, match="no split 'val'"):
        synapse(tmp_path, 'val')


def test_acdc_in_both_layouts(tmp_path):
    pair = arrays((8, 9), 4)
    write_npz(tmp_path / 'npz/train/case_002_volume_ED_slice_0.npz', *pair, key='img')
    (item,) = acdc(tmp_path / 'npz', 'train')
    assert (item['image'][0].numpy() == pair[0]).all() and (item['label'].numpy() == pair[1]).all()

    root = tmp_path / 'h5'
    write_h5(root / 'data/slices/patient001_frame01_slice_1.h5', *pair)
    volume = arrays((3, 8, 9), 4)
    write_h5(root / 'data/patient002_frame01.h5', *volume)
    (root / 'train_slices.list').write_text('patient001_frame01_slice_1\n')
    (root / 'test.list').write_text('patient002_frame01\n')
    (item,) = acdc(root, 'train')
    assert (item['label'].numpy() == pair[1]).all()
    (item,) = acdc(root, 'test')
    assert item['image'].shape == (1, 3, 8, 9) and (item['label'].numpy() == volume[1]).all()
    with pytest.raises(FileNotFoundError, match=r'no list of cases .*val\.list'):
        acdc(root, 'val')


def test_transform_gets_image_and_labels(tmp_path):
    write_npz(tmp_path / 'a.npz', *arrays((8, 9), 4))
    plain, turned = (
        ArrayDataset(tmp_path, 4, transform=transform)[0]
        for transform in (None, lambda image, label: (image.flip(-1), label.flip(-1)))
    )
    assert (turned['image'] == plain['image'].flip(-1)).all() and (turned['label'] == plain['label'].flip(-1)).all()


@pytest.mark.parametrize(
    ('image', 'label', 'key', 'message'),
    [
        ((8, 9), np.full((8, 9), 4), 'image', r'a\.npz has labels outside 0\.\.3: 4'),
        ((8, 9), np.full((8, 9), 1.5), 'image', 'outside 0..3: 1.5'),
        ((8, 9), np.full((8, 9), 255), 'image', 'outside 0..3: 255'),
        ((8, 9), np.zeros((9, 8)), 'image', r'the image is \(8, 9\), but its labels are \(9, 8\)'),
        ((8, 9), np.zeros((8, 9)), 'picture', 'holds picture, label; needed are image or img, and label'),
        ((8, 9), np.array([None]), 'image', r'cannot read .*a\.npz'),  # a pickle
    ],
)
def test_arrays_that_do_not_fit(tmp_path, image, label, key, message):
    write_npz(tmp_path / 'a.npz', np.zeros(image), label, key)
    with pytest.raises(ValueError, match=message):
        ArrayDataset(tmp_path, 4)[0]


@pytest.mark.parametrize('suffix', ['npz', 'h5'])
def test_damaged_arrays_are_named(tmp_path, suffix):
    (tmp_path / f'a.{suffix}').write_bytes(b'nothing of that kind')
    with pytest.raises(ValueError, match=rf'cannot read .*a\.{suffix}'):
        ArrayDataset(tmp_path, 4)[0]


def test_missing_cases(tmp_path):
    with pytest.raises(FileNotFoundError, match='no folder'):
        ArrayDataset(tmp_path / 'nowhere', 4)
    with pytest.raises(FileNotFoundError, match='no case'):
        ArrayDataset(tmp_path, 4)
    (tmp_path / 'train.txt').write_text('case1\n')
    with pytest.raises(FileNotFoundError, match='lists case1'):
        ArrayDataset(tmp_path, 4, tmp_path / 'train.txt')


def test_missing_h5py_is_named_with_its_extra(tmp_path, monkeypatch):
    write_h5(tmp_path / 'a.h5', *arrays((8, 9), 4))
    monkeypatch.setitem(sys.modules, 'h5py', None)
    with pytest.raises(ImportError, match=r'h5py; run: pip install "vmzoo\[medical\]"'):
        ArrayDataset(tmp_path, 4)[0]


@pytest.fixture
def folder(tmp_path):
    """ISIC's layout: pictures, masks of 0 and 255 named as they are published."""
    rng = np.random.default_rng(0)
    for kind in ('images', 'masks'):
        (tmp_path / 'train' / kind).mkdir(parents=True)
    for index in range(2):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(
            tmp_path / f'train/images/ISIC_{index}.png'
        )
        mask = rng.integers(0, 2, (20, 30), dtype=np.uint8) * 255
        Image.fromarray(mask).save(tmp_path / f'train/masks/ISIC_{index}_segmentation.png')
    return tmp_path / 'train'


def test_isic(folder):
    item = isic(folder.parent)[1]
    assert item['name'] == 'ISIC_1' and item['image'].shape == (3, 20, 30) and item['image'].max() <= 1
    mask = np.asarray(Image.open(folder / 'masks/ISIC_1_segmentation.png'))
    assert (item['label'].numpy() == mask // 255).all() and item['label'].float().mean() > 0.1
    picture = np.asarray(Image.open(folder / 'images/ISIC_1.png'))
    np.testing.assert_allclose(item['image'].permute(1, 2, 0) * 255, picture, atol=1e-4)


def test_masks_with_a_palette_of_16_bits_or_as_grey_colours(folder):
    labels = np.arange(600).reshape(20, 30) % 5
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette([200, 0, 0, 0, 200, 0] * 128)
    (folder / 'masks/ISIC_1_segmentation.png').unlink()
    (folder / 'masks/ISIC_0_segmentation.png').unlink()
    image.save(folder / 'masks/ISIC_0.png')
    Image.fromarray(labels.astype(np.uint16)).save(folder / 'masks/ISIC_1.png')
    dataset = MaskFolderDataset(folder / 'images', folder / 'masks', 5, in_chans=1)
    assert all((item['label'].numpy() == labels).all() and item['image'].shape == (1, 20, 30) for item in dataset)
    Image.fromarray(labels.astype(np.uint8)).convert('RGB').save(folder / 'masks/ISIC_1.png')
    assert (dataset[1]['label'].numpy() == labels).all()


def test_labels_outside_the_classes(folder):
    with pytest.raises(ValueError, match=r'ISIC_0_segmentation\.png has labels outside 0\.\.1: 255.*mapping'):
        MaskFolderDataset(folder / 'images', folder / 'masks', 2)[0]
    with pytest.raises(ValueError, match=r'has the values \[255\]'):
        MaskFolderDataset(folder / 'images', folder / 'masks', 2, {0: 0, 1: 1})[0]
    item = MaskFolderDataset(folder / 'images', folder / 'masks', 2, ignore_index=255)[0]
    assert item['label'].unique().tolist() == [0, 255]


def _smaller(folder):
    Image.new('L', (30, 19)).save(folder / 'masks/ISIC_1_segmentation.png')


@pytest.mark.parametrize(
    ('change', 'error', 'message'),
    [
        (lambda f: (f / 'masks/ISIC_1_segmentation.png').unlink(), FileNotFoundError, r'ISIC_1\.png has no mask'),
        (lambda f: (f / 'images/ISIC_1.png').unlink(), ValueError, '1 masks have no image'),
        (_smaller, ValueError, r'is \(30, 20\) pixels, but its mask .* is \(30, 19\)'),
        (lambda f: Image.new('L', (30, 20)).save(f / 'masks/ISIC_1.png'), ValueError, 'several masks'),
        (lambda f: Image.new('L', (30, 20)).save(f / 'images/ISIC_1.bmp'), ValueError, 'share a mask'),
        (lambda f: (f / 'images/ISIC_0.png').write_bytes(b'no picture'), ValueError, r'cannot read .*ISIC_0\.png'),
        (lambda f: (f / 'masks').rename(f / 'labels'), FileNotFoundError, 'no folder .*masks'),
    ],
)
def test_folders_that_do_not_fit(folder, change, error, message):
    change(folder)
    with pytest.raises(error, match=message):
        isic(folder.parent)


def test_masks_that_hold_no_labels(folder):
    for name, image in (('ISIC_0.jpg', Image.new('L', (30, 20))), ('ISIC_1.png', Image.new('RGB', (30, 20), 'red'))):
        (folder / f'masks/{name[:6]}_segmentation.png').unlink()
        image.save(folder / 'masks' / name)
    dataset = isic(folder.parent)
    with pytest.raises(ValueError, match='JPEG changes labels'):
        dataset[0]
    with pytest.raises(ValueError, match='colour picture'):
        dataset[1]
