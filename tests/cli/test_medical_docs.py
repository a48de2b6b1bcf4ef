"""Every block of docs/medical.md runs, in its order."""

import argparse
import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from dicom_series import write_series
from PIL import Image

from vmzoo.cli import segment
from vmzoo.cli.main import main

nibabel = pytest.importorskip('nibabel')
pytest.importorskip('matplotlib')
TEXT = (Path(__file__).parents[2] / 'docs/medical.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'^```(\w+)\n(.*?)^```$', TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('docs')
    rng = np.random.default_rng(0)
    train = root / 'data/Synapse/train_npz'
    train.mkdir(parents=True)
    for index in range(2):
        image, label = rng.random((64, 64), dtype=np.float32), rng.integers(0, 9, (64, 64))
        np.savez(train / f'case0005_slice{index:03d}.npz', image=image, label=label)
    scan = rng.normal(0, 200, (60, 50, 2)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(scan, np.diag([2.0, 2, 5, 1])), root / 'scan.nii.gz')
    write_series(root / 'series', rng.integers(0, 2000, (1, 60, 50), dtype=np.uint16))
    (root / 'pictures').mkdir()
    Image.effect_noise((200, 150), 80).save(root / 'pictures/a.png')
    return root


@pytest.mark.parametrize(('language', 'code'), BLOCKS, ids=range(len(BLOCKS)))
def test_block(folder, monkeypatch, language, code):
    monkeypatch.chdir(folder)
    if language == 'python':
        exec(compile(code, 'docs/medical.md', 'exec'), {})
        return
    assert language == 'bash'
    torch.save(torch.load('organs.pth', weights_only=True)['state_dict'], 'plain.pth')
    for line in code.splitlines():
        program, *arguments = shlex.split(line)
        assert program == 'vmzoo'
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main(arguments) == 0, line
        if '--json' in arguments:
            assert json.loads(out.getvalue())[0]['labels'] == 'outputs/segment/a_labels.png'


def test_files_are_those_that_the_text_names(folder):
    assert [language for language, _ in BLOCKS] == ['python', 'bash', 'python']
    shapes = {
        'outputs/segment/scan_labels.nii.gz': (60, 50, 2),
        'outputs/series/series_labels.nii.gz': (50, 60, 1),
        'labels.nii.gz': (60, 50, 2),
    }
    for name, shape in shapes.items():
        image = nibabel.load(folder / name)
        assert image.get_data_dtype() == np.uint8 and image.shape == shape
    assert (folder / 'outputs/segment/scan_overlay.png').stat().st_size > 10_000


def test_every_option_is_there():
    parser = argparse.ArgumentParser()
    segment.add_arguments(parser)
    options = [name for action in parser._actions for name in action.option_strings if name.startswith('--')]
    plain = ('--help', '--device', '--batch-size')
    assert [name for name in options if name not in plain and name not in TEXT] == []
