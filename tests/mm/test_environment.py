"""What is said when a library is missing, broken or installed twice; and what works without any but mmengine."""

import subprocess
import sys

import pytest

from vmzoo.mm import environment, require


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)


def test_mmengine_is_enough():
    code = """
import sys
hidden = ('mmcv', 'mmseg', 'mmdet', 'mmpretrain')
for name in hidden:
    sys.modules[name] = None
import torch
import vmzoo.mm
from mmengine.registry import MODELS
backbone = MODELS.build(dict(type='VMZooBackbone', model_name='vmamba_nano'))
print(len(backbone(torch.randn(1, 3, 32, 32))))
"""
    result = python(code)
    assert result.stdout == '4\n', result.stderr


def test_both_lines_at_once(monkeypatch):
    monkeypatch.setattr(environment, 'installed', lambda name: name in ('onedl-mmcv', 'mmcv-lite'))
    with pytest.raises(ImportError, match='both provide mmcv; run: pip uninstall --yes onedl-mmcv mmcv-lite && pip'):
        environment.check_training()


def write_package(folder, name: str, text: str) -> None:
    (folder / name).mkdir()
    (folder / name / '__init__.py').write_text(text)


def test_opencv_without_the_libraries_of_a_desktop(tmp_path, monkeypatch):
    write_package(tmp_path, 'cv2', "raise ImportError('libGL.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'cv2', raising=False)
    with pytest.raises(ImportError, match=r'libGL.*pip install --force-reinstall --no-deps opencv-python-headless'):
        environment.check_training()


def test_missing_library():
    with pytest.raises(ImportError, match=r'mmnothing, which is not installed; run: pip install "vmzoo\[mm\]"'):
        require('mmnothing.models')


@pytest.mark.parametrize(
    ('package', 'module', 'text', 'message'),
    [
        ('mmcv', 'mmcv.ops', '', r"No module named 'mmcv\.ops'.*'Installation' in docs/mm\.md"),
        (
            'mmcv',
            'mmcv',
            "raise ImportError('undefined symbol: _ZN5torch')",
            'undefined symbol.*built for the installed',
        ),
        (
            'mmdet',
            'mmdet',
            "assert False, 'MMCV==2.2.0 is used but incompatible'",
            r'AssertionError: MMCV==2\.2\.0 is used.*do not fit together',
        ),
    ],
)
def test_broken_library(tmp_path, monkeypatch, package, module, text, message):
    write_package(tmp_path, package, text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in list(sys.modules):
        if name.partition('.')[0] == package:
            monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=message):
        require(module)
    for name in list(sys.modules):
        if name.partition('.')[0] == package:
            del sys.modules[name]


def test_a_whole_library():
    pytest.importorskip('mmseg')
    require('mmseg.models')
