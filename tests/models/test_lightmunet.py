"""LightM-UNet: names, sizes, bad input."""

import logging

import pytest
import timm
import torch

import vmzoo

TINY = {'depths': (1, 1), 'embed_dim': 8, 'd_state': 4}


def tiny(name: str = 'lightmunet_2d', **kwargs) -> torch.nn.Module:
    return timm.create_model(name, **{**TINY, **kwargs})


def test_channels_and_classes_are_those_of_the_data():
    for name, in_chans, num_classes in (('lightmunet_2d', 3, 2), ('lightmunet_3d', 1, 3), ('lightmunet_3d_f8', 1, 2)):
        model = timm.create_model(name, device='meta')
        assert (model.in_chans, model.num_classes) == (in_chans, num_classes)
        assert len(model.default_cfg['input_size']) == model.ndim + 1


@pytest.mark.parametrize(
    'options, message',
    [
        ({'embed_dim': 12}, r'8 groups: embed_dim must be multiples of that, got \(12, 24\)'),
        ({'decoder_depths': (1, 1)}, r'2 depths need 1 decoder_depths, got \(1, 1\)'),
        ({'ndim': 4}, 'ndim must be 2'),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_images_smaller_than_the_last_stage_are_refused():
    model = tiny(depths=(0, 0, 0, 0))
    assert model(torch.randn(1, 3, 8, 9)).shape == (1, 2, 8, 9)
    with pytest.raises(ValueError, match='is 7x9, but this model halves it 3 times and needs at least 8 pixels'):
        model(torch.randn(1, 3, 7, 9))


def test_own_weights_load_into_a_model_of_other_channels_and_classes(caplog):
    source, model = tiny(), tiny(in_chans=1, num_classes=5)
    stem = model.stem[1].weight.clone()
    with caplog.at_level(logging.WARNING):
        model.load_state_dict(vmzoo.convert_state_dict({'network_weights': source.state_dict()}, model))
    assert 'stem: 3 → 1 channels, as initialised' in caplog.text
    assert 'head: 2 → 5 classes' in caplog.text
    assert torch.equal(model.stem[1].weight, stem)
    assert torch.equal(model.decoder[0].up.weight, source.decoder[0].up.weight)


def test_a_model_pruned_to_its_encoder_makes_no_logits():
    model = timm.create_model('lightmunet_2d', features_only=True, out_indices=(0, 1), **TINY).model
    assert model.decoder is None
    with pytest.raises(ValueError, match='pruned to its encoder'):
        model.reset_classifier(3)
    x = torch.randn(1, 3, 16, 16)
    assert model.eval()(x).shape == (1, 16, 8, 8)


def test_recomputed_stages_have_equal_gradients():
    model = tiny()
    x = torch.randn(2, 3, 16, 16)
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for got, want in zip(*gradients):
        torch.testing.assert_close(got, want)
