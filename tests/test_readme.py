"""Runs every code block of README.md, in its order, in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import vmzoo  # noqa: F401  registers the models

ROOT = Path(__file__).parents[1]
CHECKPOINT = 'vssm1_tiny_0230s_ckpt_epoch_264.pth'
# What takes too long for a test, and what a test runs instead. {env} is this environment.
SHORTENED = {
    'git clone <address of this repository> vmzoo && cd vmzoo': 'test -f Makefile',
    'make demo': "make -o '{env}/installed-train' 'VENV={env}' DEMO_ARGS='--epochs 1' demo",
    'vmzoo train image_folder --model vmamba_tiny_s1l8 --pretrained --data data': (
        'vmzoo train image_folder --model vmamba_tiny_s1l8 --pretrained --data data --epochs 1 '
        '--cfg-options train_dataloader.num_workers=0 val_dataloader.num_workers=0 test_dataloader.num_workers=0 '
        "'train_dataloader.dataset.input_size=(3,64,64)' 'val_dataloader.dataset.input_size=(3,64,64)' "
        "'test_dataloader.dataset.input_size=(3,64,64)' train_dataloader.batch_size=4"
    ),
    'make lint': "make -n -o '{env}/installed-train,mm,medical,dev' 'VENV={env}' lint",
    'make test': "make -n -o '{env}/installed-train,mm,medical,dev' 'VENV={env}' test",
}


def blocks():
    """Yields (language, code, expected output) of the README's code blocks."""
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    found = re.findall(r'^```(\w+)\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)
    for index, (language, code) in enumerate(found):
        if language != 'text':
            follows = found[index + 1] if index + 1 < len(found) else ('', '')
            yield language, code, follows[1] if follows[0] == 'text' else None


BLOCKS = list(blocks())


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    """A copy of the repository with images and a checkpoint in the published format, which also is timm's download."""
    root = tmp_path_factory.mktemp('readme') / 'vmzoo'
    ignored = shutil.ignore_patterns('.*', 'work_dirs', 'outputs', 'data', 'build', '*.egg-info', '__pycache__')
    shutil.copytree(ROOT, root, ignore=ignored)
    for split, count in (('train', 4), ('val', 2)):
        for label, colour in (('apple', 'red'), ('lime', 'green')):
            folder = root / 'data' / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new('RGB', (64, 48 + index), colour).save(folder / f'{index}.jpg')
    Image.new('RGB', (320, 240), 'orange').save(root / 'photo.jpg')
    torch.save({'model': timm.create_model('vmamba_tiny_s1l8').state_dict(), 'config': Config()}, root / CHECKPOINT)
    for cache in (root.parent / 'torch/hub/checkpoints', root / 'weights'):
        cache.mkdir(parents=True)
        shutil.copy(root / CHECKPOINT, cache)
    return root


class Config(dict):
    """Stands for the config object in a published file."""


def run(command, checkout):
    env = {
        **os.environ,
        'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}',
        'TORCH_HOME': str(checkout.parent / 'torch'),
        'HF_HUB_OFFLINE': '1',
    }
    return subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ('language', 'code', 'expected'), BLOCKS, ids=[code.splitlines()[0][:50] for _, code, _ in BLOCKS]
)
def test_block(checkout, language, code, expected):
    if language == 'python':
        result = run([sys.executable, '-c', code], checkout)
    else:
        assert language == 'bash', f'a block of {language} is not tested'
        lines = [SHORTENED.get(line, line).format(env=sys.prefix) for line in code.splitlines()]
        result = run(['bash', '-euo', 'pipefail', '-c', '\n'.join(lines)], checkout)
    assert result.returncode == 0, result.stdout + result.stderr
    if expected is not None:
        assert result.stdout == expected


def test_the_demo_wrote_its_pictures(checkout):
    names = ('predictions.png', 'confusion_matrix.png', 'scan_routes.png')
    assert all((checkout / 'outputs/digits' / name).stat().st_size > 10_000 for name in names)


def test_shortened_commands_are_those_of_the_readme():
    lines = {line for language, code, _ in BLOCKS if language == 'bash' for line in code.splitlines()}
    assert set(SHORTENED) <= lines


def test_links_lead_somewhere():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    links = re.findall(r'\]\((?!https?:)([^)#]+)', text)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_make_installs_once(tmp_path):
    """With stand-ins for Python and pip: the first call sets up, the second does nothing, a change installs again."""
    for name in ('Makefile', 'setup.py', 'constraints.txt'):
        shutil.copy(ROOT / name, tmp_path)
    log = tmp_path / 'log'
    fake = tmp_path / 'fake-python'
    fake.write_text(
        '#!/bin/sh\n'
        'case "$*" in\n'
        '  "-m pip --version") test ! -e .venv/half; exit ;;\n'
        '  "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python; rm -f .venv/half ;;\n'
        'esac\n'
        f'echo "$@" >> "{log}"\n'
    )
    fake.chmod(0o755)

    def make(target):
        log.write_text('')
        subprocess.run(['make', 'PYTHON=./fake-python', target], cwd=tmp_path, check=True, capture_output=True)
        return log.read_text().splitlines()

    first = make('install')
    assert first[0] == '-m venv .venv'
    assert first[1].endswith('install --disable-pip-version-check -c constraints.txt -e .[train]')
    assert make('install') == []
    assert make('test')[0].endswith('-e .[train,mm,medical,dev]')
    assert make('test') == ['-m pytest -n 2 --dist loadfile']
    later = (tmp_path / '.venv/installed-train').stat().st_mtime + 5
    os.utime(tmp_path / 'setup.py', (later, later))
    assert make('install')[0].endswith('-e .[train]')
    os.utime(tmp_path / 'setup.py', (later + 5, later + 5))
    (tmp_path / '.venv/half').touch()  # as if `python -m venv` had been interrupted before it installed pip
    assert make('install')[0] == '-m venv .venv'
