"""What is RoMA's own: pooling around the class token, columns around it, weights of the pretraining, the dense form."""

import logging

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import vmzoo
from vmzoo.models.roma import RoMA

from .checks import assert_sizes_agree

SMALL = {'img_size': 64, 'depth': 3, 'embed_dim': 32}


def small(name: str = 'roma_base', **kwargs) -> RoMA:
    return timm.create_model(name, **{**SMALL, **kwargs}).eval()


def images(height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(2, 3, height, width)


@pytest.mark.parametrize('size', [(64, 64), (48, 48), (16, 16)])
def test_average_is_of_the_means_before_and_after_the_class_token(size):
    model = small(global_pool='avg', img_size=size)
    tokens = model.forward_features(images(*size))
    patches = size[0] * size[1] // 256
    middle = patches // 2
    before, after = tokens[:, :middle], tokens[:, middle + 1 :]
    want = (before.mean(1) + after.mean(1)) / 2 if middle else after.mean(1)
    torch.testing.assert_close(model.pool(tokens), want)


def test_every_way_to_another_image_size_agrees():
    assert_sizes_agree(small, 48, 112)


def pretraining_weights() -> dict[str, Tensor]:
    """The keys that the pretraining's files have."""
    one_way = RoMA(scan='forward', class_token='none', num_classes=0, global_pool='', **SMALL)
    state = {key: value for key, value in one_way.state_dict().items() if not key.startswith('norm_f')}
    decoder = ('angle_embed', 'ar_token', 'dec_pos_embed', 'mask', 'enc2dec.weight', 'dec_block.0.norm2.bias')
    return state | {key: torch.zeros(1) for key in (*decoder, 'norm_1.weight', 'ar_norm.bias', 'ar_pred.weight')}


@pytest.mark.parametrize('name', ['roma_base', 'roma_base_dense'])
@pytest.mark.parametrize('size', [64, 96])
def test_weights_of_the_pretraining_fill_every_direction(name, size, caplog):
    model = small(name, img_size=size)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = pretraining_weights()
    with caplog.at_level(logging.WARNING):
        model.load_state_dict(vmzoo.convert_state_dict({'model': state}, model))
    assert 'of the pretraining' in caplog.text
    mixer, prefix = model.layers[1].mixer, 'layers.1.mixer'
    for suffix in ('', '_b', '_c', '_c_b'):
        assert torch.equal(getattr(mixer, f'A{suffix}_log'), state[f'{prefix}.A_log'])
        assert torch.equal(getattr(mixer, f'D{suffix}'), state[f'{prefix}.D'])
        for layer in ('conv1d', 'x_proj', 'dt_proj'):
            assert torch.equal(getattr(mixer, layer + suffix).weight, state[f'{prefix}.{layer}.weight'])
    middle = (size // 16) ** 2 // 2
    assert torch.count_nonzero(model.pos_embed[:, middle]) == 0
    if size == 64:
        rows = torch.cat((model.pos_embed[:, :middle], model.pos_embed[:, middle + 1 :]), dim=1)
        assert torch.equal(rows, state['pos_embed'])
    assert torch.equal(model.cls_token, before['cls_token'])
    assert torch.equal(model.norm_f.weight, before['norm_f.weight'])


def test_dense_levels_are_made_of_the_last_normed_map():
    model, x = small('roma_base_dense'), images()
    with torch.inference_mode():
        maps = model(x)
        tokens = model.forward_features(x)
    assert [tuple(level.shape[1:]) for level in maps] == [(32, 16, 16), (32, 8, 8), (32, 4, 4), (32, 2, 2)]
    patches = torch.cat((tokens[:, :8], tokens[:, 9:]), dim=1)
    assert torch.equal(maps[2], patches.transpose(1, 2).unflatten(2, (4, 4)))
    assert torch.equal(maps[3], F.max_pool2d(maps[2], 2))


def test_a_classifier_loads_into_the_dense_form(caplog):
    source, model = small(), small('roma_base_dense')
    before = model.fpn2[0].weight.clone()
    with caplog.at_level(logging.WARNING):
        model.load_state_dict(vmzoo.convert_state_dict(source.state_dict(), model))
    assert 'the pyramid stays as initialised' in caplog.text
    assert torch.equal(model.fpn2[0].weight, before)
    assert torch.equal(model.norm_f.weight, source.norm_f.weight)


def test_the_dense_form_says_what_it_cannot_do():
    with pytest.raises(ValueError, match='no classifier'):
        small('roma_base_dense', num_classes=3)
    with pytest.raises(ValueError, match='too small'):
        small('roma_base_dense', dynamic_img_size=True)(images(31, 64))


@pytest.mark.parametrize(
    ('name', 'options', 'params'),
    [('small', {'num_classes': 30}, 38.10e6), ('large_dense', {'img_size': 192}, 309.49e6 - 1.025e6)],
)
def test_variants_have_the_published_number_of_parameters(name, options, params):
    model = timm.create_model(f'roma_{name}', device='meta', **options)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(params, rel=1e-3)
