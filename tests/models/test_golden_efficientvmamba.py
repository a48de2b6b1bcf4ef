"""EfficientVMamba equals the published implementation: same keys and shapes, same numbers."""

import pytest
import timm
import torch
import torch.nn.functional as F
from golden import golden
from golden.models import errors, fill

import vmzoo


@pytest.mark.parametrize('name', ['efficientvmamba_tiny', 'efficientvmamba_small'])
def test_equals_the_published_model(name):
    meta, want = golden.load(f'efficientvmamba/{name}')
    model = timm.create_model(name)
    x = fill(model, meta).double()
    with torch.inference_mode():
        final, stages = model.double().forward_intermediates(x)
        got = {'logits': model.forward_head(final), **{f'feat{i}': y for i, y in enumerate(stages)}}
    got = errors(got, want)
    assert max(got.values()) < 1e-5, got


def test_equals_the_published_backbone_of_detectors():
    meta, want = golden.load('efficientvmamba/efficientvmamba_tiny_backbone')
    state = {key: torch.from_numpy(value) for key, value in golden.fill_state(meta['keys']).items()}
    norms = [[state.pop(f'outnorm{i}.{kind}').double() for kind in ('weight', 'bias')] for i in range(4)]
    features = timm.create_model('efficientvmamba_tiny', features_only=True).double().eval()
    features.model.load_state_dict(vmzoo.convert_state_dict(state, features.model))
    with torch.inference_mode():
        maps = features(torch.from_numpy(golden.make_input(**meta['inputs']['x'])).double())
    for i, (y, norm) in enumerate(zip(maps, norms, strict=True)):
        normed = F.layer_norm(y.permute(0, 2, 3, 1), norm[0].shape, *norm).permute(0, 3, 1, 2)
        assert golden.error(normed.numpy(), want[f'feat{i}']) < 1e-5
