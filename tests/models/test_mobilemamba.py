"""What is MobileMamba's own: the wavelet branch, the split of channels, fusing, heads, published names."""

import pytest
import timm
import torch
from timm.models import reparameterize_model
from torch import nn

import vmzoo
from vmzoo.models.mobilemamba import (
    BidirectionalSS2D,
    MobileMamba,
    MultiReceptiveMixer,
    WaveletScan,
    checkpoint_filter_fn,
    split_channels,
)

from .checks import loss_on_lines

TINY = {'depths': (1, 1, 1), 'embed_dim': (48, 56, 64), 'num_classes': 5}


def tiny(**kwargs) -> MobileMamba:
    return timm.create_model('mobilemamba_t2', **{**TINY, **kwargs})


def randomized(module: nn.Module) -> nn.Module:
    """Weights and running statistics that leave no layer without effect, in float64 and evaluation."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, mean=0.5, std=0.2)
    for name, buffer in module.named_buffers():
        if name.endswith('running_mean'):
            nn.init.normal_(buffer, std=0.2)
        elif name.endswith('running_var'):
            nn.init.uniform_(buffer, 0.5, 2.0)
    return module.double().eval()


# Mixer


@pytest.mark.parametrize(
    'dim, ratios, parts',
    [
        (144, (0.8, 0.2), (112, 28, 4)),
        (176, (0.8, 0.2), (144, 32, 0)),
        (192, (0.8, 0.2), (160, 32, 0)),
        (200, (0.8, 0.2), (160, 40, 0)),
        (272, (0.7, 0.2), (192, 54, 26)),
        (368, (0.7, 0.2), (256, 73, 39)),
        (376, (0.7, 0.2), (256, 75, 45)),
        (368, (0.6, 0.3), (224, 110, 34)),
        (448, (0.6, 0.3), (272, 134, 42)),
        (32, (0.8, 0.2), (32, 0, 0)),
    ],
)
def test_split_of_the_channels(dim, ratios, parts):
    assert split_channels(dim, *ratios) == parts


def test_only_the_wavelets_see_the_padding():
    part = randomized(WaveletScan(16, 3, 2.0))
    part.wavelet_conv.weight.data.zero_()
    x = torch.randn(1, 16, 5, 7, dtype=torch.float64)
    want = part.base_scale(part.scan(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    torch.testing.assert_close(part(x), want)


def test_parts_of_the_mixer_keep_to_their_channels():
    mixer = randomized(MultiReceptiveMixer(64, 0.5, 0.25, 3, 2.0))
    mixer.act, mixer.proj = nn.Identity(), nn.Identity()
    x = torch.randn(2, 64, 6, 6, dtype=torch.float64)
    y = mixer(x)
    torch.testing.assert_close(y[:, :32], mixer.global_op(x[:, :32]))
    torch.testing.assert_close(y[:, 32:48], mixer.local_op(x[:, 32:48]))
    assert torch.equal(y[:, 48:], x[:, 48:])


def test_a_mixer_without_local_channels():
    mixer = randomized(MultiReceptiveMixer(32, 0.8, 0.2, 3, 2.0))
    assert mixer.split == (32, 0, 0)
    assert mixer(torch.randn(2, 32, 5, 4, dtype=torch.float64)).shape == (2, 32, 5, 4)


def test_the_second_direction_is_the_reverse_of_the_first():
    scan = randomized(BidirectionalSS2D(16, 2.0))
    with torch.no_grad():
        for name in ('x_proj_weight', 'dt_projs_weight', 'dt_projs_bias'):
            parameter = getattr(scan, name)
            parameter[1] = parameter[0]
        for parameter in (scan.A_logs, scan.Ds):
            parameter[32:] = parameter[:32]
        scan.conv2d.weight.copy_((scan.conv2d.weight + scan.conv2d.weight.flip(2, 3)) / 2)
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(scan(x.flip(1, 2)), scan(x).flip(1, 2))


def test_a_new_block_doubles_its_input():
    model = tiny()
    x = torch.randn(2, 48, 4, 4)
    torch.testing.assert_close(model.layers[1].blocks[0](x), 2 * x)


# Fusing


@pytest.mark.parametrize('options', [{}, {'distillation': True}, {'features_only': True}])
def test_a_fused_model_is_the_same_function(options):
    model = randomized(tiny(**options))
    x = torch.randn(2, 3, 75, 98, dtype=torch.float64)
    with torch.no_grad():
        want = model(x)
        fused = reparameterize_model(model)
        for got, expected in zip(fused(x), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        assert not any(isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) for module in fused.modules())
        assert sum(1 for _ in fused.modules()) < sum(1 for _ in model.modules())
        again = reparameterize_model(fused)
        for got, expected in zip(again(x), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_fusing_in_place_keeps_dtype_and_device():
    model = tiny(dtype=torch.bfloat16).eval()
    assert model.fuse() is model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in tiny(device='meta').eval().fuse().parameters()} == {'meta'}


def test_a_model_in_training_is_not_fused():
    with pytest.raises(RuntimeError, match='eval'):
        tiny().fuse()


def test_a_fused_model_gets_a_new_classifier():
    model = tiny().eval().fuse()
    assert model.get_classifier().weight.shape == (5, 64)
    model.reset_classifier(3)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)


# Heads


def test_evaluation_averages_the_classifiers_and_training_returns_both():
    model = randomized(tiny(distillation=True))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    want = (model.classifier.head(features) + model.classifier.head_dist(features)) / 2
    torch.testing.assert_close(model(x), want)
    assert model.train()(x).shape == (2, 5)
    model.set_distilled_training()
    assert [out.shape for out in model(x)] == [(2, 5), (2, 5)]
    assert [layer.weight.shape for layer in model.get_classifier()] == [(5, 64), (5, 64)]


@pytest.mark.parametrize('options', [{'num_classes': 0}, {'num_classes': 0, 'global_pool': ''}, {'num_classes': 7}])
def test_a_checkpoint_for_other_classes(options):
    source, model = randomized(tiny()).float(), tiny(**options)
    model.load_state_dict(vmzoo.convert_state_dict(source.state_dict(), model))
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model.eval().forward_features(x), source.forward_features(x))
    if options['num_classes']:
        assert torch.equal(model.classifier.head.bn.running_var, source.classifier.head.bn.running_var)


# Names, features, options


def test_published_stages_lead_to_themselves():
    names = ('blocks1.0.dw0.m.c.weight', 'blocks2.1.se.fc1.bias', 'blocks2.3.dw0.m.c.weight', 'blocks3.2.0.m.c.weight')
    got = checkpoint_filter_fn(dict.fromkeys(names, torch.ones(1)), tiny(device='meta'))
    assert list(got) == [
        'layers.1.blocks.0.dw0.m.c.weight',
        'layers.1.downsample.1.se.fc1.bias',
        'layers.2.blocks.0.dw0.m.c.weight',
        'layers.2.downsample.2.0.m.c.weight',
    ]
    assert got.keys() <= tiny(device='meta').state_dict().keys()


def test_averaged_weights_are_preferred():
    source, model = tiny(), tiny()
    last = {key: torch.zeros_like(value) for key, value in source.state_dict().items()}
    model.load_state_dict(vmzoo.convert_state_dict({'net': last, 'net_E': source.state_dict()}, model))
    assert torch.equal(model.get_classifier().weight, source.get_classifier().weight)


def test_filters_of_another_wavelet_are_not_dropped():
    name = 'blocks1.0.mixer.m.attn.global_op.wt_filter'
    model = tiny(device='meta')
    assert not checkpoint_filter_fn({name: torch.ones(64, 1, 2, 2)}, model)
    assert checkpoint_filter_fn({name: torch.ones(64, 1, 4, 4)}, model)


def test_filter_leaves_our_own_names_alone():
    model = tiny(device='meta', distillation=True)
    state = model.state_dict()
    mapped = checkpoint_filter_fn(state, model)
    assert list(mapped) == list(state)


def test_constants_are_not_stored_and_survive_to_empty():
    model = tiny(device='meta')
    assert not any('haar' in key for key in model.state_dict())
    model.to_empty(device='cpu').init_weights()
    filters = model.layers[1].blocks[0].mixer.m.global_op.haar.filters
    assert torch.equal(filters, tiny().layers[1].blocks[0].mixer.m.global_op.haar.filters)


def test_features_are_the_stem_and_the_stages():
    model = tiny().eval()
    x = torch.randn(1, 3, 64, 96)
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert [tuple(y.shape[1:]) for y in maps] == [(48, 4, 6), (48, 4, 6), (56, 2, 3), (64, 1, 2)]
    torch.testing.assert_close(maps[0], model.patch_embed(x).permute(0, 3, 1, 2))
    assert tiny(features_only=True).feature_info.reduction() == [16, 32, 64]


def test_initial_values_are_the_published_ones():
    model = tiny()
    block = model.layers[3].blocks[0]
    scan = block.mixer.m.global_op.scan
    assert not scan.A_logs.any()
    assert (scan.Ds == 1).all()
    for parameter in (scan.dt_projs_weight, scan.dt_projs_bias):
        assert parameter.min() >= 0
        assert 0.08 < parameter.max() <= 0.1
    assert (block.mixer.m.global_op.wavelet_scale.weight == 0.1).all()
    assert (block.mixer.m.global_op.base_scale.weight == 1).all()
    zero = (block.dw0.m, block.ffn0.m.pw2, block.mixer.m.proj, model.layers[1].downsample[0][1].m.pw2)
    assert not any(conv.bn.weight.any() for conv in zero)
    assert (model.layers[1].downsample[0][0].m.bn.weight == 1).all()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'depths': (1, 1)}, 'number of stages: depths'),
        ({'embed_dim': (52, 56, 64)}, '52 channels: choose a multiple of 8'),
        ({'embed_dim': (8, 56, 64)}, 'gives the scan 0 of 8 channels'),
        ({'global_ratio': (1.2, 0.7, 0.6)}, 'gives the scan 64 of 48 channels'),
        ({'kernel_size': (7, 4, 3)}, 'odd'),
        ({'global_pool': ''}, 'num_classes=0'),
        ({'output_stride': 32}, 'output_stride must be 64'),
    ],
)
def test_bad_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_learns():
    assert loss_on_lines(tiny(num_classes=2, embed_dim=(32, 32, 32)), 30, size=64) < 0.3
