"""Checkpoints in every published wrapping load strictly; what does not fit is listed."""

import logging

import pytest
import timm
import torch

import vmzoo
from vmzoo.weights import CheckpointMismatch, convert, convert_state_dict, load_checkpoint


@pytest.fixture(scope='module')
def model():
    return timm.create_model('vmamba_nano')


def random_state(model):
    return {key: torch.randn_like(value) for key, value in model.state_dict().items()}


def with_prefix(state, prefix):
    return {prefix + key: value for key, value in state.items()}


WRAPPINGS = {
    'bare': (lambda s: s, ''),
    'model': (lambda s: {'model': s, 'epoch': 3}, 'model'),
    'state_dict': (lambda s: {'state_dict': s, 'meta': {'epoch': 1}}, 'state_dict'),
    'model_ema alone': (lambda s: {'model': {}, 'model_ema': s}, 'model_ema'),
    'net': (lambda s: {'net': s, 'optimizer': {}}, 'net'),
    'ddp': (lambda s: {'model': with_prefix(s, 'module.')}, 'model.module'),
    'compiled ddp': (lambda s: with_prefix(s, 'module._orig_mod.'), 'module._orig_mod'),
    'mm': (
        lambda s: {'state_dict': {'decode_head.conv.weight': torch.ones(1), **with_prefix(s, 'backbone.')}},
        'state_dict.backbone',
    ),
    'trainer': (
        lambda s: {'state_dict': {'data_preprocessor.mean': torch.ones(3), **with_prefix(s, 'model.')}},
        'state_dict.model',
    ),
    'nested': (
        lambda s: {'state_dict': {'model': with_prefix(s, 'module.backbone.')}},
        'state_dict.model.module.backbone',
    ),
}


@pytest.mark.parametrize(('wrap', 'source'), WRAPPINGS.values(), ids=WRAPPINGS)
def test_wrappings(model, wrap, source):
    state = random_state(model)
    converted, report = convert(wrap(state), model)
    assert report.source == source
    assert not report.head and not report.stem
    assert all(torch.equal(converted[key], value) for key, value in state.items())
    model.load_state_dict(converted)


def test_model_is_preferred_to_its_average(model):
    state, average = random_state(model), random_state(model)
    converted = vmzoo.convert_state_dict({'model_ema': average, 'model': state}, model)
    assert torch.equal(converted['classifier.norm.weight'], state['classifier.norm.weight'])


def test_ignored_keys_are_reported(model):
    state = {'decode_head.conv.weight': torch.ones(1), **with_prefix(random_state(model), 'backbone.')}
    _, report = convert(state, model)
    assert report.ignored == ('decode_head.conv.weight',)
    assert str(report) == '1 keys not used (decode_head.conv.weight)'


def test_a_head_beside_the_backbone_is_kept_if_the_model_has_it(model):
    state = random_state(model)
    head = {key: value for key, value in state.items() if key.startswith('classifier.head.')}
    backbone = {key: value for key, value in state.items() if key not in head}
    loss = {'loss.weight': torch.ones(1)}
    converted, report = convert({'state_dict': {**with_prefix(backbone, 'backbone.'), **head, **loss}}, model)
    assert report.ignored == ('loss.weight',)
    assert all(torch.equal(converted[key], value) for key, value in state.items())


def test_other_class_count_keeps_the_models_head(model, caplog):
    state = random_state(model)
    small = timm.create_model('vmamba_nano', num_classes=5)
    converted, report = convert(state, small)
    assert report.head == 'classifier.head: 1000 → 5 classes, kept as initialised in the model'
    assert report.head in caplog.text
    assert torch.equal(converted['classifier.head.weight'], small.classifier.head.weight)
    assert torch.equal(converted['classifier.norm.weight'], state['classifier.norm.weight'])
    small.load_state_dict(converted)


def test_no_classifier(model):
    features = timm.create_model('vmamba_nano', num_classes=0)
    converted, report = convert(random_state(model), features)
    assert report.ignored == ('classifier.head.weight', 'classifier.head.bias')
    features.load_state_dict(converted)


@pytest.mark.parametrize('in_chans', [1, 4, 12])
def test_other_input_channels_adapt_the_stem(model, in_chans):
    state = random_state(model)
    other = timm.create_model('vmamba_nano', in_chans=in_chans)
    converted, report = convert(state, other)
    assert report.stem == f'patch_embed.0: 3 → {in_chans} input channels, adapted'
    other.load_state_dict(converted)
    if in_chans == 1:
        torch.testing.assert_close(other.patch_embed[0].weight, state['patch_embed.0.weight'].sum(1, keepdim=True))


def test_misfit_lists_missing_unexpected_and_differing_keys(model):
    state = random_state(model)
    state['surplus.weight'] = torch.ones(2)
    del state['layers.0.blocks.0.norm.weight'], state['layers.0.blocks.0.norm.bias']
    state['classifier.norm.bias'] = torch.ones(7)
    with pytest.raises(CheckpointMismatch) as error:
        convert_state_dict(state, model)
    message = str(error.value)
    assert 'does not fit vmamba_nano (VMamba)' in message
    assert 'missing keys (2): layers.0.blocks.0.norm.weight, layers.0.blocks.0.norm.bias' in message
    assert 'unexpected keys (1): surplus.weight' in message
    width = model.classifier.norm.weight.numel()
    assert f'shapes differ (1): classifier.norm.bias: (7,) in the checkpoint, ({width},) in the model' in message
    assert 'create that model' not in message


def test_misfit_names_the_architecture_that_fits(model):
    state = timm.create_model('vmamba_tiny_s1l8', num_classes=3).state_dict()
    with pytest.raises(CheckpointMismatch, match='It fits vmamba_tiny_s1l8: create that model instead'):
        convert_state_dict(state, model)


@pytest.mark.parametrize('foreign', ['resnet18', 'vim_tiny_patch16_224', 'vmamba_v0_tiny'])
def test_checkpoint_of_another_family(model, foreign):
    with torch.device('meta'):
        state = timm.create_model(foreign).state_dict()
    with pytest.raises(CheckpointMismatch, match=r'vmamba_nano[\s\S]*(missing|unexpected) keys \(\d+\)'):
        convert_state_dict(state, model)


@pytest.mark.parametrize('state', [{}, {'epoch': 3}, {'model': {'config': {}}}], ids=str)
def test_no_weights(model, state):
    with pytest.raises(CheckpointMismatch, match='no weights in it'):
        convert_state_dict(state, model)


def test_load_checkpoint_names_the_file(model, tmp_path):
    torch.save({'model': {'a': torch.ones(1)}}, tmp_path / 'other.pth')
    with pytest.raises(CheckpointMismatch, match=r'other\.pth: the checkpoint does not fit'):
        load_checkpoint(model, tmp_path / 'other.pth')


def test_models_without_a_filter_or_cfg(caplog):
    linear = torch.nn.Linear(2, 2)
    with caplog.at_level(logging.WARNING):
        converted = convert_state_dict({'model': with_prefix(linear.state_dict(), 'module.')}, linear)
    assert converted.keys() == {'weight', 'bias'}
    assert not caplog.text


def test_a_classifier_beside_the_backbone_is_kept():
    """mmpretrain's files: `backbone.*` and `head.fc.*`."""
    source = timm.create_model('rsmamba_base', img_size=32, depth=1, embed_dim=32)
    state = {f'backbone.{key}': value for key, value in source.state_dict().items() if not key.startswith('head.')}
    state |= {f'head.fc.{kind}': getattr(source.head, kind) for kind in ('weight', 'bias')}
    model = timm.create_model('rsmamba_base', img_size=32, depth=1, embed_dim=32)
    model.load_state_dict(vmzoo.convert_state_dict({'state_dict': state}, model))
    assert torch.equal(model.head.weight, source.head.weight)
    without = timm.create_model('rsmamba_base', img_size=32, depth=1, embed_dim=32, num_classes=0)
    without.load_state_dict(vmzoo.convert_state_dict({'state_dict': state}, without))
