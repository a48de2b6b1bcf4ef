"""LBVim equals the published implementation: same keys and shapes, same numbers."""

import re

import pytest
import timm
import torch
from golden import golden
from golden.models import errors, fill

import vmzoo  # noqa: F401 (registers the models)

NAMES = golden.names('lbmamba')


@torch.inference_mode()
def compare(name: str, dtype: torch.dtype, **options) -> dict[str, float]:
    meta, want = golden.load(f'lbmamba/{name}')
    model = timm.create_model(re.sub(r'_320$', '', name), img_size=meta['config']['img_size'], **options)
    assert list(model.state_dict()) == [key for key, _ in meta['keys']]
    x = fill(model, meta)
    out = model.to(dtype)(x.to(dtype))
    return errors({'logits': out} if 'logits' in want else {f'feat{i}': level for i, level in enumerate(out)}, want)


@pytest.mark.parametrize('name, dtype', [*((name, torch.float64) for name in NAMES), ('lbvim_tiny', torch.float32)])
def test_equals_the_published_model(name, dtype):
    """The published model was run in float32: what is left in float64 is its own error."""
    got = compare(name, dtype)
    assert max(got.values()) < 1e-4, got


def test_the_length_of_a_segment_matters():
    assert compare('lbvim_tiny', torch.float32, segment=16)['logits'] > 0.1
