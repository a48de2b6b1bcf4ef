"""EfficientViM, which is timm's, equals the published implementation with the authors' keys and shapes."""

import re

import pytest
import timm
import torch
from golden import golden
from golden.models import errors, fill

import vmzoo

NAMES = golden.names('efficientvim')
CLASSIFIERS = [name for name in NAMES if not name.endswith('_backbone')]


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_equals_the_published_model_in_float64(name):
    meta, want = golden.load(f'efficientvim/{name}')
    model = timm.create_model(re.sub(r'_d\d+$', '', name), depths=meta['config']['depths'])
    x = fill(model.double(), meta)
    got = {}
    for i, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda _, args, out, i=i: got.update({f'feat{i}': out[0], f'hidden{i}': out[2]}))
    with torch.inference_mode():
        got['logits'] = model(x.double())
    got = errors(got, want)
    assert max(got.values()) < 1e-5, got


@pytest.mark.parametrize('name', [name for name in NAMES if name not in CLASSIFIERS])
def test_features_equal_the_published_backbone_in_float64(name):
    meta, want = golden.load(f'efficientvim/{name}')
    features = timm.create_model(name.removesuffix('_backbone'), features_only=True).double().eval()
    state = {key: torch.from_numpy(value) for key, value in golden.fill_state(meta['keys']).items()}
    features.model.load_state_dict(vmzoo.convert_state_dict(state, features.model))
    unused = features.model.weights.numel()  # of the classifier
    assert sum(p.numel() for p in features.parameters()) == meta['params'] + unused
    with torch.inference_mode():
        maps = features(torch.from_numpy(golden.make_input(**meta['inputs']['x'])).double())
    got = errors({f'feat{i}': feature_map for i, feature_map in enumerate(maps)}, want)
    assert max(got.values()) < 1e-5, got
