"""Every config of docs/mm.md is read and its model built; its versions are the tested ones."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope

import vmzoo.mm

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / 'docs/mm.md').read_text(encoding='utf-8')
CONFIGS = re.findall(r'^```python\n(.*?)^```$', TEXT, re.MULTILINE | re.DOTALL)


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
    assert len(CONFIGS) == TEXT.count('```python')
    assert sum('model = dict(' in text for text in CONFIGS) == 4


def test_mmcv_is_the_tested_one():
    pinned = re.search(r'onedl-mmcv==\S+', (ROOT / 'constraints.txt').read_text(encoding='utf-8'))[0]
    assert re.findall(r'onedl-mmcv==\S+', TEXT) == [pinned]


def test_every_argument_of_the_backbone_is_there():
    for name in inspect.signature(vmzoo.mm.VMZooBackbone).parameters:
        assert name == 'kwargs' or f'`{name}`' in TEXT or f'`{name}=' in TEXT, name
