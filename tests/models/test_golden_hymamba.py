"""HyMamba and its pre-training equal the published implementation: its parameters give its numbers."""

import re

import pytest
import timm
import torch
from golden import golden
from golden.models import errors

import vmzoo
from vmzoo.models.hymamba import HyMamba, position_table
from vmzoo.models.mambamim import MambaMIM

# The release takes the visible tokens in the order of an unstable sort, which depends on the processor: that of the
# machine that made the fixture (AVX-512). Ours is the raster order, in which the scan of the network visits them.
KEPT = [
    [25, 3, 24, 6, 18, 12, 14, 13, 26, 23, 22, 21, 20, 19],
    [16, 24, 4, 14, 13, 9, 10, 20, 17, 18, 19, 26, 21, 22],
]


def load(name: str, model: torch.nn.Module) -> tuple[torch.Tensor, dict, dict]:
    meta, want = golden.load(f'mambamim/{name}')
    state = {key: torch.from_numpy(value) for key, value in golden.fill_state(meta['keys']).items()}
    model.load_state_dict(vmzoo.convert_state_dict(state, model))
    model.eval()
    return torch.from_numpy(golden.make_input(**meta['inputs']['x'])), meta, want


@torch.inference_mode()
def outputs(model: HyMamba, x: torch.Tensor) -> dict[str, torch.Tensor]:
    token_stage, got = model.stages[-1], {}
    hooks = [
        token_stage.register_forward_hook(lambda _, args, out: got.update(feat4=out)),
        token_stage.blocks[-1].register_forward_hook(lambda _, args, out: got.update(feat4_conv=out)),
    ]
    for i, stage in enumerate(model.stages[:-1]):
        hooks.append(stage.register_forward_hook(lambda _, args, out, key=f'feat{i}': got.update({key: out[1]})))
    got['logits'] = model(x)
    for hook in hooks:
        hook.remove()
    return got


def test_the_network_equals_the_published_one():
    model = timm.create_model('hymamba', img_size=48)
    x, meta, want = load('hymamba_48', model)
    backward = re.compile(r'\.mamba\.\w+_b(_log)?(\.|$)')
    unused = sum(torch.Size(shape).numel() for key, shape in meta['keys'] if backward.search(key))
    buffers = model.stages[-1].pos_embed.numel()
    assert sum(p.numel() for p in model.parameters()) == meta['params'] - unused - buffers
    got = errors(outputs(model, x), want)
    assert all(error < max(1e-4, 3 * meta['float32_error'].get(key, 0)) for key, error in got.items()), got
    got = errors(outputs(model.double(), x.double()), want)
    assert max(got.values()) < 1e-5, got


def test_the_pretraining_equals_the_published_one():
    model = MambaMIM(timm.create_model('hymamba', img_size=48), as_released=True)
    x, meta, want = load('mambamim_48_b2', model)
    model, x = model.double(), x.double()
    visible = torch.zeros(len(x), 27, dtype=torch.bool).scatter(1, torch.tensor(meta['config']['active']), True)
    visible = visible.view(len(x), 1, 3, 3, 3)
    kept = torch.tensor(KEPT)
    assert kept.shape == model.kept_tokens(visible, meta['config']['len_keep']).shape
    with torch.inference_mode():
        maps = model.encode(x, visible, kept)
        toki = model.interpolate(maps[0], visible)
        rec = model.decoder(model.densify(maps, visible))
        loss = model.loss(x, rec, visible)
    got = {f'feat{4 - i}': features for i, features in enumerate(maps)}
    got |= {'toki': toki, 'densified4': torch.where(visible, maps[0], toki), 'rec': rec, 'loss': loss[None]}
    want.pop('feat0')  # the loss does not depend on it
    got = errors(got, want)
    assert max(got.values()) < 1e-5, got


@pytest.mark.parametrize('side', [3, 6])
def test_position_table(side):
    _, want = golden.load(f'mambamim/pos_embed_{side}')
    table = position_table((side, side, side), 384, dtype=torch.float64)
    assert golden.error(table.numpy(), want['pos_embed']) < 1e-6
