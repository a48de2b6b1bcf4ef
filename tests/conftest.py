"""Shared by all tests: fixed seeds, memory that is never silently zero, and kernels that run without a GPU."""

import os
import random
import sys
from pathlib import Path

# Kernels run compiled where there is a GPU and in Triton's interpreter elsewhere, which must be known before anything
# imports Triton, as torch does.
if not Path('/dev/nvidiactl').exists() and not Path('/dev/kfd').exists():
    os.environ['TRITON_INTERPRET'] = '1'
# Tests run small tensors, where waiting for a second thread costs more than it gives: 60 times more on a busy machine.
# This is for the processes that tests start; see below for their own.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np
import pytest
import torch

torch.set_num_threads(1)

_LIBRARY = ('vmzoo.', 'vmzoo_kernels.')

# Which functions a device context changes is remembered from its first use: that is before they are wrapped below.
with torch.device('meta'):
    torch.empty(0)


@pytest.fixture(autouse=True)
def fixed_seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _poisoned(allocate):
    def wrapper(*args, **kwargs):
        out = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():
            return out
        if out.is_floating_point() and f'{sys._getframe(1).f_globals.get("__name__", "")}.'.startswith(_LIBRARY):
            with torch.no_grad():
                out.fill_(torch.nan)
        return out

    return wrapper


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fill with NaN what the library allocates without a value, so that reading it before writing fails a test."""
    for owner, name in ((torch, 'empty'), (torch, 'empty_like'), (torch.Tensor, 'new_empty')):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture
def device() -> torch.device:
    """Where kernels are tested."""
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
