"""Configs, datasets, preprocessing, optimiser groups and metric."""

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS
from PIL import Image

from vmzoo.mm import ClassificationMetric, DigitsDataset, ImagePreprocessor
from vmzoo.mm.config import complete, config_folder, find_config, loaders, parse_options, set_epochs
from vmzoo.mm.datasets import collate_readable

OWN_DATA = ('image_folder', 'vmamba_nano_digits')  # the others, for published results, have tests of their own
CONFIGS = [config_folder() / 'classification' / f'{name}.py' for name in OWN_DATA]


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_config_builds(path, image_folder):
    cfg = Config.fromfile(str(path))
    if cfg.model.model_name is None:
        cfg.model.model_name = 'vmamba_nano'
        for loader in loaders(cfg):
            loader.dataset.root = str(image_folder)
    cfg = complete(cfg)
    model = MODELS.build(cfg.model).eval()
    for loader in loaders(cfg):
        dataset = DATASETS.build(loader.dataset)
        batch = model.data_preprocessor(collate_readable([dataset[0], dataset[len(dataset) - 1]]))
        assert batch['inputs'].shape == (2, *loader.dataset.input_size)
        assert model(**batch).shape == (2, len(dataset.metainfo['classes']))
    assert find_config(path.stem) == path


def test_model_decides_what_the_config_leaves_open(image_folder):
    cfg = Config.fromfile(str(find_config('image_folder')))
    cfg.model.model_name = 'vmamba_tiny_s1l8'
    for loader in loaders(cfg):
        loader.dataset.root = str(image_folder)
    done = complete(cfg)
    assert done.model.num_classes == 2
    assert done.val_dataloader.dataset.input_size == (3, 224, 224)
    assert tuple(done.model.data_preprocessor.mean) == (0.485, 0.456, 0.406)
    cfg.model.in_chans = 1
    done = complete(cfg)
    assert done.val_dataloader.dataset.input_size == (1, 224, 224)
    assert done.model.data_preprocessor.std == pytest.approx((0.226,))


def test_schedule_stretches_with_the_epochs():
    cfg = Config.fromfile(str(find_config('image_folder')))
    set_epochs(cfg, 60)
    warmup, cosine = cfg.param_scheduler
    assert (warmup.end, cosine.begin, cosine.T_max) == (6, 6, 54)
    set_epochs(cfg, 1)
    assert cfg.train_cfg.max_epochs == 1 and [s.type for s in cfg.param_scheduler] == ['LinearLR']


def test_options_are_python_values_or_strings():
    known = dict.fromkeys('acdef')
    assert parse_options(['a.b=1e-3', 'c=(3, 32)', 'd=adamw', 'e=None', 'f=x=y'], known) == {
        **{'a.b': 1e-3, 'c': (3, 32), 'd': 'adamw'},
        **{'e': None, 'f': 'x=y'},
    }


def test_digits_split_is_fixed_and_disjoint():
    parts = {split: DigitsDataset(split) for split in ('train', 'val', 'test')}
    indices = [i for part in parts.values() for i in part.indices]
    assert sorted(indices) == list(range(1797))
    assert [len(part) for part in parts.values()] == [1197, 240, 360]
    assert np.bincount(parts['test'].targets).min() >= 34
    assert parts['test'].indices[:5] == DigitsDataset('test').indices[:5]
    sample = parts['train'][0]
    assert sample['inputs'].shape == (3, 32, 32) and sample['inputs'].dtype == torch.uint8


def test_preprocessor_normalises_mixes_and_keeps_odd_batches_even():
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    data = dict(inputs=images, targets=torch.arange(5), paths=list('abcde'))
    plain = ImagePreprocessor((0.5,) * 3, (0.25,) * 3)
    torch.testing.assert_close(plain(data)['inputs'], (images / 255 - 0.5) / 0.25)
    mixing = ImagePreprocessor((0.5,) * 3, (0.25,) * 3, num_classes=5, mixup=dict(mixup_alpha=1.0))
    mixed = mixing(data, training=True)
    assert mixed['inputs'].shape == (4, 3, 8, 8)
    torch.testing.assert_close(mixed['targets'].sum(1), torch.ones(4))
    assert mixing(data, training=False)['targets'].tolist() == [0, 1, 2, 3, 4]


def test_metric_counts():
    metric = ClassificationMetric(with_confusion=True)
    logits = torch.eye(6)[[0, 1, 2, 2]] + torch.tensor([0, 0, 0.0, 0.5, 0.1, 0.2])
    metric.process(dict(targets=torch.tensor([0, 1, 2, 0])), logits)
    result = metric.evaluate(4)
    assert result['top1'] == 75 and result['top5'] == 75
    assert result['confusion'][0][2] == 1 and sum(map(sum, result['confusion'])) == 4


def test_grey_image_for_a_colour_model(image_folder, tmp_path):
    for split in ('train', 'val'):
        for name in 'ab':
            (tmp_path / split / name).mkdir(parents=True)
            Image.new('L', (20, 30), 7).save(tmp_path / split / name / 'grey.png')
    dataset = DATASETS.build(dict(type='ImageFolderDataset', root=str(tmp_path), split='val', input_size=(3, 32, 32)))
    assert dataset[0]['inputs'].shape == (3, 32, 32)
