"""The backbone of Mamba-YOLO equals the published detector's: same keys and shapes, same numbers."""

import pytest
import timm
import torch
from golden import golden

import vmzoo

NAMES = {'mambayolo_t': 'mambayolo_tiny', 'mambayolo_l': 'mambayolo_large'}


@pytest.mark.parametrize('name', NAMES)
def test_equals_the_published_backbone(name):
    meta, want = golden.load(f'mambayolo/{name}')
    state = {key: torch.from_numpy(value) for key, value in golden.fill_state(meta['keys']).items()}
    model = timm.create_model(NAMES[name], num_classes=0)
    model.load_state_dict(vmzoo.convert_state_dict(state, model))
    x = torch.from_numpy(golden.make_input(**meta['inputs']['x'])).double()
    with torch.inference_mode():
        maps = model.double().eval().forward_intermediates(x, intermediates_only=True)
    got = {f'stage_p{i + 2}': golden.error(y.numpy(), want[f'stage_p{i + 2}']) for i, y in enumerate(maps)}
    assert max(got.values()) < 1e-5, got
