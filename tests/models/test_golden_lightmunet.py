"""LightM-UNet equals the published implementation: same keys and shapes, same numbers.

With these weights the deep models amplify rounding errors a hundred million times, so that float64 is the judge.
"""

import pytest
import timm
import torch
from golden import golden
from golden.models import errors, fill

NAMES = golden.names('lightmunet')
SHALLOW = [name for name in NAMES if name.endswith('_shallow')]


def load(name: str) -> tuple[torch.nn.Module, torch.Tensor, dict, dict]:
    """Model, image, and the fixture's meta data and outputs."""
    meta, want = golden.load(f'lightmunet/{name}')
    config = meta['config']
    model = timm.create_model(
        name.removesuffix('_shallow'),
        embed_dim=config['init_filters'],
        num_classes=config['out_channels'],
        depths=config['blocks_down'],
        decoder_depths=config['blocks_up'],
    )
    return model, fill(model, meta), meta, want


@torch.inference_mode()
def outputs(model: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    maps = model.forward_intermediates(x, intermediates_only=True)
    decoded = model._decode(maps)
    got = {f'feat{i}': y for i, y in enumerate(maps)} | {f'dec{i}': y for i, y in enumerate(decoded)}
    return got | {'logits': model(x)}


@pytest.mark.parametrize('name', NAMES)
def test_equals_the_published_model_in_float64(name):
    model, x, _, want = load(name)
    got = errors(outputs(model.double(), x.double()), want)
    assert max(got.values()) < 1e-5, got


@pytest.mark.parametrize('name', SHALLOW)
def test_equals_the_published_model_in_float32(name):
    model, x, meta, want = load(name)
    got = errors(outputs(model, x), want)
    assert all(error < max(1e-4, 3 * meta['float32_error'][key]) for key, error in got.items()), got
