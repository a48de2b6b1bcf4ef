"""Every config of segmentation and detection builds in its published size, and learns in a small one."""

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from PIL import Image
from torch import nn

pytest.importorskip('mmseg')
pytest.importorskip('mmdet')
pytest.importorskip('mmcv.ops')

from mmcv.transforms import Compose

from vmzoo.cli.main import main
from vmzoo.mm import VMZooBackbone, config_folder
from vmzoo.mm.config import complete
from vmzoo.weights import published_weights

from .small import build_optimisation, small_arguments
from .test_libraries import batch

TASKS = {'segmentation': 'mmseg', 'detection': 'mmdet'}
# Mamba-YOLO has its own tests, and tiny_* are trained.
PATHS = [
    path
    for task in TASKS
    for path in sorted((config_folder() / task).glob('*.py'))
    if not path.stem.startswith(('mambayolo_', 'tiny_'))
]
STATED = {
    model['Name']: model['Metadata']
    for task in TASKS
    for model in yaml.safe_load((config_folder() / task / 'metafile.yml').read_text(encoding='utf-8'))['Models']
}
SIZE = 64


def kind(path: Path) -> tuple:
    """Configs of one kind differ in sizes only: made small, their models are the same."""
    text = path.read_text(encoding='utf-8')
    base, model_name = re.search(r'_base_ = [^\n]+', text), re.search(r"model_name='(\w+)'", text)
    return base[0], model_name and re.sub(r'_(tiny|small|base|large|300|528)', '', model_name[1])


one_of_each_kind = pytest.mark.parametrize('path', {kind(p): p for p in PATHS}.values(), ids=lambda path: path.stem)


def build(cfg: Config) -> nn.Module:
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return revert_sync_batchnorm(MODELS.build(cfg.model))


def shrink(cfg: Config) -> Config:
    """The config with a small backbone, and heads of its widths that are narrow themselves."""
    model = cfg.model
    with torch.device('meta'):
        wide = MODELS.build(model.backbone).out_channels
    model.backbone.update(small_arguments(model.backbone.model_name))
    narrow = MODELS.build(model.backbone).out_channels
    widths = dict(zip(wide, narrow))

    def fit(part: ConfigDict, *keys: str) -> None:
        for key in keys:
            value = part[key]
            part[key] = widths[value] if isinstance(value, int) else [widths.get(width, width) for width in value]

    if 'neck' not in model:
        fit(model.decode_head, 'in_channels')
    elif model.neck.type == 'SSDNeck':
        fit(model.neck, 'in_channels', 'out_channels')
        fit(model.bbox_head, 'in_channels')
    else:
        fit(model.neck, 'in_channels')
    if 'auxiliary_head' in model:
        fit(model.auxiliary_head, 'in_channels')
        model.auxiliary_head.update(channels=8, num_classes=3)
    if 'decode_head' in model:
        model.decode_head.update(channels=16, num_classes=3)
    if 'roi_head' in model:
        model.roi_head.bbox_head.fc_out_channels = 16
        model.train_cfg.rcnn.sampler.num = 16
    return cfg


@pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)
def test_published_size(path):
    """Widths of backbone and heads agree; optimiser and schedule build, and the schedule ends with the training."""
    cfg = Config.fromfile(path)
    assert cfg.default_scope == TASKS[path.parent.name]
    assert complete(cfg).model == cfg.model
    with torch.device('meta'):
        model = build(cfg).eval()
    assert isinstance(model.backbone, VMZooBackbone)
    assert sum(p.numel() for p in model.parameters()) == STATED[path.stem]['Parameters']
    with torch.no_grad():
        maps = model.extract_feat(torch.zeros(1, 3, 2 * SIZE, 2 * SIZE, device='meta'))
        for head in ('decode_head', 'auxiliary_head', 'rpn_head', 'bbox_head'):
            if hasattr(model, head):
                assert getattr(model, head)(maps) is not None

    build_optimisation(cfg, model)


@one_of_each_kind
def test_learns_in_small(path):
    cfg = shrink(Config.fromfile(path))
    model = build(cfg).train()
    data = batch(cfg.default_scope)
    losses = model(**model.data_preprocessor(data, training=True), mode='loss')
    loss, _ = model.parse_losses(losses)
    loss.backward()
    assert loss.isfinite()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@one_of_each_kind
def test_published_classifier_fits(path):
    backbone = Config.fromfile(path).model.backbone
    if not backbone.get('init_cfg'):
        pytest.skip('starts from random weights, or from a file that its user has')
    assert backbone.init_cfg.checkpoint in {weight.name for weight in published_weights()}
    architecture, _, _ = backbone.init_cfg.checkpoint.partition('.')
    source = timm.create_model(architecture, **small_arguments(architecture)).state_dict()
    backbone.update(small_arguments(backbone.model_name))
    model = MODELS.build(backbone)
    weights, _, _ = model.fit(source)
    assert {key.partition('.')[0].rstrip('0123456789') for key in weights.keys() - source.keys()} <= {'fpn', 'outnorm'}
    assert all(torch.equal(weights[key], source[key]) for key in weights.keys() & source.keys() - {'pos_embed'})


def test_a_config_elsewhere_builds_on_one_of_ours(tmp_path, monkeypatch):
    monkeypatch.chdir('/')
    (tmp_path / 'mine.py').write_text("""
_base_ = 'vmzoo::segmentation/upernet_vmamba_tiny_s1l8_ade20k.py'
model = dict(backbone=dict(init_cfg=None), decode_head=dict(num_classes=3), auxiliary_head=dict(num_classes=3))
""")
    cfg = Config.fromfile(tmp_path / 'mine.py')
    assert cfg.optim_wrapper.constructor == 'VMZooOptimWrapperConstructor'
    with torch.device('meta'):
        model = build(cfg)
    assert model.num_classes == 3 and model.backbone.model_name == 'vmamba_tiny_s1l8'


def test_trains_and_validates_on_files(tmp_path):
    rng = np.random.default_rng(0)
    for split in ('training', 'validation'):
        for kind, shape, suffix in (('images', (96, 96, 3), 'jpg'), ('annotations', (96, 96), 'png')):
            (tmp_path / kind / split).mkdir(parents=True)
            for i in range(2):
                picture = Image.fromarray(rng.integers(3, size=shape, dtype=np.uint8))
                picture.save(tmp_path / kind / split / f'{i}.{suffix}')
    small = dict(small_arguments('vmamba_tiny_s1l8'), init_cfg=None)
    options = [
        *(f'model.backbone.{key}={value}' for key, value in small.items()),
        *(
            'model.decode_head.in_channels=[16,32,64,128]',
            'model.decode_head.channels=16',
            'model.decode_head.num_classes=3',
        ),
        *('model.auxiliary_head.in_channels=64', 'model.auxiliary_head.num_classes=3'),
        *('train_cfg.max_iters=1', 'train_cfg.val_interval=1'),
        *('train_dataloader.num_workers=0', 'val_dataloader.num_workers=0'),
    ]
    arguments = ['upernet_vmamba_tiny_s1l8_ade20k', '--data', str(tmp_path), '--work-dir', str(tmp_path / 'work')]
    assert main(['train', *arguments, '--cfg-options', *options]) == 0
    log = next((tmp_path / 'work').rglob('scalars.json')).read_text(encoding='utf-8')
    assert '"decode.loss_ce"' in log and '"mIoU"' in log


# Pipelines


def pipelines() -> dict[str, tuple[str, list]]:
    """The different pipelines of all configs, by a config that has them."""
    found = {}
    for path in {kind(p): p for p in PATHS}.values():
        cfg = Config.fromfile(path)
        for split in ('train', 'val'):
            dataset = cfg[f'{split}_dataloader'].dataset
            dataset = dataset.get('dataset', dataset)
            found.setdefault(str(dataset.pipeline), (f'{path.stem}-{split}', cfg.default_scope, dataset))
    return list(found.values())


@pytest.mark.parametrize(('scope', 'dataset'), [pytest.param(*rest, id=name) for name, *rest in pipelines()])
def test_pipeline(scope, dataset, tmp_path):
    """A picture of noise goes through."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(256, size=(96, 128, 3), dtype=np.uint8)).save(tmp_path / 'image.png')
    Image.fromarray(rng.integers(3, size=(96, 128), dtype=np.uint8)).save(tmp_path / 'labels.png')
    box = dict(bbox=[10, 10, 90, 80], bbox_label=1, ignore_flag=0, mask=[[10, 10, 90, 10, 90, 80, 10, 80]])
    sample = dict(img_path=str(tmp_path / 'image.png'), img_id=0, height=96, width=128)
    sample.update(seg_map_path=str(tmp_path / 'labels.png'), reduce_zero_label=dataset.type == 'ADE20KDataset')
    sample.update(seg_fields=[], label_map=None, instances=[box])
    with DefaultScope.overwrite_default_scope(scope):
        out = Compose(dataset.pipeline)(sample)
    assert out['inputs'].ndim == 3
    assert out['data_samples'].img_shape == out['inputs'].shape[1:]
