"""What is RSMamba's own: paths with shared parameters, their gate and random order, padded patches."""

import pytest
import timm
import torch

import vmzoo
from vmzoo.layers.mamba import MambaMixer, make_paths
from vmzoo.layers.shuffle import fixed_order
from vmzoo.models.rsmamba import MultiPathMixer, RSMamba

from .checks import assert_sizes_agree


def small(**kwargs) -> RSMamba:
    return timm.create_model('rsmamba_base', **{'img_size': 64, 'depth': 3, 'embed_dim': 32, **kwargs}).eval()


def images(height: int = 64, width: int = 64, **kwargs) -> torch.Tensor:
    return torch.randn(2, 3, height, width, **kwargs)


@pytest.mark.parametrize('gate', [True, False])
def test_paths_are_runs_of_one_mixer_over_reordered_tokens(gate):
    mixer = MultiPathMixer(16, 3, gate=gate).double()
    plain = MambaMixer(16, scan='forward').double()
    plain.load_state_dict({key: value for key, value in mixer.state_dict().items() if key != 'gate.weight'})
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    order = torch.randperm(11)
    outs = [plain(x), plain(x.flip(1)).flip(1), plain(x[:, order])[:, torch.argsort(order)]]
    weights = torch.full((2, 3), 1 / 3, dtype=torch.float64)
    if gate:
        weights = mixer.gate(torch.cat([out.mean(1) for out in outs], dim=1)).softmax(1)
    want = sum(weights[:, k, None, None] * out for k, out in enumerate(outs))
    paths = make_paths((None, order), (0, 0, 1), (False, True, False), 11, x.device)
    torch.testing.assert_close(mixer(x, paths), want)


def test_orders_are_fixed_in_evaluation_and_drawn_in_training():
    model, x = small(), images()
    assert torch.equal(model(x), model(x))
    model.train()
    torch.manual_seed(2)
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    torch.manual_seed(2)
    assert torch.equal(model(x), first)
    model.path_order.generator = torch.Generator().manual_seed(2)
    assert torch.equal(model(x), first)


def test_fixed_orders_are_permutations_that_differ_by_layer():
    orders = [fixed_order(784, layer, torch.device('cpu')) for layer in range(48)]
    assert all(torch.equal(order.sort().values, torch.arange(784)) for order in orders)
    assert len({tuple(order[:4].tolist()) for order in orders}) == 48
    # neighbours are torn apart: the mean distance of a random permutation is a third of its length
    distances = torch.stack([order.diff().abs().double().mean() for order in orders])
    assert (distances / 784 - 1 / 3).abs().max() < 0.05


def test_checkpointing_repeats_the_orders_in_the_backward_pass():
    model, x = small().double().train(), images(dtype=torch.float64)
    gradients = []
    for enable in (False, True):
        torch.manual_seed(5)
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_without_graph_breaks():
    model, x = small(depth=2), images()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x), model(x))
    assert torch.isfinite(torch.compile(model.train(), fullgraph=True, backend='aot_eager')(x)).all()


@pytest.mark.parametrize(('size', 'grid'), [((224, 224), (28, 28)), ((33, 50), (5, 7)), ((5, 8), (1, 1))])
def test_patches_start_at_every_stride_of_a_padded_image(size, grid):
    model = small(img_size=size)
    assert model.patch_embed.grid_size == grid
    x = images(*size)
    tokens, got = model.patch_embed(x)
    assert got == grid
    padded = torch.zeros(2, 3, 8 * grid[0] + 8, 8 * grid[1] + 8)
    padded[:, :, : size[0], : size[1]] = x
    want = torch.nn.functional.conv2d(padded, model.patch_embed.proj.weight, stride=8)
    torch.testing.assert_close(tokens, want.flatten(2).transpose(1, 2))


def test_every_way_to_another_image_size_agrees():
    assert_sizes_agree(small, 41, 90)


def test_the_norm_of_the_mean_goes_and_comes_with_the_pooling():
    model = small(class_token='middle')
    state = model.state_dict()
    model.reset_classifier(4, 'token')
    assert not any(key.startswith('fc_norm') for key in model.state_dict())
    tokens = model.forward_features(images())
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, 32])
    pooled_by_token = small(class_token='middle', global_pool='token')
    pooled_by_token.load_state_dict(vmzoo.convert_state_dict(state, pooled_by_token))
    model.reset_classifier(4, 'avg')
    assert model(images()).shape == (2, 4)


def test_weights_of_a_data_set_bring_its_classes_in_the_order_of_the_head():
    classes = {'uc': (21, 'harbor'), 'aid': (30, 'Port'), 'nwpu': (45, 'river')}
    for dataset, (count, first) in classes.items():
        model = timm.create_model(f'rsmamba_base.{dataset}', device='meta')
        assert model.num_classes == len(model.pretrained_cfg['label_names']) == count
        assert model.pretrained_cfg['label_names'][0] == first
    assert timm.create_model('rsmamba_base', device='meta').num_classes == 45


@pytest.mark.parametrize(('name', 'params'), [('base', 6.4e6), ('large', 16.2e6), ('huge', 33.1e6)])
def test_variants_have_the_published_number_of_parameters(name, params):
    model = timm.create_model(f'rsmamba_{name}', device='meta')
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(params, rel=0.01)


def test_initial_values_are_the_published_ones():
    model = small(class_token='front')
    dt_proj = model.layers[0].mixer.dt_proj
    assert dt_proj.bias.abs().max() <= dt_proj.in_features**-0.5
    assert 0.9 < model.patch_embed.proj.weight.std() * (3 * 256) ** 0.5 < 1.1
    assert torch.count_nonzero(model.cls_token) == 0


def test_unknown_paths_are_refused():
    with pytest.raises(ValueError, match='paths must be one of forward, forward_reverse'):
        small(paths='reverse')
