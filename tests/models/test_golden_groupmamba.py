"""GroupMamba equals the published implementation: same numbers from the published state dict.

With these weights the network amplifies rounding two to five times a block, so that float64 is the judge.
"""

from pathlib import Path

import pytest
import timm
import torch
from golden import golden
from golden.models import errors, fill

NAMES = sorted(path.stem for path in (Path(golden.DIR) / 'groupmamba').glob('*.npz'))


def load(name: str) -> tuple[torch.nn.Module, torch.Tensor, dict, dict]:
    meta, want = golden.load(f'groupmamba/{name}')
    config = meta['config']
    options = {key: config[key] for key in ('num_classes', 'distillation', 'depths')}
    model = timm.create_model('_'.join(name.split('_')[:2]), **options)
    return model, fill(model, meta), meta, want


@torch.inference_mode()
def outputs(model: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    final, stages = model.forward_intermediates(x)
    got = {f'feat{i}': stage for i, stage in enumerate(stages)}
    return got | {'pre_logits': model.forward_head(final, pre_logits=True), 'logits': model.forward_head(final)}


@pytest.mark.parametrize('name', NAMES)
def test_equals_the_published_model_in_float64(name):
    model, x, _, want = load(name)
    got = errors(outputs(model.double(), x.double()), want)
    assert max(got.values()) < 1e-5, got


def test_equals_the_published_model_in_float32():
    model, x, meta, want = load('groupmamba_tiny_d1111')
    got = errors(outputs(model, x), want)
    assert all(error < max(1e-4, 3 * meta['float32_error'][key]) for key, error in got.items()), got
