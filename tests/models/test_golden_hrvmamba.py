"""HRVMamba equals the published implementation: same keys and shapes, same numbers."""

import re
from pathlib import Path

import pytest
import timm
import torch
from golden import golden
from golden.models import errors, fill

NAMES = sorted(path.stem for path in (Path(golden.DIR) / 'hrvmamba').glob('*.npz'))


def load(name: str) -> tuple[torch.nn.Module, torch.Tensor, dict, dict]:
    meta, want = golden.load(f'hrvmamba/{name}')
    options = {'dcn_pointwise': True} if name.endswith('_dcnproj') else {}
    model = timm.create_model(re.sub(r'_(backbone|dcnproj|\d+x\d+)$', '', name), **options)
    return model, fill(model, meta), meta, want


@torch.inference_mode()
def outputs(model: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    features, levels = model.forward_intermediates(x)
    got = {f'feat{i}': level for i, level in enumerate(levels)}
    if model.num_classes:
        got['heatmaps' if model.num_classes == 17 else 'logits'] = model.forward_head(features)
    return got


@pytest.mark.parametrize('name', NAMES)
def test_equals_the_published_model_in_float64(name):
    model, x, _, want = load(name)
    got = errors(outputs(model.double(), x.double()), want)
    assert max(got.values()) < 1e-5, got


@pytest.mark.parametrize('name', ['hrvmamba_nano', 'hrvmamba_small_pose_256x192'])
def test_equals_the_published_model_in_float32(name):
    model, x, meta, want = load(name)
    got = errors(outputs(model, x), want)
    assert all(error < max(1e-4, 3 * meta['float32_error'][key]) for key, error in got.items()), got
