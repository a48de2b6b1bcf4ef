"""ShuffleMamba equals the published implementation: same keys and shapes, same numbers, the same shuffles."""

import re

import pytest
import timm
import torch
from golden import golden
from golden.models import errors, fill

from vmzoo.models._isotropic import IsotropicMamba

NAMES = golden.names('shufflemamba')
LARGE = [name for name in NAMES if 'large' in name]
CLASSIFIERS = [name for name in NAMES if name not in LARGE and not re.search('_(train|backbone)$', name)]


def build(name: str, meta: dict, **options) -> IsotropicMamba:
    return timm.create_model(re.sub('_(128|train)$', '', name), img_size=meta['config']['img_size'], **options)


def load(name: str, **options) -> tuple[IsotropicMamba, torch.Tensor, dict, dict]:
    meta, want = golden.load(f'shufflemamba/{name}')
    model = build(name, meta, **options)
    x = fill(model, meta)
    return model.double(), x.double(), meta, want


# the references ran in float32, hence the tolerances
@pytest.mark.parametrize('name', CLASSIFIERS)
@torch.inference_mode()
def test_equals_the_published_model(name):
    model, x, _, want = load(name)
    tokens = model.forward_features(x)
    got = errors({'features': model.forward_head(tokens, pre_logits=True), 'logits': model.forward_head(tokens)}, want)
    assert max(got.values()) < 5e-5, got


@pytest.mark.parametrize('name', LARGE)
def test_large_models_have_the_published_keys_and_shapes(name):
    meta, _ = golden.load(f'shufflemamba/{name}')
    model = build(name, meta, device='meta')
    assert [[key, list(value.shape)] for key, value in model.state_dict().items()] == meta['keys']
    assert sum(p.numel() for p in model.parameters()) == meta['params']


@torch.inference_mode()
def test_dense_form_equals_the_published_one():
    meta, want = golden.load('shufflemamba/shufflemamba_tiny_backbone')
    model = timm.create_model('shufflemamba_base_seg', embed_dim=192, img_size=224)
    x = fill(model, meta)
    got = errors({f'feat{i}': level for i, level in enumerate(model.double()(x.double()))}, want)
    assert max(got.values()) < 5e-5, got


@torch.no_grad()
@pytest.mark.parametrize('checkpointing', [False, True])
def test_a_seed_gives_the_published_shuffles(checkpointing):
    model, x, meta, want = load('shufflemamba_tiny_train', shuffle_rate=0.6)
    orders = {}
    model.shuffle.register_forward_hook(lambda _, args, order: orders.update({str(args[0]): order}))
    torch.manual_seed(0)
    model.train().set_grad_checkpointing(checkpointing)
    got = model(x)
    assert {layer: order.tolist() for layer, order in orders.items() if order is not None} == meta['shuffle']
    got = errors({'logits': got, 'logits_eval': model.eval()(x)}, want)
    assert max(got.values()) < 5e-5, got
