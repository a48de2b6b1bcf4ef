"""MobileMamba equals the published implementation: same numbers from the published state dict."""

from pathlib import Path

import pytest
import timm
import torch
from golden import golden
from golden.models import errors, fill

from vmzoo.models.mobilemamba import MobileMamba

NAMES = sorted(path.stem for path in (Path(golden.DIR) / 'mobilemamba').glob('*.npz'))


def load(name: str) -> tuple[MobileMamba, torch.Tensor, dict]:
    """Model, image and outputs. The published code counts its constant wavelet filters as parameters."""
    meta, want = golden.load(f'mobilemamba/{name}')
    filters = {key: shape for key, shape in meta['keys'] if key in meta['unfilled']}
    meta['params'] -= sum(torch.Size(shape).numel() for shape in filters.values())
    config = meta['config']
    options = {'num_classes': config.get('num_classes', 0), 'distillation': config.get('distillation', False)}
    model = timm.create_model('_'.join(name.split('_')[:2]), **options)
    return model, fill(model, meta), want


@torch.inference_mode()
def outputs(model: MobileMamba, x: torch.Tensor) -> dict[str, torch.Tensor]:
    final, (stem, *stages) = model.forward_intermediates(x)
    got = {f'feat{i}': stage for i, stage in enumerate(stages)}
    return got | {'stem': stem, 'logits': model.forward_head(final)}


@pytest.mark.parametrize('name', NAMES)
def test_equals_the_published_model(name):
    """The published one ran in float32, whose rounding is all that is left between the two."""
    model, x, want = load(name)
    got = errors(outputs(model.double(), x.double()), want)
    assert max(got.values()) < 1e-5, got


@pytest.mark.parametrize('name', ['mobilemamba_t2', 'mobilemamba_b1_backbone'])
def test_equals_the_published_model_in_float32_before_and_after_fusing(name):
    model, x, want = load(name)
    for network in (model, model.fuse()):
        got = errors(outputs(network, x), want)
        assert max(got.values()) < 1e-4, got
