"""RoMA's encoder equals the published implementation: same keys and shapes, same numbers."""

import re

import pytest
import timm
import torch
from golden import golden
from golden.models import errors, fill

import vmzoo
from vmzoo.models.roma import RoMA

NAMES = [name for name in golden.names('roma') if 'dense' not in name]
LARGE = [name for name in NAMES if re.search('large|huge', name)]


def build(name: str, config: dict, **kwargs) -> RoMA:
    pool = 'avg' if config['global_pool'] else 'token'
    options = {'img_size': config['img_size'], 'num_classes': config['num_classes'], 'global_pool': pool}
    return timm.create_model('_'.join(name.split('_')[:2]), **options, **kwargs)


@pytest.mark.parametrize('name', [name for name in NAMES if name not in LARGE])
@torch.inference_mode()
def test_equals_the_published_model(name):
    meta, want = golden.load(f'roma/{name}')
    model = build(name, meta['config'])
    x = fill(model, meta).double()
    tokens = model.double().forward_features(x)
    pooled = model.forward_head(tokens, pre_logits=True)
    got = errors({'tokens': tokens, 'features': pooled, 'logits': model.forward_head(tokens)}, want)
    assert max(got.values()) < 1e-5, got


@pytest.mark.parametrize('name', LARGE)
def test_large_models_have_the_published_keys_and_shapes(name):
    meta, _ = golden.load(f'roma/{name}')
    model = build(name, meta['config'], device='meta')
    assert [[key, list(value.shape)] for key, value in model.state_dict().items()] == meta['keys']
    assert sum(p.numel() for p in model.parameters()) == meta['params']


@torch.inference_mode()
def test_dense_form_equals_the_published_one():
    meta, want = golden.load('roma/roma_base_dense_192')
    model = timm.create_model('roma_base_dense', img_size=192)
    head = 769 * 1000  # kept by the reference, but not used
    assert sum(p.numel() for p in model.parameters()) == meta['params'] - head
    state = {key: torch.from_numpy(value) for key, value in golden.fill_state(meta['keys']).items()}
    model.load_state_dict(vmzoo.convert_state_dict(state, model))
    maps = model.double().eval()(torch.from_numpy(golden.make_input(**meta['inputs']['x'])).double())
    got = errors({f'feat{i}': level for i, level in enumerate(maps)}, want)
    assert max(got.values()) < 1e-5, got
