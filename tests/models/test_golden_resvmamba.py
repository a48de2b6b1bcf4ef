"""Res-VMamba equals the published implementation, its residual projections fixed: same shapes, same numbers."""

import timm
import torch
from golden import golden
from golden.models import errors, fill


def test_equals_the_published_model():
    meta, want = golden.load('resvmamba/resvmamba_tiny')
    model = timm.create_model('resvmamba_tiny')
    x = fill(model, {**meta, 'params': meta['params_with_residual_proj']}).double()
    with torch.inference_mode():
        final, stages = model.double().forward_intermediates(x)
        got = {'logits': model.forward_head(final), **{f'feat{i}': y for i, y in enumerate(stages)}}
    got = errors(got, want)
    assert max(got.values()) < 1e-5, got
