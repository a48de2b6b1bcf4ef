"""VMZooBackbone equals the published dense backbones, whose weights it loads under their published names."""

import pytest
import torch
from golden import golden
from golden.models import errors
from mmengine.registry import MODELS

import vmzoo.mm  # noqa: F401 (registers the backbone)

# fixture: arguments, and the largest error that the fixture's own precision leaves
BACKBONES = {
    'vmamba/vmamba_tiny_s1l8': (dict(model_name='vmamba_tiny_s1l8'), 1e-5),
    'vmamba/vmamba_v0_tiny_172x206': (dict(model_name='vmamba_v0_tiny'), 1e-5),
    'efficientvmamba/efficientvmamba_tiny_backbone': (dict(model_name='efficientvmamba_tiny'), 1e-5),
    'mobilemamba/mobilemamba_b1_backbone': (dict(model_name='mobilemamba_b1'), 1e-5),
    'efficientvim/efficientvim_m4_backbone': (dict(model_name='efficientvim_m4'), 1e-5),
    'lbmamba/lbvim_tiny_backbone': (dict(model_name='lbvim_tiny_backbone'), 1e-4),
    'lbmamba/lbvim_300_backbone': (dict(model_name='lbvim_300_backbone'), 1e-4),
    'shufflemamba/shufflemamba_tiny_backbone': (
        dict(model_name='shufflemamba_base_seg', embed_dim=192, img_size=224),
        5e-5,
    ),
}


@pytest.mark.parametrize('fixture', BACKBONES)
def test_equals_the_published_backbone(fixture, tmp_path):
    arguments, tolerance = BACKBONES[fixture]
    meta, want = golden.load(fixture)
    keys = [*meta['keys'], *meta.get('backbone_keys', ())]
    state = {f'backbone.{key}': torch.from_numpy(value) for key, value in golden.fill_state(keys).items()}
    torch.save({'state_dict': state}, tmp_path / 'published.pth')
    backbone = MODELS.build(dict(type='VMZooBackbone', **arguments, pretrained=str(tmp_path / 'published.pth')))
    x = torch.from_numpy(golden.make_input(**meta['inputs']['x'])).double()
    with torch.inference_mode():
        maps = backbone.double().eval()(x)
    want = {key: value for key, value in want.items() if key.startswith('feat')}
    assert len(want) == len(maps)
    got = errors({f'feat{i}': y for i, y in enumerate(maps)}, want)
    assert max(got.values()) < tolerance, got
