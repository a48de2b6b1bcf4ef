"""VMZooBackbone in models of mmseg, mmdet and mmpretrain: they build from a config, learn, and predict."""

import importlib

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData

import vmzoo.mm  # noqa: F401 (registers the backbone)

SIZE = 64
CHANNELS = [24, 48, 96, 144]  # of vmamba_nano


def segmentor() -> str:
    return f"""
_base_ = ['mmseg::_base_/models/upernet_r50.py', 'mmseg::_base_/default_runtime.py']
custom_imports = dict(imports=['vmzoo.mm'], allow_failed_imports=False)
model = dict(
    data_preprocessor=dict(size=({SIZE}, {SIZE})),
    pretrained=None,
    backbone=dict(_delete_=True, type='VMZooBackbone', model_name='vmamba_nano', drop_path_rate=0.1),
    decode_head=dict(in_channels={CHANNELS}, channels=16, num_classes=3),
    auxiliary_head=dict(in_channels=96, channels=8, num_classes=3),
)
"""


def retinanet() -> str:
    return f"""
_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py', 'mmdet::_base_/default_runtime.py']
custom_imports = dict(imports=['vmzoo.mm'], allow_failed_imports=False)
model = dict(
    backbone=dict(
        _delete_=True, type='VMZooBackbone', model_name='vmamba_nano', out_indices=(1, 2, 3), frozen_stages=1
    ),
    neck=dict(in_channels={CHANNELS[1:]}, out_channels=16, start_level=0),
    bbox_head=dict(in_channels=16, feat_channels=16),
)
"""


def mask_rcnn() -> str:
    return f"""
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', 'mmdet::_base_/default_runtime.py']
custom_imports = dict(imports=['vmzoo.mm'], allow_failed_imports=False)
model = dict(
    backbone=dict(_delete_=True, type='VMZooBackbone', model_name='vmamba_nano'),
    neck=dict(in_channels={CHANNELS}, out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=16),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(in_channels=16, conv_out_channels=16),
    ),
)
"""


def classifier() -> str:
    return """
_base_ = 'mmpretrain::_base_/default_runtime.py'
custom_imports = dict(imports=['vmzoo.mm'], allow_failed_imports=False)
data_preprocessor = dict(num_classes=3)
model = dict(
    type='ImageClassifier',
    backbone=dict(type='VMZooBackbone', model_name='vmamba_nano', out_indices=(-1,)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=144),
)
"""


CONFIGS = {
    'mmseg': segmentor,
    'mmdet': retinanet,
    'mmdet, two stages': mask_rcnn,
    'mmpretrain': classifier,
}


def build(name: str, folder) -> torch.nn.Module:
    path = folder / 'config.py'
    path.write_text(CONFIGS[name]())
    cfg = Config.fromfile(path)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return revert_sync_batchnorm(MODELS.build(cfg.model))


def sample(library: str):
    """What stands beside an image in a batch of the library."""
    structures = importlib.import_module(f'{library}.structures')
    if library == 'mmpretrain':
        return structures.DataSample().set_gt_label(1)
    shape = dict(img_shape=(SIZE, SIZE), ori_shape=(SIZE, SIZE), pad_shape=(SIZE, SIZE), scale_factor=(1.0, 1.0))
    if library == 'mmseg':
        data = structures.SegDataSample(metainfo=shape)
        data.gt_sem_seg = PixelData(data=torch.randint(3, (1, SIZE, SIZE)))
        return data
    data = structures.DetDataSample(metainfo=shape)
    masks = structures.mask.BitmapMasks([torch.ones(SIZE, SIZE).numpy()], SIZE, SIZE)
    boxes = torch.tensor([[8.0, 8.0, 40.0, 48.0]])
    data.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([1]), masks=masks)
    return data


def batch(library: str, size: int = 2) -> dict:
    inputs = [torch.randint(256, (3, SIZE, SIZE), dtype=torch.uint8) for _ in range(size)]
    return dict(inputs=inputs, data_samples=[sample(library) for _ in range(size)])


def loss_of(model: torch.nn.Module, library: str) -> torch.Tensor:
    inner = getattr(model, 'module', model)
    data = batch(library)
    if library == 'mmpretrain':
        data['inputs'] = torch.stack(data['inputs'])
    losses = model(**inner.data_preprocessor(data, training=True), mode='loss')
    return inner.parse_losses(losses)[0]


@pytest.mark.parametrize('name', CONFIGS)
def test_learns_and_predicts(name, tmp_path):
    library = name.partition(',')[0]
    pytest.importorskip('mmcv.ops' if name == 'mmdet, two stages' else library)
    model = build(name, tmp_path).train()
    model.init_weights()
    loss = loss_of(model, library)
    loss.backward()
    assert loss.isfinite()
    unused = [key for key, p in model.backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []

    data = batch(library, 1)
    if library == 'mmpretrain':
        data['inputs'] = torch.stack(data['inputs'])
    with torch.no_grad():
        predictions = model.eval().test_step(data)
    assert len(predictions) == 1


def test_mmpretrain_s_layer_decay_knows_the_layers(tmp_path):
    pytest.importorskip('mmpretrain')
    from mmengine.optim import build_optim_wrapper

    model = build('mmpretrain', tmp_path)
    cfg = dict(
        constructor='mmpretrain.LearningRateDecayOptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.1),
        paramwise_cfg=dict(layer_decay_rate=0.5),
    )
    groups = {group['param_name']: group['lr'] for group in build_optim_wrapper(model, cfg).optimizer.param_groups}
    assert groups['head.fc.weight'] == 1.0
    assert groups['backbone.model.layers.3.blocks.0.op.in_proj.weight'] == 0.5
    assert groups['backbone.model.patch_embed.0.weight'] == 0.5 ** (1 + sum((1, 1, 2, 1)))


def train_in_two(rank: int, folder) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    (folder / str(rank)).mkdir()
    model = MMDistributedDataParallel(build('mmseg', folder / str(rank)).train())  # find_unused_parameters=False
    for _ in range(2):  # the second forward pass fails if the first left a parameter without a gradient
        loss_of(model, 'mmseg').backward()
    dist.destroy_process_group()


def test_two_processes_wait_for_no_unused_parameter(tmp_path):
    pytest.importorskip('mmseg')
    from mm.test_libraries import train_in_two  # spawned processes cannot import `tests`, of which others install one

    mp.spawn(train_in_two, args=(tmp_path,), nprocs=2)
