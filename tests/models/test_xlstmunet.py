"""xLSTM-UNet: plans, forms, deep supervision, names, bad input."""

import pytest
import timm
import torch

import vmzoo
from vmzoo.models.xlstmunet import TokenMixer, _default_depths

TINY = {'embed_dim': (8, 8, 16, 32), 'strides': (1, 2, 2, 2), 'img_size': 32, 'num_classes': 3}


def tiny(name: str = 'uxlstm_bot_2d', **kwargs) -> torch.nn.Module:
    return timm.create_model(name, **{**TINY, **kwargs})


@pytest.mark.parametrize(
    'name, mixers',
    [
        ('uxlstm_bot_2d', '......v'),
        ('uxlstm_enc_2d', '.rv.v.v'),
        ('uxlstm_enc_2d_s8', '.r.v.v.v'),
        ('uxlstm_bot_3d', '.....v'),
        ('uxlstm_enc_3d', 'rrrvvv'),
    ],
)
def test_mixers_are_where_the_published_ones_are(name, mixers):
    model = timm.create_model(name, device='meta')
    depths = _default_depths(len(mixers))[0]
    got = ''
    for stage, depth in zip(model.stages, depths, strict=True):
        last = stage[depth] if len(stage) > depth else None
        got += '.' if last is None else 'v' if isinstance(last, TokenMixer) else 'r'
    assert got == mixers


@pytest.mark.parametrize(
    'num_stages, encoder, decoder',
    [
        (4, (2, 2, 1, 1), (2, 2, 1)),
        (6, (2, 2, 2, 1, 1, 1), (2, 2, 2, 1, 1)),
        (7, (2, 2, 2, 2, 1, 1, 1), (2, 2, 2, 2, 1, 1)),
    ],
)
def test_deeper_halves_have_one_block(num_stages, encoder, decoder):
    assert _default_depths(num_stages) == (encoder, decoder)


def test_a_tag_gives_channels_classes_and_size_of_its_data():
    model = timm.create_model('uxlstm_enc_2d.endovis17', device='meta')
    assert (model.in_chans, model.num_classes, model.img_size) == (3, 8, (384, 640))
    volumes = timm.create_model('uxlstm_enc_3d', device='meta')
    assert (volumes.in_chans, volumes.num_classes, volumes.img_size) == (1, 14, (48, 160, 224))


def test_blocks_over_channels_belong_to_a_size():
    model = tiny('uxlstm_enc_2d')
    assert [m.over_channels for m in model.modules() if isinstance(m, TokenMixer)] == [True]
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match=r'built for images of 32x32, got 32x48.*img_size='):
        model(torch.randn(1, 1, 32, 48))
    other = tiny('uxlstm_enc_2d', img_size=(32, 48))
    assert other(torch.randn(1, 1, 32, 48)).shape == (1, 3, 32, 48)
    with pytest.raises(vmzoo.weights.CheckpointMismatch, match='shapes differ'):
        vmzoo.convert_state_dict(model.state_dict(), other)


def test_without_blocks_over_channels_any_size_is_taken():
    model = tiny('uxlstm_enc_2d', embed_dim=(8, 8, 8, 8))
    assert model.img_size is None
    assert model(torch.randn(1, 1, 37, 50)).shape == (1, 3, 37, 50)


def test_a_map_of_one_position_is_refused():
    with pytest.raises(ValueError, match='The image is 8x8, of which the coarsest stage has one position'):
        tiny()(torch.randn(1, 1, 8, 8))
    assert tiny()(torch.randn(1, 1, 8, 9)).shape == (1, 3, 8, 9)


def test_deep_supervision_gives_logits_of_every_decoder_stage_while_training():
    model = tiny(deep_supervision=True)
    x = torch.randn(2, 1, 32, 48)
    logits = model.train()(x)
    assert [tuple(y.shape) for y in logits] == [(2, 3, 32, 48), (2, 3, 16, 24), (2, 3, 8, 12)]
    sum(y.mean() for y in logits).backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), logits[0])
    model.train().reset_classifier(5)
    assert [y.shape[1] for y in model(x)] == [5, 5, 5]


def test_heads_follow_the_model_that_weights_are_for(caplog):
    source = tiny(deep_supervision=True)
    for options in ({}, {'num_classes': 5}, {'deep_supervision': True, 'num_classes': 5}):
        model = tiny(**options)
        model.load_state_dict(vmzoo.convert_state_dict(source.state_dict(), model))
        assert torch.equal(model.decoder[0].up.weight, source.decoder[0].up.weight)
    assert 'head: 3 → 5 classes' in caplog.text


@pytest.mark.parametrize('name', ['uxlstm_bot_2d', 'uxlstm_bot_3d'])
def test_a_stem_for_other_channels_is_adapted(name):
    plan = {'kernel_size': 3}
    source, model = tiny(name, **plan), tiny(name, in_chans=2, **plan)
    model.load_state_dict(vmzoo.convert_state_dict(source.state_dict(), model))
    x = torch.randn(1, 1, *([16] * source.ndim))
    torch.testing.assert_close(model.eval()(x.repeat_interleave(2, dim=1)), source.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    'options, message',
    [
        ({'form': 'mid'}, "form must be 'bot' or 'enc', got 'mid'"),
        ({'strides': (1, 2)}, 'embed_dim has 4 stages, strides 2'),
        ({'strides': (1, 2, (2, 2, 2), 2)}, 'strides takes a number or 2 of them for each stage'),
        ({'depths': (1, 1)}, '4 stages need as many depths and 3 decoder_depths'),
        ({'img_size': (8, 8, 8)}, 'img_size takes a number or 2 of them'),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**{'img_size': 32, **options})


@torch.no_grad()
def test_starts_as_published():
    model = timm.create_model('uxlstm_bot_2d', embed_dim=(64, 128), strides=(1, 2), num_classes=3)
    conv = model.stages[1][0].conv2
    assert conv.weight.std() == pytest.approx((2 / (1 + 0.01**2) / (128 * 9)) ** 0.5, rel=0.02)
    assert not any(m.bias.any() for m in model.modules() if isinstance(m, torch.nn.Conv2d))
