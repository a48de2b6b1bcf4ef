"""Vim equals the published implementation: same keys and shapes, same numbers."""

import re

import pytest
import timm
import torch
from golden import golden
from golden.models import errors, fill

import vmzoo
from vmzoo.models.vim import VisionMamba, VisionMambaPyramid

NAMES = [name for name in golden.names('vim') if not name.startswith('pos_embed_')]


def build(name: str, config: dict) -> VisionMamba:
    """The registered model, or for `opt_*` one with our names for the reference's options."""
    if not name.startswith('opt_'):
        return timm.create_model(re.sub(r'_128$', '', name), img_size=config['img_size'])
    options = {
        'img_size': config['img_size'],
        'patch_size': config['patch_size'],
        'stride': config.get('stride'),
        'depth': config['depth'],
        'embed_dim': 96,
        'bidirectional': config['bimamba_type'] == 'v2',
        'average_directions': config['if_divide_out'],
        'rope': config['if_rope'],
        'rope_grid_size': config.get('pt_hw_seq_len', 14),
        'norm_layer': 'rmsnorm' if config['rms_norm'] else 'layernorm',
    }
    if not config['if_cls_token']:
        options.update(class_token='none', global_pool='avg')
    elif not config['use_middle_cls_token']:
        options.update(class_token='front')
    if 'out_indices' in config:
        return VisionMambaPyramid(
            block_indices=config['out_indices'],
            features='stream' if config['use_residual_as_feature'] else 'mixer',
            **options,
        )
    return VisionMamba(in_chans=config['channels'], num_classes=config['num_classes'], **options)


def load(name: str) -> tuple[VisionMamba, torch.Tensor, dict, dict]:
    meta, want = golden.load(f'vim/{name}')
    model = build(name, meta['config'])
    assert list(model.state_dict()) == [key for key, _ in meta['keys']]
    return model, fill(model, meta), meta, want


@torch.inference_mode()
def outputs(model: VisionMamba, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """All that fixtures hold; `mixerI` is what block I adds, `residualI` the stream that its norm takes."""
    got = {}
    for i, block in enumerate(model.layers):
        block.norm.register_forward_pre_hook(lambda _, args, key=f'residual{i}': got.update({key: args[0]}))
        block.mixer.register_forward_hook(lambda _, args, out, key=f'mixer{i}': got.update({key: out}))
    if isinstance(model, VisionMambaPyramid):
        got.update({f'feat{i}': level for i, level in enumerate(model(x))})
    else:
        tokens = model.forward_features(x)
        got.update(features=model.forward_head(tokens, pre_logits=True), logits=model.forward_head(tokens))
    return got


@pytest.mark.parametrize('name', NAMES)
def test_equals_the_published_model_in_float64(name):
    model, x, _, want = load(name)
    got = errors(outputs(model.double(), x.double()), want)
    assert max(got.values()) < 1e-5, got


@pytest.mark.parametrize('name', ['vim_tiny_patch16_224', 'opt_rope_headcls', 'opt_layernorm', 'opt_seg_residual_rope'])
def test_equals_the_published_model_in_float32(name):
    model, x, meta, want = load(name)
    got = errors(outputs(model, x), want)
    assert all(error < max(1e-4, 3 * meta['float32_error'][key]) for key, error in got.items()), got


def test_stored_rotary_tables_are_accepted():
    model, _, meta, _ = load('opt_rope_headcls')
    state = {key: torch.from_numpy(value) for key, value in golden.fill_state(meta['keys']).items()}
    assert meta['unfilled']
    tables = {key: torch.zeros(shape) for key, shape in meta['unfilled']}
    assert vmzoo.convert_state_dict(state | tables, model).keys() == state.keys()


def test_maps_are_the_stream_without_the_class_token():
    model, x, _, want = load('opt_odd_80')
    with torch.inference_mode():
        final, maps = model.double().forward_intermediates(x.double())
    got = outputs(model, x.double())
    for i, feature_map in enumerate(maps):
        stream = got[f'residual{i}'] + got[f'mixer{i}']
        patches = torch.cat((stream[:, :12], stream[:, 13:]), dim=1)  # 5x5 patches, class token at 12
        assert torch.equal(feature_map, patches.unflatten(1, (5, 5)).permute(0, 3, 1, 2))
    assert golden.error(final[:, 12].numpy(), want['features']) < 1e-5
