"""Segmentors and detectors: they learn from real pictures, resume exactly, are measured, and run sharded."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip('mmseg')
pytest.importorskip('mmdet')

from mm.test_train import ENV, ROOT, load, scalars
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from vmzoo.cli.main import main
from vmzoo.mm import SeededDataset
from vmzoo.mm.checkpoint import load_weights
from vmzoo.mm.config import complete
from vmzoo.mm.operators import nms, roi_align

SEGMENTATION = """
_base_ = ['vmzoo::segmentation/tiny_mni152.py']
train_cfg = dict(max_iters=12, val_interval=6)
model = dict(data_preprocessor=dict(size=(64, 64)))
train_dataloader = dict(batch_size=2, num_workers={workers})
val_dataloader = dict(num_workers=0, dataset=dict(indices=4))
test_dataloader = dict(num_workers=0, dataset=dict(indices=4))
crop = dict(type='RandomCrop', crop_size=(64, 64))
train_dataloader['dataset'] = dict(pipeline=[*_base_.train_pipeline[:3], crop, *_base_.train_pipeline[4:]])
custom_hooks = [dict(type='BestAndLastHook', metric='mIoU', interval=4), {hook}]
"""
DETECTION = """
_base_ = ['vmzoo::detection/tiny_coins.py']
train_cfg = dict(max_epochs=2, val_interval=1)
train_dataloader = dict(batch_size=2, num_workers={workers}, dataset=dict(times=1, dataset=dict(indices=8)))
val_dataloader = dict(num_workers=0, dataset=dict(indices=4))
test_dataloader = dict(num_workers=0, dataset=dict(indices=4))
custom_hooks = [dict(type='BestAndLastHook', metric='coco/bbox_mAP'), {hook}]
"""


@HOOKS.register_module()
class StopOnceHook(Hook):
    """Stands for whatever kills a training; a marker file says that it has happened."""

    def __init__(self, marker: str, iteration: int) -> None:
        self.marker, self.iteration = Path(marker), iteration

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if runner.iter + 1 == self.iteration and not self.marker.exists():
            self.marker.touch()
            raise KeyboardInterrupt


@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp('tiny')
    subprocess.run(
        [sys.executable, ROOT / 'tools/make_tiny_data.py', root, '--only', 'coins', 'mni152'], check=True, env=ENV
    )
    return root


@pytest.fixture
def write_config(tmp_path):
    """Writes a user's own config; it lies in no folder of vmzoo's."""

    def write(text, hook='', workers=0, name='own.py'):
        (tmp_path / name).write_text(text.format(hook=hook, workers=workers))
        return str(tmp_path / name)

    return write


def same(first, second):
    assert first.keys() == second.keys()
    return [key for key, value in first.items() if not torch.equal(value, second[key])]


@pytest.mark.parametrize(
    ('text', 'data', 'metric', 'stop', 'workers'),
    [(SEGMENTATION, 'mni152', 'mIoU', 7, 1), (DETECTION, 'coins', 'coco/bbox_mAP', 6, 0)],
    ids=['segmentation', 'detection'],
)
def test_interrupted_training_resumes_to_the_same_end(
    write_config, tiny, tmp_path, capsys, monkeypatch, text, data, metric, stop, workers
):
    monkeypatch.chdir(tmp_path)
    whole = ['train', write_config(text, workers=workers), '--data', str(tiny / data), '--work-dir', 'whole']
    assert main(whole) == 0
    losses = scalars('whole', 'loss')
    assert all(torch.tensor(losses).isfinite()) and len(scalars('whole', metric)) == 2

    hook = f'dict(type="StopOnceHook", marker={str(tmp_path / "stopped")!r}, iteration={stop})'
    config = write_config(text, hook=hook, workers=0, name='killed.py')
    killed = ['train', config, '--data', str(tiny / data), '--work-dir', 'killed']
    assert main(killed) == 130
    assert 0 < load('killed/last.pth')['meta']['iter'] < stop
    assert main(killed) == 1 and 'add --resume' in capsys.readouterr().err
    assert main([*killed, '--resume']) == 0
    assert 'resuming after' in capsys.readouterr().out

    ends = [load(f'{folder}/last.pth') for folder in ('whole', 'killed')]
    assert same(*(end['state_dict'] for end in ends)) == []
    assert ends[0]['param_schedulers'] == ends[1]['param_schedulers']
    assert scalars('killed', metric)[-1] == scalars('whole', metric)[-1]
    best = load('whole/best.pth')
    assert best['meta']['dataset_meta']['classes'] and 'backbone' in best['meta']['cfg']

    assert main(['test', *whole[1:4], 'whole/best.pth', '--work-dir', 'test', '--pictures']) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert measured[metric] == pytest.approx(best['meta']['metrics'][metric])
    assert list(Path('test').glob('*/vis_data/vis_image/*.png'))
    assert b'test_' in next(Path('test').glob('*/vis_data/events.out.tfevents*')).read_bytes()


def test_loss_falls(write_config, tiny, tmp_path):
    config = write_config(SEGMENTATION)
    options = [
        'train_cfg.max_iters=40',
        'train_cfg.val_interval=40',
        'param_scheduler=None',
        'default_hooks.logger.interval=1',
    ]
    arguments = ['--data', str(tiny / 'mni152'), '--work-dir', str(tmp_path / 'work'), '--amp']
    assert main(['train', config, *arguments, '--cfg-options', *options]) == 0
    losses = scalars(tmp_path / 'work', 'loss')  # means of up to 50 iterations
    assert losses[-1] < 0.9 * losses[4]
    assert scalars(tmp_path / 'work', 'mIoU')[-1] > 40


def test_augmentation_depends_on_the_place_in_the_training_alone(tiny):
    cfg = Config.fromfile(str(ROOT / 'configs/segmentation/tiny_mni152.py')).train_dataloader
    cfg.dataset.data_root = str(tiny / 'mni152')

    def batches(workers, skip=0):
        from vmzoo.mm import VMZooRunner

        loader = dict(
            batch_size=2,
            num_workers=workers,
            dataset=dict(type='SeededDataset', dataset=dict(cfg.dataset, _scope_='mmseg')),
            sampler=dict(type='SeededSampler', sampler=dict(type='InfiniteSampler')),
        )
        loader = VMZooRunner.build_dataloader(loader, seed=3)
        assert isinstance(loader.dataset, SeededDataset) and loader.dataset.metainfo['classes'][1] == 'grey matter'
        if skip:
            loader.sampler.skip(skip)
        iterator = iter(loader)
        return [torch.stack(next(iterator)['inputs']) for _ in range(3)]

    reference = batches(0)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(reference, batches(2)))
    assert torch.equal(batches(1, skip=4)[0], reference[2])


def test_weights_of_another_number_of_classes(write_config, tiny, tmp_path, caplog):
    from mmengine.registry import MODELS, DefaultScope

    cfg = Config.fromfile(write_config(SEGMENTATION)).model
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg)
        cfg.decode_head.num_classes = 5
        cfg.auxiliary_head = None
        other = MODELS.build(cfg)
    path = tmp_path / 'weights.pth'
    torch.save(dict(state_dict=model.state_dict()), path)
    load_weights(model, path)
    with pytest.raises(ValueError, match='belongs to another model'):
        load_weights(other, path)
    load_weights(other, path, strict=False)
    assert same(model.backbone.state_dict(), other.backbone.state_dict()) == []
    torch.save(dict(state_dict=other.backbone.model.state_dict()), path)
    with pytest.raises(ValueError, match='belongs to another model'):
        load_weights(other, path, strict=False)


def test_nan_is_named(write_config, tiny, tmp_path, capsys):
    config = write_config(DETECTION)
    optimizer = "optim_wrapper.optimizer={'type': 'SGD', 'lr': 1e38, '_delete_': True}"
    options = [optimizer, 'optim_wrapper.clip_grad=None', 'param_scheduler=None']
    arguments = ['--data', str(tiny / 'coins'), '--work-dir', str(tmp_path / 'work')]
    assert main(['train', config, *arguments, '--cfg-options', *options]) == 1
    assert 'it first appears in' in capsys.readouterr().err


def test_options_that_do_not_fit(write_config, capsys):
    config = write_config(SEGMENTATION)
    for options, message in (
        (['--epochs', '2'], 'counts iterations'),
        (['--skip-broken'], 'go with image_folder'),
        (['--load-from', 'nowhere.pth'], 'no file nowhere.pth'),
        (['--model', 'vmamba_tini'], 'unknown model vmamba_tini'),
        (['--cfg-options', 'model.backbone.type=ResNet', 'strategy.type=VMZooFSDPStrategy'], 'tools/dist_train.sh'),
    ):
        assert main(['train', config, *options]) == 1
        assert message in capsys.readouterr().err


def test_deepspeed_says_what_to_install(write_config, capsys, tmp_path):
    text = SEGMENTATION.replace("tiny_mni152.py'", "tiny_mni152.py', 'vmzoo::_base_/deepspeed.py'")
    done = complete(Config.fromfile(write_config(text)))
    assert done.optim_wrapper.type == 'DeepSpeedOptimWrapper' and done.strategy.gradient_clipping == 5.0
    assert main(['train', write_config(text), '--work-dir', str(tmp_path / 'work')]) == 1
    assert 'pip install deepspeed' in capsys.readouterr().err


@pytest.fixture
def two_processes(tmp_path):
    def run(script, *arguments):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        env = {**ENV, 'PYTHON': sys.executable, 'PORT': str(port)}
        result = subprocess.run(
            [ROOT / 'tools' / script, *arguments], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return run


def test_sharded_training_is_that_of_whole_models(write_config, tiny, two_processes, tmp_path, capsys):
    text = SEGMENTATION.replace("tiny_mni152.py'", "tiny_mni152.py', 'vmzoo::_base_/fsdp.py'")
    options = ['--data', str(tiny / 'mni152'), '--cfg-options', 'train_cfg.max_iters=4', 'train_cfg.val_interval=4']
    sharded, plain = write_config(text, name='sharded.py'), write_config(SEGMENTATION)
    for config, folder in ((sharded, 'sharded'), (plain, 'plain')):
        two_processes('dist_train.sh', config, '2', '--work-dir', folder, *options)
    states = [load(tmp_path / folder / 'last.pth') for folder in ('sharded', 'plain')]
    assert states[0]['state_dict'].keys() == states[1]['state_dict'].keys()
    for key, value in states[1]['state_dict'].items():
        torch.testing.assert_close(states[0]['state_dict'][key], value, rtol=1e-3, atol=1e-4, msg=key)
    best = str(tmp_path / 'sharded/best.pth')
    assert main(['test', plain, best, '--work-dir', str(tmp_path / 'test'), *options]) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])['mIoU']
    assert measured == pytest.approx(load(best)['meta']['metrics']['mIoU'], abs=1)  # each process has its BatchNorm


def test_slurm_script_starts_one_process_a_gpu(tmp_path):
    (tmp_path / 'srun').write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / 'srun').chmod(0o755)
    env = {**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'GPUS': '4', 'SRUN_ARGS': '--time 1'}
    script = [ROOT / 'tools/slurm_train.sh', 'gpu', 'job', 'tiny_coins', '--work-dir', 'a b']
    out = subprocess.check_output(script, env=env, text=True)
    assert '--partition gpu --job-name job --gres gpu:4 --ntasks 4 --ntasks-per-node 4' in out
    assert out.endswith('tools/train.py tiny_coins --launcher slurm --work-dir a b\n') and '--time 1' in out


@pytest.mark.parametrize('offset', [0, 1])
def test_nms_of_torchvision_is_that_of_mmcv(offset):
    ops = pytest.importorskip('mmcv.ops')
    corners = 20 * torch.rand(200, 2)
    boxes, scores = torch.cat([corners, corners + 1 + 9 * torch.rand(200, 2)], 1), torch.rand(200)
    kept = nms(boxes, scores, 0.4, offset)
    assert kept.tolist() == ops.nms(boxes, scores, 0.4, offset)[1].tolist() and len(kept) < 150


@pytest.mark.parametrize('aligned', [False, True])
@pytest.mark.parametrize('sampling_ratio', [0, 2])
def test_roi_align_of_torchvision_is_that_of_mmcv(sampling_ratio, aligned):
    ops = pytest.importorskip('mmcv.ops')
    corners = 6 * torch.rand(9, 2)
    rois = torch.cat([torch.randint(2, (9, 1)).float(), corners, corners + 0.5 + 9 * torch.rand(9, 2)], 1)
    maps, gradient = torch.randn(2, 3, 8, 8), torch.randn(9, 3, 4, 5)
    results = []
    for function in (roi_align, getattr(ops.roi_align, '__wrapped__', ops.roi_align)):
        x = maps.clone().requires_grad_()
        out = function(x, rois, (4, 5), 0.5, sampling_ratio, 'avg', aligned)
        results.append((out, *torch.autograd.grad(out, x, gradient)))
    torch.testing.assert_close(*results)


# Configs as a user of mmpretrain has them: nothing of vmzoo in them, checkpoints by mmengine's hook, one in each style.
MMPRETRAIN = """
_base_ = ['mmpretrain::_base_/models/resnet18_cifar.py', 'mmpretrain::_base_/default_runtime.py']
pipeline = [dict(type='LoadImageFromFile'), dict(type='ResizeEdge', scale=32), dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=8,
    dataset=dict(type='CustomDataset', data_root={root!r}, data_prefix='train', pipeline=pipeline),
    sampler=dict(type='DefaultSampler', shuffle=True),
    num_workers=0,
)
model = dict(head=dict(num_classes=2))
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9))
train_cfg = dict(by_epoch=True, max_epochs=2)
custom_hooks = [{hook}]
"""
PURE_PYTHON = """
from mmengine.config import read_base
from mmengine.dataset import DefaultSampler
from mmengine.runner import EpochBasedTrainLoop
from mmpretrain.datasets import CustomDataset, LoadImageFromFile, PackInputs, ResizeEdge
from mmpretrain.models import GlobalAveragePooling, ImageClassifier, LinearClsHead, ResNet
from torch.optim import SGD

with read_base():
    from .hooks import *

default_scope = 'mmpretrain'
pipeline = [dict(type=LoadImageFromFile), dict(type=ResizeEdge, scale=32), dict(type=PackInputs)]
train_dataloader = dict(
    batch_size=8,
    dataset=dict(type=CustomDataset, data_root={root!r}, data_prefix='train', pipeline=pipeline),
    sampler=dict(type=DefaultSampler, shuffle=True),
    num_workers=0,
)
model = dict(
    type=ImageClassifier,
    data_preprocessor=dict(num_classes=2),
    backbone=dict(type=ResNet, depth=18),
    neck=dict(type=GlobalAveragePooling),
    head=dict(type=LinearClsHead, in_channels=512, num_classes=2),
)
optim_wrapper = dict(optimizer=dict(type=SGD, lr=0.01, momentum=0.9))
train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=2)
"""


@pytest.mark.parametrize('text', [MMPRETRAIN, PURE_PYTHON], ids=['mmpretrain', 'pure_python'])
def test_config_without_vmzoo_resumes_exactly(image_folder, tmp_path, monkeypatch, text):
    pytest.importorskip('mmpretrain')
    monkeypatch.chdir(tmp_path)
    hook = f'dict(type="StopOnceHook", marker={str(tmp_path / "stopped")!r}, iteration=3)'
    for name, stop in (('whole', ''), ('killed', hook)):
        Path('hooks.py').write_text(f'custom_hooks = [{stop}]\n')
        Path(f'{name}.py').write_text(text.format(root=str(image_folder), hook=stop))
    Path('hooks.py').write_text('custom_hooks = []\n')
    assert main(['train', 'whole.py']) == 0
    Path('hooks.py').write_text(f'custom_hooks = [{hook}]\n')
    assert main(['train', 'killed.py']) == 130
    assert main(['train', 'killed.py', '--resume']) == 0
    ends = [load(f'work_dirs/{name}/epoch_2.pth') for name in ('whole', 'killed')]
    assert same(*(end['state_dict'] for end in ends)) == []
    assert list(Path('work_dirs/killed').glob('*/vis_data/events.out.tfevents*'))
