"""Configs that build on those of another library and of vmzoo, in mmengine's old style and in its new one."""

import subprocess
import sys

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS

from vmzoo.mm import VMZooBackbone, config_folder


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Writes a config to a folder outside the repository, and reads it from yet another."""
    monkeypatch.chdir('/')

    def read_config(text, name='config.py'):
        (tmp_path / name).write_text(text)
        return Config.fromfile(tmp_path / name)

    return read_config


def test_vmzoo_s_configs(read):
    cfg = read(
        """
_base_ = 'vmzoo::classification/vmamba_nano_digits.py'
model = dict(num_classes=5)
hooks = _base_.custom_hooks
"""
    )
    assert cfg.model.num_classes == 5
    assert cfg.model.model_name == 'vmamba_nano'
    assert cfg.hooks == cfg.custom_hooks
    # Names in our configs are those of the config's default_scope, not of a registry of ours.
    assert '_scope_' not in cfg.model and '_scope_' not in cfg.hooks[0]


@pytest.mark.parametrize(
    ('library', 'base'),
    [
        ('mmseg', '_base_/default_runtime.py'),
        ('mmdet', '_base_/default_runtime.py'),
        ('mmpretrain', '_base_/default_runtime.py'),
        ('mmseg', 'swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'),
        ('mmdet', 'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'),
    ],
)
def test_configs_of_other_libraries(read, library, base):
    pytest.importorskip(library)
    cfg = read(f"_base_ = '{library}::{base}'\n")
    assert cfg.default_scope == library
    if 'model' in cfg:
        assert cfg.model._scope_ == library


def test_bases_of_several_kinds(read):
    pytest.importorskip('mmseg')
    read('work_dir = "here"\n', 'local.py')
    cfg = read("_base_ = ['local.py', 'mmseg::_base_/schedules/schedule_20k.py']\n")
    assert cfg.work_dir == 'here' and cfg.train_cfg.max_iters == 20000


def test_a_program_that_reads_the_config_before_it_imports_vmzoo(tmp_path):
    """As tools/train.py of the mm libraries does: the expression is evaluated before the base is looked for."""
    pytest.importorskip('mmseg')
    path = tmp_path / 'config.py'
    path.write_text("_base_ = __import__('vmzoo.mm') and ['mmseg::_base_/default_runtime.py']\n")
    code = f"""
import sys
from mmengine.config import Config
cfg = Config.fromfile({str(path)!r})
print(cfg.default_scope, cfg.model.type)
"""
    path.write_text(path.read_text() + "model = dict(type='VMZooBackbone', model_name='vmamba_nano')\n")
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout == 'mmseg VMZooBackbone\n', result.stderr


def test_pure_python_configs(read):
    read(
        """
from vmzoo.mm import VMZooBackbone

model = dict(type=VMZooBackbone, model_name='vmamba_nano', out_indices=(0, 1))
""",
        'parts.py',
    )
    cfg = read(
        """
from mmengine.config import read_base

with read_base():
    from .parts import *

model.update(out_indices=(2, 3))
"""
    )
    backbone = MODELS.build(cfg.model)
    assert isinstance(backbone, VMZooBackbone)
    assert backbone.out_indices == (2, 3)
    again = read(cfg.pretty_text, 'dumped.py')
    assert MODELS.build(again.model).out_channels == (96, 144)


@pytest.mark.parametrize(
    ('base', 'error', 'message'),
    [
        ('vmzoo::classification/vmamba_nano_digit.py', FileNotFoundError, 'did you mean classification/vmamba_nano'),
        ('vmzoo::x.py', FileNotFoundError, str(config_folder())),
        ('mmnothing::x.py', ImportError, r'pip install "vmzoo\[mm\]"'),
    ],
)
def test_wrong_bases(read, base, error, message):
    with pytest.raises(error, match=message):
        read(f"_base_ = '{base}'\n")
