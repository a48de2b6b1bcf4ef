"""Kernels run compiled where there is a GPU, and in Triton's interpreter elsewhere (chosen before Triton is used)."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'


@pytest.fixture
def device() -> torch.device:
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
