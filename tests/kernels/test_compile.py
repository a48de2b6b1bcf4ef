"""The Triton kernels compile for GPUs of several kinds, on a machine that has none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name('compile_kernels.py')


@pytest.mark.parametrize(
    'arguments',
    [
        ('cuda', '80', 'vmamba'),
        ('cuda', '90', 'vmamba', 'vim', 'sequence', 'lbvim'),
        ('hip', 'gfx942', 'vmamba', 'vim', 'segments of five'),
    ],
    ids=lambda arguments: '-'.join(arguments[:2]),
)
def test_compiles_for(arguments, tmp_path):
    env = {key: value for key, value in os.environ.items() if key != 'TRITON_INTERPRET'}
    env['TRITON_CACHE_DIR'] = str(tmp_path)  # compile, rather than find what an earlier run compiled
    done = subprocess.run([sys.executable, SCRIPT, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('_backward_kernel') == len(arguments) - 2
