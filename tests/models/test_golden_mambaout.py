"""MambaOut, which is timm's, equals the published implementation with the authors' keys."""

from pathlib import Path

import pytest
import timm
import torch
from golden import golden
from golden.models import errors, fill

NAMES = sorted(path.stem for path in (Path(golden.DIR) / 'mambaout').glob('*.npz'))


@pytest.mark.parametrize('name', NAMES)
def test_equals_the_published_model(name):
    meta, want = golden.load(f'mambaout/{name}')
    model = timm.create_model(name)
    x = fill(model, meta)
    with torch.inference_mode():
        final, maps = model.forward_intermediates(x)
        got = {f'feat{i}': feature_map for i, feature_map in enumerate(maps)}
        got['logits'] = model.forward_head(final)
    got = errors(got, want)
    assert max(got.values()) < 1e-4, got  # the reference ran in float32
