"""A2Mamba equals the published implementation: same keys and shapes, same numbers."""

import re
from pathlib import Path

import pytest
import timm
import torch
from golden import golden
from golden.models import errors, fill

NAMES = sorted(path.stem for path in (Path(golden.DIR) / 'a2mamba').glob('*.npz'))


@pytest.mark.parametrize('name', NAMES)
def test_equals_the_published_model(name):
    meta, want = golden.load(f'a2mamba/{name}')
    model = timm.create_model(re.sub(r'_(d1|\d+x\d+)', '', name), depths=meta['config']['depths'])
    x = fill(model, meta)
    with torch.inference_mode():
        final, stages = model.double().forward_intermediates(x.double())
        got = {'logits': model.forward_head(final)} | {f'feat{i}': stage for i, stage in enumerate(stages)}
    got = errors(got, want)
    assert max(got.values()) < 1e-5, got
