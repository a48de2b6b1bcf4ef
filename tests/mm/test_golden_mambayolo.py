"""Mamba-YOLO's detector equals the published one: same keys and shapes, same maps and boxes."""

import pytest
import torch
from golden import golden

pytest.importorskip('mmdet')

from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint

import vmzoo.mm.mambayolo  # noqa: F401 (registers the detector)
from vmzoo.mm import config_folder

NAMES = {'mambayolo_t': 'tiny', 'mambayolo_l': 'large'}


@pytest.mark.parametrize('name', NAMES)
def test_equals_the_published_detector(name, tmp_path):
    meta, want = golden.load(f'mambayolo/{name}')
    state = {key: torch.from_numpy(value) for key, value in golden.fill_state(meta['keys']).items()}
    constant = meta['unfilled']
    assert constant == ['model.21.dfl.conv.weight']
    assert meta['params'] == sum(value.numel() for key, value in state.items() if is_parameter(key))
    cfg = Config.fromfile(config_folder() / f'detection/mambayolo_{NAMES[name]}_coco.py')
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
    assert meta['params'] == sum(p.numel() for p in model.parameters()) + state[constant[0]].numel()
    torch.save(state, tmp_path / 'published.pth')
    load_checkpoint(model, str(tmp_path / 'published.pth'), strict=True)  # as `load_from` does
    model = model.double().eval()
    x = torch.from_numpy(golden.make_input(**meta['inputs']['x'])).double()
    with torch.inference_mode():
        maps = model.extract_feat(x)
        cls_scores, bbox_preds = model.bbox_head(maps)
        got = {'pred': model.deploy()(x)}
    for level, scores, boxes, y in zip('345', cls_scores, bbox_preds, maps):
        got |= {f'raw_p{level}': torch.cat((boxes, scores), dim=1), f'neck_p{level}': y}
    errors = {key: golden.error(value.numpy(), want[key]) for key, value in got.items()}
    assert want.keys() - errors.keys() == {f'stage_p{i}' for i in range(2, 6)}
    assert max(errors.values()) < 1e-5, errors


def is_parameter(key: str) -> bool:
    return key.rpartition('.')[2] not in ('running_mean', 'running_var', 'num_batches_tracked')
