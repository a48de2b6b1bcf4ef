"""Every config of a published classifier builds, reads images and learns in a small form."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, HOOKS, MODELS, DefaultScope

from vmzoo.mm import config_folder
from vmzoo.mm.config import complete, loaders
from vmzoo.mm.datasets import collate_readable

from .small import build_optimisation, small_arguments
from .test_parts import OWN_DATA

PATHS = [path for path in sorted(config_folder().glob('classification/*.py')) if path.stem not in OWN_DATA]
OURS = [path for path in PATHS if not path.stem.startswith('mmpretrain_')]
MMPRETRAIN = [path for path in PATHS if path.stem.startswith('mmpretrain_')]


@pytest.mark.parametrize('path', OURS, ids=lambda path: path.stem)
def test_learns_in_small(path, image_folder):
    cfg = Config.fromfile(path)
    for loader in loaders(cfg):
        assert loader.dataset.root.startswith('data/')
        loader.dataset.root = str(image_folder)
    cfg = complete(cfg)
    assert cfg.train_dataloader.dataset.input_size[1] >= 192
    cfg.model.model_kwargs = {**cfg.model.get('model_kwargs', {}), **small_arguments(cfg.model.model_name)}
    model = MODELS.build(cfg.model).train()
    assert model.backbone.num_classes == cfg.model.num_classes

    for loader in loaders(cfg):
        loader.dataset.input_size = (3, 64, 64)
        dataset = DATASETS.build(loader.dataset)
        batch = model.data_preprocessor(collate_readable([dataset[0], dataset[len(dataset) - 1]]), training=True)
        loss = model(**batch, mode='loss')['loss']
    loss.backward()
    assert loss.isfinite()
    build_optimisation(cfg, model)
    for hook in cfg.custom_hooks:
        HOOKS.build(hook)


@pytest.mark.parametrize('path', MMPRETRAIN, ids=lambda path: path.stem)
def test_mmpretrain_learns_in_small(path):
    pytest.importorskip('mmpretrain')
    from .test_libraries import batch

    cfg = Config.fromfile(path)
    cfg.model.data_preprocessor = cfg.data_preprocessor  # as the Runner does
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        with torch.device('meta'):
            model = MODELS.build(cfg.model)
            assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
        cfg.model.backbone.update(small_arguments(cfg.model.backbone.model_name))
        cfg.model.head.in_channels = MODELS.build(cfg.model.backbone).out_channels[-1]
        model = MODELS.build(cfg.model).train()
    data = batch('mmpretrain')
    data['inputs'] = torch.stack(data['inputs'])
    loss = model(**model.data_preprocessor(data, training=True), mode='loss')['loss']
    loss.backward()
    assert loss.isfinite()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    build_optimisation(cfg, model)
