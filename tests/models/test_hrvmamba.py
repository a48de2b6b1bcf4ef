"""What is special about HRVMamba: parallel resolutions, its four forms, and checkpoints that go between them."""

import logging
import re

import pytest
import timm
import torch
from golden import golden
from torch import Tensor

import vmzoo
from vmzoo.models.hrvmamba import DVSSBlock
from vmzoo.weights import CheckpointMismatch

from .checks import loss_on_lines
from .exemptions import SMALL


def small(name: str, **kwargs) -> torch.nn.Module:
    return timm.create_model(name, **{**SMALL['hrvmamba'], **SMALL.get(name, {}), **kwargs})


def image(height: int = 64, width: int = 64, **kwargs) -> Tensor:
    return torch.randn(1, 3, height, width, **kwargs)


@pytest.mark.parametrize('height, width', [(64, 64), (65, 97), (40, 130), (1, 3)])
def test_branches_have_halving_sizes_at_any_size(height, width):
    model = small('hrvmamba_nano', features_only=True).eval()
    with torch.no_grad():
        shapes = [y.shape for y in model(image(height, width))]
    side = [tuple(-(-n // 2**i) for n in (height, width)) for i in range(2, 6)]
    assert shapes == [(1, dim, *size) for dim, size in zip(SMALL['hrvmamba']['embed_dim'], side)]


@pytest.mark.parametrize('conv_drop_path', [True, False])
def test_stochastic_depth_of_the_convolutions_is_an_option(conv_drop_path):
    block = DVSSBlock(8, drop_path=0.5, conv_drop_path=conv_drop_path)
    calls = []
    block.drop_path.register_forward_hook(lambda *_: calls.append(1))
    block(torch.randn(2, 3, 4, 8))
    assert len(calls) == 2 + conv_drop_path
    pose, classifier = small('hrvmamba_small_pose'), small('hrvmamba_small')
    assert not pose.stage2[0].branches[0][0].conv_drop_path
    assert classifier.stage2[0].branches[0][0].conv_drop_path


def test_stochastic_depth_grows_over_all_stages():
    model = timm.create_model('hrvmamba_nano', drop_path_rate=0.26, device='meta')
    rates = [
        [getattr(branch[k].drop_path, 'drop_prob', 0.0) for branch in module.branches]
        for stage in (model.stage2, model.stage3, model.stage4)
        for module in stage
        for k in range(2)
    ]
    assert all(len(set(own)) == 1 for own in rates)
    assert [own[0] for own in rates] == pytest.approx([0.02 * i for i in range(14)])


def test_pose_is_one_level_and_a_map_of_scores():
    model = small('hrvmamba_small_pose').eval()
    x = image(64, 48)
    with torch.no_grad():
        final, levels = model.forward_intermediates(x)
        assert [tuple(y.shape) for y in levels] == [(1, 8, 16, 12)]
        assert torch.equal(final, levels[0])
        heatmaps = model(x)
        assert heatmaps.shape == (1, 17, 16, 12)
        torch.testing.assert_close(heatmaps, model.get_classifier()(final))
        torch.testing.assert_close(model.forward_head(final, pre_logits=True), final)

        features = small('hrvmamba_small_pose', features_only=True).eval()
        kept = features.model.state_dict().keys()
        features.model.load_state_dict({key: value for key, value in model.state_dict().items() if key in kept})
        assert not any(key.startswith('head') for key in kept)
        torch.testing.assert_close(features(x)[0], final)

        model.reset_classifier(14)
        assert model(x).shape == (1, 14, 16, 12)
        model.reset_classifier(0)
        assert torch.equal(model(x), final)
        with pytest.raises(ValueError, match='NCHW'):
            model.forward_intermediates(x, output_fmt='NHWC')


def test_pose_features_leave_no_parameter_without_gradient():
    model = small('hrvmamba_tiny_pose', features_only=True).train()
    model(torch.randn(2, 3, 64, 64))[0].mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_dense_forms_have_no_classifier():
    for name in ('hrvmamba_base_seg', 'hrvmamba_small_crowdpose'):
        model = small(name)
        model.reset_classifier(0)
        assert isinstance(model.get_classifier(), torch.nn.Identity)
        with pytest.raises(ValueError, match='models for classification'):
            model.reset_classifier(10)
        with pytest.raises(ValueError, match='models for classification'):
            small(name, num_classes=10)


def test_a_pruned_classifier_returns_its_branches():
    model = small('hrvmamba_nano').eval()
    with torch.no_grad():
        want = model.forward_intermediates(image(), intermediates_only=True)
        assert small('hrvmamba_nano').prune_intermediate_layers([3], prune_head=False) == [3]
        model.prune_intermediate_layers([0, 2])
        got = model(image())
    assert [y.shape for y in got] == [want[0].shape, want[2].shape]
    assert model.num_features == want[2].shape[1]
    with pytest.raises(ValueError, match='neck'):
        model.reset_classifier(10, 'avg')


def test_a_kept_head_still_classifies():
    model = small('hrvmamba_nano').eval()
    x = image()
    with torch.no_grad():
        want = model(x)
        assert model.prune_intermediate_layers([1, 3], prune_head=False) == [1, 3]
        torch.testing.assert_close(model(x), want, rtol=0, atol=0)


def test_published_pose_files_load_with_their_head():
    """Backbone and head lie beside each other there, under `backbone.` and `head.`."""
    meta, _ = golden.load('hrvmamba/hrvmamba_small_pose_256x192')
    state = {key: torch.from_numpy(value) for key, value in golden.fill_state(meta['keys']).items()}
    model = timm.create_model('hrvmamba_small_pose')
    model.load_state_dict(vmzoo.convert_state_dict({'meta': {}, 'state_dict': state}, model))
    assert torch.equal(model.head.final_layer.weight, state['head.final_layer.weight'])
    assert torch.equal(model.conv1.weight, state['backbone.conv1.weight'])


@pytest.mark.parametrize(
    'name, absent',
    [('hrvmamba_small_crowdpose', ''), ('hrvmamba_small_pose', 'head'), ('hrvmamba_base_seg', 'outnorm0')],
)
def test_classification_weights_load_into_dense_forms(name, absent, caplog):
    source = small(re.sub('_(seg|pose|crowdpose)$', '', name))
    model = small(name)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        model.load_state_dict(vmzoo.convert_state_dict({'model': source.state_dict()}, model))
    assert (f'has no {absent}' in caplog.text) if absent else 'has no' not in caplog.text
    for key, value in model.state_dict().items():
        assert torch.equal(value, (own if absent and key.startswith(absent[:7]) else source.state_dict())[key]), key


def test_parts_are_missing_as_a_whole_or_not_at_all():
    model = small('hrvmamba_base_seg')
    state = model.state_dict()
    del state['outnorm2.bias']
    with pytest.raises(CheckpointMismatch, match=r'missing keys \(1\): outnorm2\.bias'):
        vmzoo.convert_state_dict(state, model)


@pytest.mark.parametrize(
    'given, built, options',
    [
        ({'pos_conv': False, 'se': False}, {}, 'pos_conv=False, se=False'),
        ({}, {'pos_conv': False}, 'pos_conv=True'),
        ({'dcn_pointwise': True, 'offset_conv': True}, {}, 'offset_conv=True, dcn_pointwise=True'),
    ],
)
def test_blocks_with_other_parts_are_named(given, built, options):
    source, model = small('hrvmamba_tiny_pose', **given), small('hrvmamba_tiny_pose', **built)
    with pytest.raises(CheckpointMismatch, match=f'create the model with {options}'):
        vmzoo.convert_state_dict(source.state_dict(), model)


@pytest.mark.parametrize(
    'option, message',
    [
        ({'embed_dim': 6}, 'multiple of 4, .* got 6'),
        ({'embed_dim': (8, 8)}, '1 or 4 numbers'),
        ({'num_modules': (1, 1)}, 'num_modules 3'),
        ({'embed_dim': 40}, 'multiple of the 3 groups'),
        ({'output_stride': 16}, 'output_stride must be 32'),
        ({'global_pool': ''}, 'num_classes=0'),
        ({'dt_rank': 0}, 'positive'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else '',
)
def test_bad_option_is_named(option, message):
    with pytest.raises(ValueError, match=message):
        small('hrvmamba_nano', **option)


def test_initialisation_moves_every_point():
    """The offsets' weights start away from zero, where DCNv4 alone starts: the layer passes something on."""
    model = small('hrvmamba_small')
    layer = model.stage2[0].branches[0][0].op.conv2d
    assert 0.01 < layer.offset_mask.weight.std() < 0.03
    assert not layer.offset_mask.bias.any()


def test_learns():
    assert loss_on_lines(small('hrvmamba_nano', num_classes=2), 18, batch=16, lr=1e-2) < 0.4
