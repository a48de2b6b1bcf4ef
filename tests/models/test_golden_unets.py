"""U-Nets equal the published implementations: same keys and shapes, same numbers."""

import logging
import re

import pytest
import timm
import torch
from golden import golden
from golden.models import errors, fill

import vmzoo
from vmzoo.weights import CheckpointMismatch

# Fixture -> what makes the registered model that of the fixture.
OPTIONS = {
    'vmunet/vmunet_isic': {},
    'vmunet/vmunet_2292': {'num_classes': 4},
    'msvmunet/msvmunet_synapse': {},
    'msvmunet/msvmunet_small_synapse': {},
    'mhsvm/mhsvm_3h': {},
    'mhsvm/mhsvm_4h': {},
}


def build(name: str, **kwargs) -> torch.nn.Module:
    return timm.create_model(name.rpartition('/')[2], **OPTIONS.get(name, {}), **kwargs)


@torch.inference_mode()
def outputs(model: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    maps = {}
    for i, stage in enumerate(model.decoder):
        stage.register_forward_hook(lambda module, args, y, i=i: maps.update({f'dec{i}': y}))
    got = {'logits': model(x)}
    got['prob'] = got['logits'].sigmoid()
    inputs, stages = model.encode(x)
    maps |= {f'skip{i}': y for i, y in enumerate(inputs)} | {f'feat{i}': y for i, y in enumerate(stages)}
    maps['bottleneck'] = stages[-1]
    return got | {key: y.permute(0, 3, 1, 2) for key, y in maps.items()}


@pytest.mark.parametrize('name', OPTIONS)
def test_equals_the_published_model_in_float64(name):
    meta, want = golden.load(name)
    model = build(name)
    x = fill(model, meta)
    got = errors(outputs(model.double(), x.double()), want)
    assert max(got.values()) < 1e-5, got


def test_vmunet_starts_encoder_and_decoder_from_a_classifier_as_published(caplog):
    meta, want = golden.load('vmunet/vmunet_isic_pretrained')
    model = timm.create_model('vmunet_isic')
    x = fill(model, meta)
    with torch.inference_mode():
        error = golden.error(model(x).numpy(), want['logits_before'])
        assert error < max(1e-4, 3 * meta['float32_error']['logits_before'])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weights = {key: torch.from_numpy(value) for key, value in golden.fill_state(meta['pretrained_keys']).items()}
    with caplog.at_level(logging.WARNING):
        model.load_state_dict(vmzoo.convert_state_dict({'model': weights}, model))
    assert 'decoder.1.upsample' in caplog.text and 'head stay as initialised' in caplog.text
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    expected = meta['expected']
    assert sum(key.startswith('encoder.') for key in changed) == expected['encoder_tensors']
    assert sum(key.startswith('decoder.') for key in changed) == expected['decoder_tensors']
    assert len(before) == expected['model_tensors']
    with torch.inference_mode():
        assert golden.error(model.double()(x.double()).numpy(), want['logits']) < 1e-5


def test_msvmunet_starts_its_encoder_from_a_classifier(caplog):
    classifier = timm.create_model('vmamba_nano', depths=(1, 1, 2, 1), embed_dim=16)
    model = timm.create_model('msvmunet_synapse', depths=(1, 1, 2, 1), decoder_depths=(1, 1, 1), embed_dim=16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        model.load_state_dict(vmzoo.convert_state_dict({'model': classifier.state_dict()}, model))
    assert 'decoder.0.fuse' in caplog.text and 'head stay as initialised' in caplog.text
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        got, want = (m.eval().forward_intermediates(x, intermediates_only=True) for m in (model, classifier))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if 'encoder' not in key)


def test_linear_layers_stored_as_convolutions_load():
    model = timm.create_model('msvmunet_synapse', depths=(1, 1, 1, 1), decoder_depths=(1, 1, 1), embed_dim=16)
    state = model.state_dict()
    is_linear = re.compile(r'(proj|fc\d)\.weight$')
    stored = {key: value[..., None, None] if is_linear.search(key) else value for key, value in state.items()}
    converted = vmzoo.convert_state_dict(stored, model)
    assert all(torch.equal(converted[key], value) for key, value in state.items())


def test_vmunet_refuses_a_classifier_of_another_generation():
    model = timm.create_model('vmunet_isic', depths=(1, 1, 1, 1), decoder_depths=(1, 1, 1, 1), embed_dim=24)
    other = timm.create_model('vmamba_nano', depths=(1, 1, 1, 1), embed_dim=24)
    with pytest.raises(CheckpointMismatch, match='unexpected keys'):
        vmzoo.convert_state_dict(other.state_dict(), model)


def test_gray_images_are_repeated_for_a_model_of_three_channels():
    model = timm.create_model('vmunet_isic', depths=(1, 1, 1, 1), decoder_depths=(1, 1, 1, 1), embed_dim=16).eval()
    x = torch.randn(1, 1, 64, 32)
    with torch.inference_mode():
        assert torch.equal(model(x), model(x.repeat(1, 3, 1, 1)))


def test_a_model_pruned_to_its_encoder_takes_no_classifier():
    model = timm.create_model('vmunet_isic', features_only=True, device='meta').model
    with pytest.raises(ValueError, match='create it anew'):
        model.reset_classifier(2)


@pytest.mark.parametrize('options, message', [({'num_heads': 2}, '3 or 4'), ({'embed_dim': 50}, 'choose a multiple')])
def test_heads_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('mhsvm_4h', device='meta', **options)


def test_stages_that_do_not_fit_are_refused():
    for name in ('vmunet_isic', 'msvmunet_synapse'):
        with pytest.raises(ValueError, match='decoder_depths'):
            timm.create_model(name, device='meta', decoder_depths=(1, 1))
