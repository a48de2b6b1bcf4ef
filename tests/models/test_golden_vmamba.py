"""VMamba equals the published implementation: same keys and shapes, same numbers."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from golden import golden
from golden.models import errors, fill

import vmzoo

NAMES = golden.names('vmamba')

# Our options for the published `forward_type`.
MIXERS = {
    'v0': {'gate': True},
    'v05': {'gate': True},
    'v04_no32': {'gate': True},
    'v05_nozact': {'gate': True, 'gate_act': False},
    'v01_noz': {},
    'v05_noz': {},
    'v05_noz_oact': {'out_act_layer': 'gelu'},
    'v05_onnone_noz': {'out_norm': False},
    'v051d_noz': {'scan': 'unidi'},
    'v052d_noz': {'scan': 'bidi'},
    'v052d3_noz': {'scan': 'rotate'},
    'v052dc_noz': {'scan': 'cascade'},
    'm0_noz': {'mixer': 'ssd'},
}


def build(name: str, config: dict) -> torch.nn.Module:
    if not name.startswith('opt_'):
        return timm.create_model(re.sub(r'_(ln|\d+x\d+)$', '', name))
    return timm.create_model(
        'vmamba_nano',
        in_chans=config['in_chans'],
        num_classes=config['num_classes'],
        patch_size=config['patch_size'],
        depths=config['depths'],
        embed_dim=config['dims'],
        d_state=config['ssm_d_state'],
        ssm_ratio=config['ssm_ratio'],
        dt_rank=config['ssm_dt_rank'],
        kernel_size=max(config['ssm_conv'], 0),
        conv_bias=config['ssm_conv_bias'],
        act_layer=config['ssm_act_layer'],
        mlp_ratio=config['mlp_ratio'],
        mlp_act_layer=config['mlp_act_layer'],
        stem={'v1': 'patch', 'v2': 'conv'}[config['patchembed_version']],
        downsample={'v1': 'merge', 'v2': 'conv2x2', 'v3': 'conv'}[config['downsample_version']],
        **MIXERS[config['forward_type']],
    )


def load(name: str) -> tuple[torch.nn.Module, torch.Tensor, dict, dict]:
    meta, want = golden.load(f'vmamba/{name}')
    model = build(name, meta['config'])
    return model, fill(model, meta), meta, want


@torch.inference_mode()
def outputs(model: torch.nn.Module, x: torch.Tensor, meta: dict) -> dict[str, torch.Tensor]:
    final, stages = model.forward_intermediates(x)
    got = {'logits': model.forward_head(final)}
    norms = {key: torch.from_numpy(golden.fill_tensor(key, shape)) for key, shape in meta.get('backbone_keys', ())}
    for i, stage in enumerate(stages):
        got[f'stage{i}'] = stage
        if f'outnorm{i}.weight' in norms:
            weight, bias = norms[f'outnorm{i}.weight'].to(stage), norms[f'outnorm{i}.bias'].to(stage)
            got[f'feat{i}'] = F.layer_norm(stage.permute(0, 2, 3, 1), weight.shape, weight, bias).permute(0, 3, 1, 2)
    return got


@pytest.mark.parametrize('name', NAMES)
def test_equals_the_published_model_in_float64(name):
    model, x, meta, want = load(name)
    got = errors(outputs(model.double(), x.double(), meta), want)
    assert max(got.values()) < 1e-5, got


@pytest.mark.parametrize('name', ['vmamba_tiny_s1l8_ln', 'opt_single_v0', 'opt_m0_d16', 'opt_cascade2d'])
def test_equals_the_published_model_in_float32(name):
    model, x, meta, want = load(name)
    got = errors(outputs(model, x, meta), want)
    assert all(error < max(1e-4, 3 * meta['float32_error'][key]) for key, error in got.items()), got


def test_features_only_equals_the_stages():
    model, x, _, want = load('vmamba_tiny_s1l8_ln')
    features = timm.create_model('vmamba_tiny_s1l8', features_only=True, out_indices=(1, 2)).double().eval()
    kept = features.model.state_dict().keys()
    features.model.load_state_dict({key: value for key, value in model.state_dict().items() if key in kept})
    with torch.inference_mode():
        got = features(x.double())
    assert max(golden.error(y.numpy(), want[f'stage{i}']) for y, i in zip(got, (1, 2))) < 1e-5


def test_linear_weights_of_a_channels_first_checkpoint():
    model, _, meta, _ = load('opt_z')
    state = {key: torch.from_numpy(value) for key, value in golden.fill_state(meta['keys']).items()}
    as_conv = {
        key: value[..., None, None] if re.search(r'(proj|fc\d)\.weight$', key) else value
        for key, value in state.items()
    }
    converted = vmzoo.convert_state_dict(as_conv, model)
    assert sum(value.ndim == 4 for value in as_conv.values()) > sum(value.ndim == 4 for value in converted.values())
    assert all(torch.equal(converted[key], value) for key, value in model.state_dict().items())
