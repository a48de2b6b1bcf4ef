"""VMZooBackbone over the registry: maps, weights, freezing, and what it says when something is wrong."""

import copy

import pytest
import timm
import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from models.exemptions import SMALL
from models.test_timm_contract import NAMES, TINY, assert_equal, family, small, without_gradient
from torch import nn

import vmzoo.mm  # noqa: F401 (registers the backbone)
from vmzoo.mm import VMZooBackbone
from vmzoo.weights import CheckpointError, CheckpointMismatch, published_weights

TIMM_OWN = ['mambaout_femto', 'efficientvim_m1_dist']
U_NETS = ('hymamba', 'lightmunet', 'mhsvm', 'msvmunet', 'vmunet', 'xlstmunet')  # segment by themselves
BACKBONES, TINY = ([name for name in names if family(name) not in U_NETS] for names in (NAMES, TINY))
every_model = pytest.mark.parametrize('name', [*BACKBONES, *TIMM_OWN])
every_kind = pytest.mark.parametrize(
    'name', [*TINY, 'lbvim_300_backbone', 'vim_small_seg', 'roma_base_dense', *TIMM_OWN]
)


def build(name: str = 'vmamba_nano', **kwargs) -> VMZooBackbone:
    return MODELS.build(dict(type='VMZooBackbone', model_name=name, **kwargs))


def build_small(name: str, **kwargs) -> VMZooBackbone:
    return build(name, **{**SMALL.get(family(name), {}), **SMALL.get(name, {}), **kwargs})


def image(height: int = 64, width: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, height, width)


def saved(path, state_dict, **beside) -> str:
    torch.save({'state_dict': state_dict, **beside}, path)
    return str(path)


@every_model
def test_maps_of_any_size_and_no_parameter_without_gradient(name):
    backbone = build_small(name).train()
    maps = backbone(image(77, 64))
    assert isinstance(maps, tuple)
    assert tuple(y.shape[1] for y in maps) == backbone.out_channels
    for y, reduction in zip(maps, backbone.reductions, strict=True):
        assert 77 / (2 * reduction) < y.shape[2] <= 77 // reduction + 2
    sum(y.mean() for y in maps).backward()
    assert without_gradient(backbone) == []


@every_kind
@pytest.mark.parametrize('out_indices', [(0,), (-1,)])
def test_chosen_maps_leave_no_parameter_without_gradient(name, out_indices):
    backbone = build_small(name, out_indices=out_indices).train()
    maps = backbone(image())
    sum(y.mean() for y in maps).backward()
    assert len(maps) == 1
    assert without_gradient(backbone) == []


@every_kind
def test_a_classifier_s_weights_fill_every_stage(name, tmp_path):
    torch.manual_seed(0)
    source = build_small(name)
    if name in NAMES and timm.get_pretrained_cfg(name).classifier:
        whole = small(name, num_classes=5)
    else:
        whole = source.model
    file = saved(tmp_path / 'weights.pth', whole.state_dict())
    backbone = build_small(name, pretrained=file, out_norms=False)
    state = whole.state_dict()
    loaded = backbone.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())


class Segmentor(BaseModule):
    def __init__(self, **kwargs):
        super().__init__()
        self.backbone = build(out_indices=(1, 2), **kwargs)
        self.decode_head = nn.Conv2d(96, 2, 1)


@pytest.mark.parametrize('name', ['test_convnext', 'test_resnet'])
def test_timm_s_other_models(name):
    backbone = build(name, out_indices=(1, 2)).train()
    maps = backbone(image())
    assert tuple(y.shape[1] for y in maps) == backbone.out_channels
    sum(y.mean() for y in maps).backward()
    assert without_gradient(backbone) == []


def test_published_names_load_where_the_rest_of_an_mm_model_loads():
    source = timm.create_model('vmamba_nano')
    norms = {f'outnorm{i}.{kind}': torch.randn(dim) for i, dim in ((1, 48), (2, 96)) for kind in ('weight', 'bias')}
    published = {**source.state_dict(), **norms}
    segmentor = copy.deepcopy(Segmentor())  # as averaging weights does
    head = {f'decode_head.{key}': value for key, value in segmentor.decode_head.state_dict().items()}
    segmentor.load_state_dict({**{f'backbone.{key}': value for key, value in published.items()}, **head})
    loaded = segmentor.backbone.model.state_dict()
    assert loaded.keys() >= norms.keys()
    assert all(torch.equal(value, published[key]) for key, value in loaded.items())

    again = Segmentor()
    again.load_state_dict(segmentor.state_dict())
    assert_equal(again.state_dict().values(), segmentor.state_dict().values(), rtol=0, atol=0)


def test_weights_survive_the_initialisation_of_the_whole_model(tmp_path):
    source = timm.create_model('vmamba_nano').state_dict()
    file = saved(tmp_path / 'weights.pth', source)
    at_once = Segmentor(pretrained=file)
    later = Segmentor(init_cfg=dict(type='Pretrained', checkpoint=file, prefix='backbone.'))
    weight = 'patch_embed.0.weight'
    assert torch.equal(at_once.backbone.model.get_parameter(weight), source[weight])
    assert not torch.equal(later.backbone.model.get_parameter(weight), source[weight])
    for segmentor in (at_once, later):
        segmentor.init_weights()
        loaded = segmentor.backbone.model.state_dict()
        assert all(torch.equal(value, source[key]) for key, value in loaded.items() if not key.startswith('outnorm'))


def test_a_published_name_stands_for_its_address(monkeypatch):
    asked = []
    monkeypatch.setattr('vmzoo.mm.backbone.load_published', lambda model, where, **_: asked.append(where))
    name = 'vmamba_tiny_s1l8.in1k'
    small = build('vmamba_nano', init_cfg=dict(type='Pretrained', checkpoint=name))
    assert asked == []
    small.init_weights()
    assert asked == [dict(url=next(weight.url for weight in published_weights() if weight.name == name))]


def test_what_a_checkpoint_lacks_is_logged(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr('vmzoo.mm.backbone.print_log', lambda text, logger: lines.append(text))
    source = timm.create_model('vmamba_nano').state_dict()
    file = saved(tmp_path / 'weights.pth', source)
    build(pretrained=file, out_indices=(0, 3))
    assert lines == [
        f'vmamba_nano: {file}: 2 keys not used (classifier.head.weight, classifier.head.bias); '
        'not among them and kept as initialised: outnorm0.weight, outnorm0.bias, outnorm3.weight, outnorm3.bias'
    ]

    lines.clear()
    backbone = build(pretrained=True, pretrained_cfg_overlay=dict(file=file), out_indices=(2,))
    assert lines == [
        'vmamba_nano: published weights: loaded; not among them and kept as initialised: outnorm2.weight, outnorm2.bias'
    ]
    weight = 'patch_embed.0.weight'
    assert torch.equal(backbone.model.get_parameter(weight), source[weight])


def test_other_channels_adapt_the_stem(tmp_path):
    source = timm.create_model('vmamba_nano')
    backbone = build(pretrained=saved(tmp_path / 'weights.pth', source.state_dict()), in_channels=6)
    assert backbone(image(channels=6))[0].shape[1] == 24
    assert_equal(backbone.model.patch_embed[0].weight[:, :3], source.patch_embed[0].weight / 2)


@pytest.mark.parametrize('stages', [0, 1, 2, 4])
def test_frozen_stages(stages):
    backbone = build(drop_path_rate=0.5, frozen_stages=stages).train()
    trained = {key for key, parameter in backbone.model.named_parameters() if parameter.requires_grad}
    prefixes = ('patch_embed', *(f'layers.{i}' for i in range(stages)))
    assert trained == {key for key, _ in backbone.model.named_parameters() if not key.startswith(prefixes)}
    assert not any(module.training for i in range(stages) for module in backbone.model.layers[i].modules())
    assert all(module.training for i in range(stages, 4) for module in backbone.model.layers[i].modules())
    sum(y.mean() for y in backbone(image())).backward()
    assert without_gradient(backbone) == []
    assert not any(module.training for module in backbone.eval().modules())


def test_norms_stay_in_evaluation_mode():
    backbone = build('mobilemamba_t2', norm_eval=True).train()
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)
    assert backbone.model.training


def test_checkpointing_gives_equal_gradients():
    torch.manual_seed(0)
    backbone = build()
    other = build(with_cp=True)
    other.load_state_dict(backbone.state_dict())
    x = image()
    for each in (backbone, other):
        sum(y.square().mean() for y in each.train()(x)).backward()
    assert_equal([p.grad for p in other.parameters()], [p.grad for p in backbone.parameters()])


def test_depths_are_those_of_the_layers():
    backbone = build(out_indices=(0, 2))
    depths = {key: backbone.get_layer_depth(f'backbone.{key}', 'backbone.') for key, _ in backbone.named_parameters()}
    count = 1 + sum((1, 1, 2)) + 1  # stem, blocks, heads
    assert set(depths.values()) == {(depth, count) for depth in range(count)}
    assert depths['model.patch_embed.0.weight'][0] == 0
    assert depths['model.layers.2.blocks.1.op.in_proj.weight'][0] == count - 2
    assert depths['model.outnorm0.weight'][0] == count - 1
    assert backbone.get_layer_depth('decode_head.conv.weight', 'backbone.') == (count - 1, count)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(name='vmamba_tini_s1l8'), 'did you mean vmamba_tiny_s1l8'),
        (dict(out_indices=(0, 4)), r'They are 0 \(24 channels, stride 4\), 1 \(48 channels, stride 8\)'),
        (dict(out_indices=(2, 1)), 'increasing order'),
        (dict(out_indices=()), 'give some of its maps'),
        (dict(frozen_stages=5), 'from -1 .* to 4'),
        (dict(name='hrvmamba_base_seg', out_norms=True), 'has norms on its outputs already'),
        (dict(init_cfg=dict(type='TruncNormal', layer='Linear')), "can be dict(type='Pretrained'"),
        (dict(init_cfg=dict(type='Pretrained', checkpoint='x', prefix='neck')), 'leave out prefix'),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message.replace("dict(type='P", r"dict\(type='P")):
        build(**arguments)


def test_unknown_argument_is_a_type_error():
    with pytest.raises(TypeError, match='deths'):
        build(deths=(1, 1, 1, 1))


def test_weights_that_do_not_fit_are_named(tmp_path, monkeypatch):
    state = timm.create_model('vmamba_nano').state_dict()
    del state['layers.0.blocks.0.norm.weight']
    file = saved(tmp_path / 'weights.pth', state)
    with pytest.raises(CheckpointMismatch, match=r'missing keys \(1\): layers.0.blocks.0.norm.weight'):
        build(pretrained=file)
    other = {'conv.weight': torch.zeros(3)}
    file = saved(tmp_path / 'other.pth', other)
    with pytest.raises(CheckpointMismatch, match=r'other\.pth: .*\n.*missing keys'):
        build(init_cfg=dict(type='Pretrained', checkpoint=file)).init_weights()
    with pytest.raises(CheckpointMismatch, match=r'unexpected keys .*conv\.weight'):
        build().load_state_dict(other)
    with pytest.raises(FileNotFoundError, match=r'nowhere\.pth'):
        build(pretrained='nowhere.pth')
    with pytest.raises(CheckpointError, match='No weights are published for vmamba_nano'):
        build(pretrained=True)
    monkeypatch.setattr('vmzoo.weights.download.RETRIES', 0)
    with pytest.raises(CheckpointError, match='could not download'):
        build(pretrained='http://127.0.0.1:9/weights.pth')
