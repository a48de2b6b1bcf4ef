"""The families that timm itself has: listed and converted here, registered by timm alone."""

import subprocess
import sys

import pytest
import timm
import torch
from timm.models import list_models, model_entrypoint
from torch import nn

import vmzoo
from vmzoo.models import efficientvim, mambaout
from vmzoo.models._registry import default_cfgs_of, family_of, list_architectures
from vmzoo.weights import CheckpointMismatch, convert, load_checkpoint, published_weights

FAMILIES = {'mambaout': mambaout, 'efficientvim': efficientvim}
SMALL = {'depths': (1, 1, 1), 'embed_dim': (16, 24, 32), 'num_classes': 7}
families = pytest.mark.parametrize('family', FAMILIES)


def names_of(family):
    return list(dict.fromkeys(tagged.partition('.')[0] for tagged in FAMILIES[family].timm_cfgs))


def vim(name='efficientvim_m1', **kwargs):
    return timm.create_model(name, **{**SMALL, **kwargs})


def published(model):
    """Random weights in the authors' shapes: norms of [1, C, 1], the last of [1, C, 1, 1]."""
    state = {key: torch.randn_like(value.float()).to(value.dtype) for key, value in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            for key in (f'{name}.weight', f'{name}.bias'):
                state[key] = state[key].view(1, -1, *[1] * (2 if name == 'norm.3' else 1))
    return state


@families
def test_models_are_listed_and_are_timms(family):
    assert list_architectures(family) == sorted(names_of(family))
    for name in names_of(family):
        assert family_of(name) == family
        assert model_entrypoint(name).__module__ == f'timm.models.{family}'


def test_timms_other_models_are_not_ours():
    assert family_of('resnet18') is None
    assert family_of('test_mambaout') is None


def test_registering_replaces_nothing_and_says_nothing():
    code = 'import warnings; warnings.simplefilter("error"); import vmzoo'
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, '')


@families
def test_every_tag_of_timms_is_described(family):
    tagged = {tag for name in names_of(family) for tag in list_models(f'{name}.*', include_tags=True)}
    assert tagged == set(FAMILIES[family].timm_cfgs)
    for name in names_of(family):
        for cfg in default_cfgs_of(name).values():
            assert cfg.paper_name and cfg.paper_ids and cfg.license and cfg.origin_url.startswith('https://')
            assert cfg.hf_hub_id.startswith('timm/')  # timm's copy, from which pretrained=True loads


def test_the_authors_files_are_known_beside_timms_copies():
    weights = {weight.name: weight for weight in published_weights()}
    femto = weights['mambaout_femto.in1k']
    assert femto.url.endswith('/releases/download/model/mambaout_femto.pth')
    assert (femto.hub_id, femto.metrics) == ('timm/mambaout_femto.in1k', {'imagenet1k_top1': 78.9})
    assert weights['efficientvim_m4_dist.in1k'].metrics == {'imagenet1k_top1': 80.7}
    own = weights['mambaout_small_rw.sw_e450_in1k']  # timm's own training: there is no other file
    assert (own.url, own.hub_id) == ('https://huggingface.co/timm/mambaout_small_rw.sw_e450_in1k', None)


def test_a_file_with_averaged_weights(tmp_path):
    model = vim().eval()
    averaged = published(model)
    state = {key: torch.zeros_like(value) for key, value in averaged.items()}
    torch.save({'model': state, 'model_ema': averaged, 'optimizer': {}, 'epoch': 3}, tmp_path / 'm1.pth')
    report = load_checkpoint(model, tmp_path / 'm1.pth')
    assert (report.source, str(report)) == ('model_ema', 'every key loaded')
    for key, value in model.state_dict().items():
        assert torch.equal(value, averaged[key].flatten() if 'norm' in key and value.ndim else averaged[key])
    torch.save({'model': state, 'model_ema': {}}, tmp_path / 'm1.pth')
    assert load_checkpoint(model, tmp_path / 'm1.pth').source == 'model'


def test_other_class_count_keeps_all_heads():
    state = published(vim('efficientvim_m1_dist'))
    model = vim('efficientvim_m1_dist', num_classes=3)
    converted, report = convert(state, model)
    assert report.head.count('7 → 3 classes') == 8
    assert torch.equal(converted['heads_dist.2.weight'], model.heads_dist[2].weight)
    assert torch.equal(converted['weights_dist'], state['weights_dist'])
    model.load_state_dict(converted)


@pytest.mark.parametrize('source', ['efficientvim_m1', 'efficientvim_m1_dist'])
def test_without_classifier(source):
    state = published(vim(source))
    for model in (vim(num_classes=0), vim(features_only=True).model):
        model.load_state_dict(vmzoo.convert_state_dict(state, model))
        key = 'stages.2.blocks.0.mixer.out_proj.conv.weight'
        assert torch.equal(model.state_dict()[key], state[key])


def test_a_distilled_checkpoint_names_its_model():
    state = timm.create_model('efficientvim_m1_dist').state_dict()
    with pytest.raises(CheckpointMismatch, match='It fits efficientvim_m1_dist: create that model instead'):
        vmzoo.convert_state_dict(state, timm.create_model('efficientvim_m1'))


def test_a_backbone_is_no_classifier():
    state = {k: v for k, v in published(vim()).items() if not k.startswith(('norm.', 'heads.', 'weights'))}
    with pytest.raises(CheckpointMismatch, match=r'missing keys \(17\): weights, norm.0.weight'):
        vmzoo.convert_state_dict(state, vim())


def test_mambaout_in_every_wrapping():
    model = timm.create_model('test_mambaout', num_classes=5)
    state = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    wrapped = {'model': {f'module.{key}': value for key, value in state.items()}}
    converted = vmzoo.convert_state_dict(wrapped, model)
    assert all(torch.equal(converted[key], value) for key, value in state.items())
