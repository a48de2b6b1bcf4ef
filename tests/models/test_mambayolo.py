"""Mamba-YOLO's backbone: layers, names, initial values, bad input."""

import pytest
import timm
import torch
import torch.nn.functional as F

import vmzoo
from vmzoo.models.mambayolo import SPPF, SimpleStem, VisionClueMerge, checkpoint_filter_fn


def tiny(**kwargs):
    options = {'depths': (1, 1, 1, 2), 'embed_dim': (8, 16, 16, 24), 'd_state': 4, 'num_classes': 5}
    return timm.create_model('mambayolo_tiny', **{**options, **kwargs})


def test_merging_mixes_the_pixels_of_each_cell():
    """Also those that are not there: odd sides are filled up with zeros."""
    merge = VisionClueMerge(2, 3).eval()
    x = torch.randn(1, 3, 5, 2)
    got = merge(x)
    assert got.shape == (1, 2, 3, 3)
    weight = merge.pw_linear.conv.weight.permute(2, 3, 1, 0)  # row, column, in, out
    padded = F.pad(x, (0, 0, 0, 1, 0, 1))
    sums = sum(padded[:, i::2, j::2] @ weight[i, j] for i in range(2) for j in range(2)) + merge.pw_linear.conv.bias
    want = F.silu(sums / (1 + merge.pw_linear.bn.eps) ** 0.5)
    torch.testing.assert_close(got, want)


def test_pooling_takes_maxima_over_windows_of_5_9_and_13():
    pool = SPPF(4).eval()
    x = torch.randn(1, 15, 14, 4)
    y = pool.cv1(x.permute(0, 3, 1, 2))
    want = pool.cv2(torch.cat([y, *(F.max_pool2d(y, k, 1, k // 2) for k in (5, 9, 13))], 1)).permute(0, 2, 3, 1)
    torch.testing.assert_close(pool(x), want)


@pytest.mark.parametrize('size', [1, 2, 3])
def test_smallest_inputs(size):
    stem, merge = SimpleStem(3, 4).eval(), VisionClueMerge(2, 3).eval()
    for pixels, want in ((stem.min_input(size), size), (stem.min_input(size) - 1, size - 1)):
        assert pixels == 0 or stem(torch.zeros(1, 3, pixels, pixels)).shape[1] == want
    for pixels, want in ((merge.min_input(size), size), (merge.min_input(size) - 1, size - 1)):
        assert pixels == 0 or merge(torch.zeros(1, pixels, pixels, 2)).shape[1] == want


def test_features_are_rounded_up():
    maps = tiny(features_only=True).eval()(torch.randn(1, 3, 70, 33))
    assert [tuple(y.shape[2:]) for y in maps] == [(18, 9), (9, 5), (5, 3), (3, 2)]


def test_published_names_lead_to_ours():
    names = {
        'model.0.conv.4.running_var': (8,),
        'model.1.proj_conv.0.bias': (8,),
        'model.2.pw_linear.1.weight': (16,),
        'model.7.1.op.in_proj.weight': (96, 24, 1, 1),
        'model.7.1.norm2.norm.weight': (24,),
        'model.8.cv1.conv.weight': (12, 24, 1, 1),
        'model.11.in_proj.0.weight': (8, 24, 1, 1),
        'model.21.cv2.0.2.bias': (64,),
    }
    got = checkpoint_filter_fn({name: torch.ones(shape) for name, shape in names.items()}, tiny())
    target = tiny().state_dict()
    assert {key: value.shape for key, value in got.items()} == {key: target[key].shape for key in got}
    assert list(got) == [
        'patch_embed.1.bn.running_var',
        'layers.0.blocks.0.proj.conv.bias',
        'layers.0.downsample.pw_linear.bn.weight',
        'layers.3.blocks.1.ss2d.0.in_proj.weight',
        'layers.3.blocks.1.norm2.weight',
        'layers.3.blocks.2.cv1.conv.weight',
    ]


def test_own_weights_load_into_a_model_for_other_classes():
    source, model = tiny(), tiny(num_classes=3)
    model.load_state_dict(vmzoo.convert_state_dict(source.state_dict(), model))
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model.eval().forward_features(x), source.eval().forward_features(x))


def test_initial_values_are_the_published_ones():
    torch.manual_seed(0)
    scan = tiny(embed_dim=64).layers[0].blocks[0].ss2d[0]
    assert not scan.A_logs.any()
    assert (scan.Ds == 1).all()
    for parameter in (scan.dt_projs_weight, scan.dt_projs_bias):
        assert abs(parameter.mean()) < 0.2
        assert 0.8 < parameter.std() < 1.2
    norms = [module for module in tiny().modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.03)}


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'embed_dim': (8, 16)}, 'number of stages'),
        ({'d_state': 0}, 'd_state must be at least 1'),
        ({'global_pool': ''}, 'num_classes=0'),
        ({'output_stride': 16}, 'output_stride must be 32'),
    ],
)
def test_bad_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)
