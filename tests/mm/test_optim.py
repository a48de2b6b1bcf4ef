"""Groups of parameters: learning rates by depth, weight decay, settings of heads, and the optimisers themselves."""

import pytest
import torch
from mmengine.model import BaseModule
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from models.test_timm_contract import small
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

import vmzoo.mm  # noqa: F401 (registers the constructor)


class Segmentor(BaseModule):
    """A backbone with a head, as every mm library builds them."""

    def __init__(self, name='vmamba_nano', **kwargs):
        super().__init__()
        self.backbone = MODELS.build(dict(type='VMZooBackbone', model_name=name, **kwargs))
        self.decode_head = nn.Sequential(nn.Conv2d(144, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))


class Classifier(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.backbone = small(name)


def build(model, kind='AdamW', paramwise_cfg=None, **kwargs):
    optimizer = dict(type=kind, lr=1.0, weight_decay=0.1, **kwargs)
    cfg = dict(constructor='VMZooOptimWrapperConstructor', optimizer=optimizer, paramwise_cfg=paramwise_cfg)
    return build_optim_wrapper(model, cfg).optimizer


def settings(model, **kwargs):
    """Learning rate and weight decay of every parameter that the optimiser has."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build(model, **kwargs).param_groups
    return {names[id(p)]: (group['lr'], group['weight_decay']) for group in groups for p in group['params']}


@pytest.mark.parametrize('name', ['vmamba_nano', 'vim_tiny_patch16_224', 'groupmamba_tiny', 'mambaout_femto'])
@pytest.mark.parametrize('rate', [None, 0.5])
def test_groups_are_those_of_timm(name, rate):
    model = Classifier(name)
    if rate is None:
        groups = create_optimizer_v2(model.backbone, opt='adamw', lr=1.0, weight_decay=0.1).param_groups
    else:
        no_decay = getattr(model.backbone, 'no_weight_decay', set)()
        groups = param_groups_layer_decay(
            model.backbone, weight_decay=0.1, no_weight_decay_list=no_decay, layer_decay=rate
        )
    want = {id(p): (g.get('lr_scale', 1.0), g['weight_decay']) for g in groups for p in g['params']}
    got = settings(model, paramwise_cfg=dict(layer_decay_rate=rate))
    for key, parameter in model.named_parameters():
        assert got[key] == pytest.approx(want[id(parameter)]), key


def test_layers_of_a_segmentor():
    model = Segmentor(out_indices=(3,), frozen_stages=1)
    got = settings(model, paramwise_cfg=dict(layer_decay_rate=0.5, custom_keys={'decode_head': dict(lr_mult=10.0)}))
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen and not got.keys() & set(frozen)
    assert got['backbone.model.layers.3.blocks.0.op.in_proj.weight'] == (0.5, 0.1)
    assert got['backbone.model.layers.2.blocks.1.op.in_proj.weight'] == (0.25, 0.1)
    assert got['backbone.model.layers.2.blocks.0.op.A_logs'] == (0.125, 0.0)
    assert got['backbone.model.outnorm3.weight'] == (1.0, 0.0)
    assert got['decode_head.0.weight'] == (10.0, 0.1)
    assert got['decode_head.1.weight'] == (10.0, 0.0)
    pairs = set(got.values())
    assert len(build(model, paramwise_cfg=dict(layer_decay_rate=0.5)).param_groups) <= len(pairs) + 1


def test_the_longest_key_counts_and_may_decay_what_is_not_decayed_otherwise():
    keys = {'head.1': dict(decay_mult=2.0), 'head': dict(lr_mult=3.0, decay_mult=0.5), '.A_logs': dict(decay_mult=1.0)}
    got = settings(Segmentor(), paramwise_cfg=dict(custom_keys=keys))
    assert got['decode_head.1.weight'] == (1.0, 0.2)
    assert got['decode_head.2.weight'] == (3.0, 0.05)
    assert got['backbone.model.layers.0.blocks.0.op.A_logs'] == (1.0, 0.1)
    assert got['backbone.model.layers.0.blocks.0.op.Ds'] == (1.0, 0.0)


@pytest.mark.parametrize(
    ('kind', 'expected'),
    [('AdamW', torch.optim.AdamW), (torch.optim.SGD, torch.optim.SGD), ('nadamw', None), ('adamw', torch.optim.AdamW)],
)
def test_optimisers_of_mmengine_and_of_timm(kind, expected):
    model = Segmentor()
    optimizer = build(model, kind)
    assert expected in (None, type(optimizer))
    sum(y.mean() for y in model.backbone(torch.randn(1, 3, 64, 64))).backward()
    optimizer.step()


def test_key_that_no_parameter_has_is_logged(monkeypatch):
    lines = []
    monkeypatch.setattr('vmzoo.mm.optim.print_log', lambda text, *_: lines.append(text))
    settings(Segmentor(), paramwise_cfg=dict(custom_keys={'deocde_head': dict(lr_mult=10.0)}))
    assert lines == ["custom_keys: no parameter has 'deocde_head' in its name"]


@pytest.mark.parametrize(
    ('model', 'paramwise_cfg', 'message'),
    [
        (Segmentor, dict(layer_decay=0.9), 'paramwise_cfg has no layer_decay; there are layer_decay_rate'),
        (Segmentor, dict(custom_keys={'head': dict(lr=0.1)}), 'has no lr; there are lr_mult'),
        (lambda: nn.Linear(2, 2), dict(layer_decay_rate=0.9), 'Linear has none'),
    ],
)
def test_wrong_settings(model, paramwise_cfg, message):
    with pytest.raises(ValueError, match=message):
        build(model(), paramwise_cfg=paramwise_cfg)


def test_learning_rate_is_needed():
    with pytest.raises(ValueError, match='has no lr'):
        cfg = dict(constructor='VMZooOptimWrapperConstructor', optimizer=dict(type='AdamW'))
        build_optim_wrapper(Segmentor(), cfg)
