"""Every config of docs/mm.md and docs/training.md is read and its model built; commands are what the programs take."""

import argparse
import inspect
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope

import vmzoo.mm
from vmzoo.cli import test, train
from vmzoo.mm.config import find_config

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / 'docs/mm.md').read_text(encoding='utf-8')
TRAINING = (ROOT / 'docs/training.md').read_text(encoding='utf-8')


def blocks(language, text):
    return re.findall(rf'^```{language}\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)


CONFIGS = blocks('python', TEXT) + blocks('python', TRAINING)
COMMANDS = [line for block in blocks('bash', TRAINING) for line in block.splitlines()]


@pytest.mark.parametrize('text', CONFIGS, ids=range(len(CONFIGS)))
def test_config(text, tmp_path):
    for library in re.findall(r"'(mm\w+)::", text):
        pytest.importorskip(library)
    (tmp_path / 'config.py').write_text(text)
    cfg = Config.fromfile(tmp_path / 'config.py')
    if 'model' not in cfg:
        return
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    with torch.inference_mode():
        x = torch.randn(1, 3, 64, 64)
        assert model.extract_feat(x) if hasattr(model, 'extract_feat') else model(x)


def test_no_block_is_left_out():
    assert len(CONFIGS) == (TEXT + TRAINING).count('```python')
    assert sum('model = dict(' in text for text in CONFIGS) == 6


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the documented commands are given: with the configs saved, and stand-ins for Python and srun."""
    pytest.importorskip('mmdet')
    for text, name in re.findall(r'^```python\n([^`]*)```\n\nSaved as `(.*?)`', TRAINING, re.MULTILINE):
        (tmp_path / name).write_text(text)
    (tmp_path / 'detector.pth').touch()
    (tmp_path / 'srun').write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / 'srun').chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv('PYTHON', 'echo')
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize('line', COMMANDS)
def test_command(line, folder):
    words = shlex.split(line)
    if 'tools/dist_' in line or 'tools/slurm_' in line:
        words = shlex.split(
            subprocess.check_output(['bash', '-c', line.replace('tools/', f'{ROOT}/tools/')], text=True)
        )
        script = next(i for i, word in enumerate(words) if word.endswith(('tools/train.py', 'tools/test.py')))
        words = ['vmzoo', Path(words[script]).stem, *words[script + 1 :]]
    if words[0] == 'vmzoo':
        parser = argparse.ArgumentParser()
        command = dict(train=train, test=test)[words[1]]
        command.add_arguments(parser)
        args = parser.parse_args(words[2:])
        cfg = command.load_config(args)
        assert cfg.work_dir and cfg.model
    elif words[:2] == ['python', 'tools/benchmark.py']:
        backbones = words.index('--backbones')
        assert find_config(words[3]).is_file() and all(map(timm.is_model, words[backbones + 1 :]))
    else:
        assert line in ('python tools/make_tiny_data.py data/tiny', 'tensorboard --logdir work_dirs')


def test_mmcv_is_the_tested_one():
    pinned = re.search(r'onedl-mmcv==\S+', (ROOT / 'constraints.txt').read_text(encoding='utf-8'))[0]
    assert re.findall(r'onedl-mmcv==\S+', TEXT) == [pinned]


def test_every_argument_of_the_backbone_is_there():
    for name in inspect.signature(vmzoo.mm.VMZooBackbone).parameters:
        assert name == 'kwargs' or f'`{name}`' in TEXT or f'`{name}=' in TEXT, name
