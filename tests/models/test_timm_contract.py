"""What timm asks of every model, asked of every model that vmzoo registers."""

import copy
import itertools
import math
import pickle
import re
from collections.abc import Callable

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

import vmzoo  # noqa: F401 (registers the models)
from vmzoo.models._registry import summary_of

from .exemptions import EXEMPT, SMALL

SIZE = 64


def family(name: str) -> str:
    return timm.models.model_entrypoint(name).__module__.rpartition('.')[2]


NAMES = [name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith('vmzoo.')]
CLASSIFIERS = [name for name in NAMES if summary_of(name).task == 'classification']
SEGMENTERS = [name for name in NAMES if summary_of(name).task == 'segmentation']  # classes of every pixel
# where the size makes no difference: the smallest of every kind
TINY = [name for name in NAMES if 'nano' in name or ('tiny' in name and name.replace('tiny', 'nano') not in NAMES)]
# where a test is slow: one of each family, its nano model if there is one
SIMPLE_LAST = sorted(NAMES, key=lambda name: ('nano' in name, name in CLASSIFIERS))
ONE_EACH = list({family(name): name for name in SIMPLE_LAST}.values())
TINY += [name for name in ONE_EACH if family(name) not in map(family, TINY)]

every_model = pytest.mark.parametrize('name', NAMES)
every_classifier = pytest.mark.parametrize('name', CLASSIFIERS)
every_segmenter = pytest.mark.parametrize('name', SEGMENTERS)
every_model_with_classes = pytest.mark.parametrize('name', CLASSIFIERS + SEGMENTERS)
every_tiny_model = pytest.mark.parametrize('name', TINY)
one_of_each_family = pytest.mark.parametrize('name', ONE_EACH)


@pytest.fixture(autouse=True)
def exemption(request):
    name = request.node.callspec.params.get('name') if hasattr(request.node, 'callspec') else None
    reasons = EXEMPT.get(request.node.originalname, {})
    for key in (name, name and family(name)):
        if key in reasons:
            pytest.skip(reasons[key])


@pytest.fixture
def image(request) -> Callable[..., Tensor]:
    """Makes random pictures for the model under test, or volumes, of 16 slices."""
    in_chans, *axes = timm.get_pretrained_cfg(request.node.callspec.params['name']).input_size
    depth, side = ([16], SIZE // 2) if len(axes) == 3 else ([], SIZE)

    def make(
        batch: int = 2, channels: int = in_chans, height: int = side, width: int | None = None, **kwargs
    ) -> Tensor:
        return torch.randn(batch, channels, *depth, height, width or height, **kwargs)

    return make


def small(name: str, **kwargs) -> nn.Module:
    return timm.create_model(name, **{**SMALL.get(family(name), {}), **SMALL.get(name, {}), **kwargs})


def as_tuple(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def classifiers(model: nn.Module) -> tuple[nn.Module, ...]:
    """The model's classifiers: two, if one of them learned from a teacher."""
    classifier = model.get_classifier()
    return classifier if isinstance(classifier, tuple) else (classifier,)


def tensors(out) -> list[Tensor]:
    """The outputs of a classifier (a tensor) or of a dense model (one or several maps)."""
    return [out] if isinstance(out, Tensor) else [t for part in out for t in tensors(part)]


def assert_finite(out) -> None:
    assert all(torch.isfinite(t).all() for t in tensors(out))


def assert_equal(got, want, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    for a, b in zip(tensors(got), tensors(want), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def without_gradient(model: nn.Module) -> list[str]:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [name for name, p in trained if p.grad is None or not torch.isfinite(p.grad).all()]


def test_exemptions_are_of_models_and_tests_that_exist():
    known = {*NAMES, *map(family, NAMES)}
    assert NAMES
    assert {key for reasons in EXEMPT.values() for key in reasons} <= known
    assert SMALL.keys() <= known
    assert EXEMPT.keys() <= globals().keys()


@every_model
def test_forward(name, image):
    model = small(name).eval()
    x = image()
    with torch.no_grad():
        out = model(x)
        assert_finite(out)
        assert all(len(t) == len(x) for t in tensors(out))
        model.set_grad_checkpointing()
        assert_equal(model(x), out)


@every_model
def test_samples_of_a_batch_are_independent(name, image):
    model = small(name).double().eval()
    x = image(3, dtype=torch.float64)
    with torch.no_grad():
        whole = model(x)
        single = model(x[1:2])
    assert_equal([t[1:2] for t in tensors(whole)], single, rtol=1e-9, atol=1e-9)


@every_model
def test_empty_batch(name, image):
    model = small(name).eval()
    with torch.no_grad():
        assert [len(t) for t in tensors(model(image(0)))] == [0] * len(tensors(model(image(1))))


@every_model
def test_every_parameter_has_a_gradient(name, image):
    model = small(name, **({'num_classes': 42} if name in CLASSIFIERS + SEGMENTERS else {})).train()
    out = model(image())
    if name in CLASSIFIERS + SEGMENTERS:
        assert out.shape[:2] == (2, 42)
    sum(t.mean() for t in tensors(out)).backward()
    assert_finite(out)
    assert without_gradient(model) == []


@every_model
def test_stochastic_depth_and_dropout(name, image):
    model = small(name, drop_path_rate=0.5, drop_rate=0.5).train()
    x = image()
    assert not torch.equal(tensors(model(x))[-1], tensors(model(x))[-1])
    model.eval()
    assert_equal(model(x), model(x), rtol=0, atol=0)


@every_model
def test_unknown_argument_is_a_type_error(name):
    with pytest.raises(TypeError, match='not_an_argument'):
        small(name, not_an_argument=1)


@every_model
def test_dilation_is_refused(name):
    with pytest.raises((TypeError, ValueError), match='output_stride'):
        small(name, features_only=True, output_stride=8)


@every_model
def test_parameter_groups(name):
    model = small(name)
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert len(groups) > 1
        assert sum(len(names) for names in groups.values()) == len(list(model.parameters()))
    params = dict(model.named_parameters())
    no_decay = model.no_weight_decay()
    assert no_decay <= params.keys()
    sensitive = re.compile(r'(^|[._])(A|A_b)_logs?$|\.Ds?(_b)?$|dt_proj\w*\bias$|dt_projs_bias$')
    assert {key for key in params if sensitive.search(key)} <= no_decay
    scaled = param_groups_layer_decay(model, weight_decay=0.05, no_weight_decay_list=no_decay, layer_decay=0.5)
    assert len({group['lr_scale'] for group in scaled}) > 1


@every_model
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['float32', 'bfloat16'])
def test_builds_on_a_device_in_a_dtype(name, dtype):
    model = timm.create_model(name, device='meta', dtype=dtype)
    assert {t.device.type for t in itertools.chain(model.parameters(), model.buffers())} == {'meta'}
    assert {p.dtype for p in model.parameters()} == {dtype}


@every_model
def test_attributes(name):
    model = timm.create_model(name, device='meta')
    cfg = model.default_cfg
    assert model.num_classes == cfg['num_classes']
    assert model.num_features > 0
    assert model.head_hidden_size > 0
    assert model.in_chans == cfg['input_size'][0]
    keys = model.state_dict().keys()
    for part in ('first_conv', 'classifier') if name in CLASSIFIERS + SEGMENTERS else ('first_conv',):
        assert all(f'{key}.weight' in keys for key in as_tuple(cfg[part]))


@every_model
def test_published_weights_are_described(name):
    for tag in timm.list_pretrained(f'{name}.*') or [name]:
        cfg = timm.get_pretrained_cfg(tag)
        assert cfg.license
        assert cfg.origin_url.startswith('https://')
        assert cfg.paper_ids
        assert not cfg.has_weights or cfg.hf_hub_id or cfg.url.startswith('https://')


@every_classifier
def test_forward_features_is_a_map(name):
    model = timm.create_model(name, device='meta').eval()
    cfg = model.default_cfg
    features = model.forward_features(torch.empty(1, *cfg['input_size'], device='meta'))
    assert features.shape == (1, model.num_features, *cfg['pool_size'])


@every_classifier
def test_head(name, image):
    model = small(name).eval()
    x = image()
    with torch.no_grad():
        features = model.forward_features(x)
        logits = model.forward_head(features)
        pooled = model.forward_head(features, pre_logits=True)
        assert_equal(logits, model(x))
        assert pooled.shape == (2, model.head_hidden_size)

        model.reset_classifier(0)
        assert model.num_classes == 0
        assert_equal(model(x), pooled)
        model.reset_classifier(0, '')
        assert model(x).shape == features.shape

        assert small(name, num_classes=0).eval()(x).shape == pooled.shape
        assert small(name, num_classes=0, global_pool='').eval()(x).shape == features.shape


@every_segmenter
def test_head_of_every_pixel(name, image):
    model = small(name, num_classes=3).eval()
    x = image()
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (2, model.num_features, *x.shape[2:])
        assert_equal(model.forward_head(features, pre_logits=True), features)
        assert_equal(model.forward_head(features), model(x))
        assert model(x).shape == (2, 3, *x.shape[2:])

        model.reset_classifier(0)
        assert model.num_classes == 0
        assert_equal(model(x), features)
        assert small(name, num_classes=0).eval()(x).shape == features.shape


@every_model_with_classes
def test_reset_classifier(name, image):
    model = small(name)
    model.reset_classifier(7)
    assert model(image()).shape[:2] == (2, 7)
    assert {classifier.weight.shape[0] for classifier in classifiers(model)} == {7}

    for training in (False, True):
        model.train(training).to('meta', torch.float64).reset_classifier(5)
        weights = [classifier.weight for classifier in classifiers(model)]
        assert {(weight.device.type, weight.dtype) for weight in weights} == {('meta', torch.float64)}
        assert {module.training for module in model.modules()} == {training}

    for pool in ((), ('',)):
        frozen = small(name).requires_grad_(False)
        frozen.reset_classifier(0, *pool)
        assert not any(p.requires_grad for p in frozen.parameters())


@every_classifier
def test_a_new_classifier_keeps_the_pooling(name, image):
    pool = 'max' if family(name) == 'vmamba' else 'avg'  # not the default
    model = small(name, global_pool=pool).eval()
    x = image()
    with torch.no_grad():
        want = model.forward_head(model.forward_features(x), pre_logits=True)
        model.reset_classifier(3)
        model.reset_classifier(0)
        assert_equal(model(x), want)


@every_classifier
def test_a_refused_classifier_changes_nothing(name, image):
    model = small(name).eval()
    x = image()
    with torch.no_grad():
        want = model(x)
        with pytest.raises(ValueError, match='pooled features'):
            model.reset_classifier(5, '')
        assert model.num_classes == model.default_cfg['num_classes']
        assert_equal(model(x), want)


@one_of_each_family
@pytest.mark.parametrize('options', [{'in_chans': 1, 'num_classes': 5}, {'num_classes': 0}, {'features_only': True}])
def test_pretrained_with_other_ends(name, options, tmp_path):
    """Every weight but the stem's and the classifier's is the file's."""
    source = small(name)
    torch.save({'model': source.state_dict()}, tmp_path / 'weights.pth')
    overlay = {'file': str(tmp_path / 'weights.pth')}
    model = small(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    model = model.model if 'features_only' in options else model
    state = source.state_dict()
    cfg = timm.get_pretrained_cfg(name)
    parts = [part for part, option in (('first_conv', 'in_chans'), ('classifier', 'num_classes')) if option in options]
    ends = [end for part in parts for end in as_tuple(getattr(cfg, part))]
    same = {key: value for key, value in model.state_dict().items() if key.rpartition('.')[0] not in ends}
    assert len(same) > len(state) // 3
    assert all(torch.equal(value, state[key]) for key, value in same.items())


@every_model
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bfloat16', 'float16'])
def test_half_precision_after_a_forward(name, dtype, image):
    model = small(name).eval()
    x = image()
    with torch.no_grad():
        want = model(x)
        got = model.to(dtype)(x.to(dtype))
    assert {t.dtype for t in tensors(got)} == {dtype}
    for a, b in zip(tensors(got), tensors(want)):
        assert (a.float() - b).norm() < 0.1 * b.norm()


@every_model
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bfloat16', 'float16'])
def test_autocast(name, dtype, image):
    model = small(name).train()
    with torch.autocast('cpu', dtype):
        out = model(image())
    sum(t.float().mean() for t in tensors(out)).backward()
    assert_finite(out)
    assert without_gradient(model) == []


@every_model
def test_initialises_after_to_empty(name, image):
    model = small(name, device='meta').to_empty(device='cpu')
    with torch.no_grad():
        for t in itertools.chain(model.parameters(), model.buffers()):
            t.copy_(torch.full_like(t, torch.nan if t.is_floating_point() else 0))
    model.init_weights()
    assert [key for key, t in model.state_dict().items() if not torch.isfinite(t).all()] == []
    assert_finite(model.eval()(image()))


@every_model
def test_images_of_the_wrong_kind_are_named(name, image):
    model = small(name).eval()
    with pytest.raises(ValueError, match=r'unsqueeze\(0\)'):
        model(image(1)[0])
    with pytest.raises(ValueError, match='in_chans=5'):
        model(image(1, 5))


@every_model
@pytest.mark.parametrize('in_chans', [1, 4, 12])
def test_input_channels(name, in_chans, image):
    model = small(name, in_chans=in_chans).eval()
    with torch.no_grad():
        assert_finite(model(image(1, in_chans)))
    assert model.in_chans == in_chans


@every_model
@pytest.mark.parametrize('height, width', [(64, 96), (53, 38), (33, 65)])
def test_any_image_size(name, height, width, image):
    model = small(name).eval()
    divisor = getattr(model, 'size_divisor', 1)
    if height % divisor or width % divisor:
        with pytest.raises(ValueError, match=f'{height}x{width}.* multiples of {divisor}.*: pad or resize'):
            model(image(1, height=height, width=width))
        return
    with torch.no_grad():
        x = image(1, height=height, width=width)
        out = model(x)
    assert_finite(out)
    if name in SEGMENTERS:
        assert out.shape[2:] == x.shape[2:]


@every_model
def test_a_tiny_image_works_or_is_refused_clearly(name, image):
    model = small(name).eval()
    try:
        with torch.no_grad():
            assert_finite(model(image(1, height=1)))
    except ValueError as error:
        assert '1x1' in str(error)


@every_model
def test_a_copy_is_equal_and_separate(name, image):
    model = small(name).eval()
    x = image()
    with torch.no_grad():
        want = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_equal(other(x), want, rtol=0, atol=0)
            next(other.parameters()).add_(1)
            assert_equal(model(x), want, rtol=0, atol=0)


@every_model
def test_features_only(name, image):
    model = small(name, features_only=True).eval()
    x = image()
    with torch.no_grad():
        maps = model(x)
    info = model.feature_info
    assert len(maps) >= 3
    assert [y.shape[1] for y in maps] == info.channels()
    for y, reduction in zip(maps, info.reduction()):
        assert y.ndim == x.ndim
        assert x.shape[-1] // (2 * reduction) < y.shape[-1] <= math.ceil(x.shape[-1] / reduction) + 1
        assert_finite(y)


@every_model
@pytest.mark.parametrize('out_indices', [(0,), (1,), (0, 2), (-1,), (0, 1, 2, 3)])
def test_features_leave_no_parameter_without_gradient(name, out_indices, image):
    whole = small(name).eval()
    model = small(name, features_only=True, out_indices=out_indices)
    kept = model.model.state_dict().keys()
    assert kept <= whole.state_dict().keys()
    model.model.load_state_dict({key: value for key, value in whole.state_dict().items() if key in kept})

    x = image()
    with torch.no_grad():
        want = whole.forward_intermediates(x, indices=list(out_indices), intermediates_only=True)
        assert_equal(model.eval()(x), want)
    maps = model.train()(x)
    sum(y.mean() for y in maps).backward()
    assert without_gradient(model) == []


@every_model
def test_checkpointed_features_have_equal_gradients(name, image):
    model = small(name, features_only=True).eval()
    x = image()
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.model.set_grad_checkpointing(enable)
        sum(y.square().mean() for y in model(x)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert_equal(gradients[1], gradients[0])


@every_model
def test_forward_intermediates(name, image):
    model = small(name).eval()
    x = image()
    with torch.no_grad():
        final, maps = model.forward_intermediates(x, output_fmt='NCHW')
        assert_equal(final, model.forward_features(x), rtol=1e-5, atol=1e-8)
        assert len(maps) == len(model.feature_info)
        assert all(y.ndim == x.ndim and y.shape[1] == info['num_chs'] for y, info in zip(maps, model.feature_info))

        assert_equal(model.forward_intermediates(x, intermediates_only=True), maps)
        assert_equal(model.forward_intermediates(x, indices=2, intermediates_only=True), maps[-2:])
        _, early = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
        assert_equal(early, maps[:2])
        assert_finite(model.forward_intermediates(x, norm=True))
        with pytest.raises((ValueError, AssertionError), match='NCHW'):
            model.forward_intermediates(x, output_fmt='CHWN')


@every_model
def test_pruning_keeps_the_features(name, image):
    model = small(name).eval()
    x = image()
    with torch.no_grad():
        want = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
        before = sum(p.numel() for p in model.parameters())
        assert model.prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1]
        assert sum(p.numel() for p in model.parameters()) < before
        assert_equal(model.forward_intermediates(x, indices=[0, 1], intermediates_only=True), want)


@every_tiny_model
def test_compiles_without_graph_breaks(name, image):
    model = small(name)
    x = image()
    torch.manual_seed(1)  # training may draw an order of the tokens
    want = model(x)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    torch.manual_seed(1)
    got = compiled(x)
    assert_equal(got, want)
    sum(t.mean() for t in tensors(got)).backward()
    assert without_gradient(model) == []


@pytest.mark.parametrize('name, strict', [(name, False) for name in TINY] + [(name, True) for name in ONE_EACH])
def test_exports(name, strict, image):
    model = small(name).eval()
    x = image()
    program = torch.export.export(model, (x,), strict=strict)
    with torch.no_grad():
        assert_equal(program.module()(x), model(x))
