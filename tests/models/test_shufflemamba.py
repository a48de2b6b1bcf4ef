"""What is ShuffleMamba's own: the layer-wise shuffle, registers, four-way mixers, the dense form."""

import logging
import math
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.nn import Identity

import vmzoo
from vmzoo.layers.shuffle import LayerwiseShuffle
from vmzoo.models.shufflemamba import MambaReg, ShuffleMamba, checkpoint_filter_fn

from .checks import assert_sizes_agree

SMALL = {'img_size': 64, 'depth': 4, 'embed_dim': 32, 'num_classes': 5}


def small(name: str = 'shufflemamba_tiny', **kwargs) -> ShuffleMamba:
    return timm.create_model(name, **{**SMALL, **kwargs})


def images(size: int = 64, width: int | None = None, **kwargs) -> torch.Tensor:
    return torch.randn(2, 3, size, width or size, **kwargs)


# Shuffle


def orders_of(model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor | None]:
    seen = []
    handle = model.shuffle.register_forward_hook(lambda _, args, order: seen.append(order))
    model(x)
    handle.remove()
    return seen


@pytest.mark.parametrize(
    'name', ['shufflemamba_tiny', 'shufflemamba_reg_tiny', 'mambamlp_base', 'vim_tiny_patch16_224']
)
def test_a_layer_sees_its_tokens_in_the_drawn_order_and_gives_them_back_in_their_own(name):
    """A shuffled block is the block between two permutations of the whole stream."""
    model = small(name, shuffle_rate=1.0).double().train()
    x = images(dtype=torch.float64)
    torch.manual_seed(1)
    (*_, order) = orders_of(model, x)
    assert sorted(order.tolist()) == list(range(len(order)))
    stream, _, context = model._stem(x)
    paths = context[0] if name.startswith('vim') else context
    shuffled, _ = model.layers[-1](stream[:, order], paths)
    model.shuffle.forward = lambda *args: order
    got, _ = model._apply_block(3, stream, context)
    torch.testing.assert_close(got, shuffled[:, torch.argsort(order)])
    assert not torch.allclose(got, model.layers[-1](stream, paths)[0])


def test_the_same_seed_or_generator_gives_the_same_result():
    model = small(shuffle_rate=0.9).train()
    x = images()
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(model(x))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    torch.manual_seed(3)
    for seed in (3, 3, 4):
        model.shuffle.generator = torch.Generator().manual_seed(seed)
        runs.append(model(x))
    # a generator's numbers are those of the default one with its seed
    assert torch.equal(runs[3], runs[0])
    assert torch.equal(runs[3], runs[4])
    assert torch.equal(runs[5], runs[2])


def test_nothing_is_shuffled_in_evaluation_or_without_a_rate():
    x = images()
    model = small(shuffle_rate=1.0)
    plain = small()
    plain.load_state_dict(model.state_dict())
    state = torch.get_rng_state()
    assert torch.equal(model.eval()(x), plain.train()(x))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_rate_grows_from_zero_to_its_whole_with_depth():
    shuffle = LayerwiseShuffle(1.0, 6)
    torch.manual_seed(0)
    drawn = [[shuffle(layer, 4, 'cpu') is not None for layer in range(6)] for _ in range(500)]
    frequency = torch.tensor(drawn).double().mean(0)
    assert frequency[0] == 0
    assert frequency[5] == 1
    assert (frequency - torch.linspace(0, 1, 6)).abs().max() < 0.08


def test_checkpointing_repeats_the_orders_in_the_backward_pass():
    model = small(shuffle_rate=1.0, dynamic_img_size=True).double().train()
    x = images(dtype=torch.float64)
    gradients = []
    for enable in (False, True):
        torch.manual_seed(5)
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_a_shuffling_model_compiles_without_graph_breaks():
    model = small(depth=2, shuffle_rate=0.5)
    x = images()
    plain = model.eval()(x)
    torch.compiler.reset()
    compiled = torch.compile(model.train(), fullgraph=True, backend='aot_eager')
    runs = [compiled(x) for _ in range(16)]
    unshuffled = [torch.allclose(run, plain, rtol=1e-4, atol=1e-5) for run in runs]
    assert any(unshuffled)
    assert not all(unshuffled)
    runs[0].sum().backward()
    torch.testing.assert_close(compiled.eval()(x), plain)


@pytest.mark.parametrize('rate', [-0.1, 1.1, math.nan])
def test_a_rate_outside_zero_to_one_is_refused(rate):
    with pytest.raises(ValueError, match='shuffle_rate is a probability'):
        small(shuffle_rate=rate)


# Registers


@pytest.mark.parametrize(
    ('num_patches', 'registers', 'places'),
    [
        (196, 12, [15, 31, 47, 63, 79, 95, 111, 127, 143, 159, 175, 191]),
        (196, 16, list(range(11, 192, 12))),
        (64, 12, list(range(4, 60, 5))),
        (4, 6, list(range(6))),
    ],
)
def test_registers_are_spread_over_the_patches(num_patches, registers, places):
    model = small('shufflemamba_reg_tiny', num_registers=registers)
    assert list(model.token_places(num_patches)) == places


def test_registers_stand_at_their_places_with_their_own_position_embedding():
    model = small('shufflemamba_reg_tiny', num_registers=3).eval()
    stream, grid, _ = model._stem(images())
    assert grid == (4, 4)
    assert torch.equal(stream[0, [4, 9, 14]], (model.cls_token + model.pos_embed_cls)[0])
    _, ((patches, registers),) = model.forward_intermediates(images(), 1, return_prefix_tokens=True, output_fmt='NLC')
    assert patches.shape == (2, 16, 32)
    assert registers.shape == (2, 3, 32)


def test_the_neck_goes_and_comes_with_the_pooling():
    model = small('shufflemamba_reg_base', num_registers=6, reduction=4)
    assert model.head_hidden_size == 6 * 8
    model.reset_classifier(3, 'avg')
    assert isinstance(model.neck, Identity)
    assert model.head.weight.shape == (3, 32)
    model.reset_classifier(3, 'token')
    assert model.head.weight.shape == (3, 48)
    assert model(images()).shape == (2, 3)


@pytest.mark.parametrize('options', [{'num_registers': 0}, {'reduction': 5}, {'reduction': 0}])
def test_registers_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match='one register or more, and a reduction that divides embed_dim=32'):
        small('shufflemamba_reg_tiny', **options)


@pytest.mark.parametrize('name', ['shufflemamba_reg_tiny', 'mambamlp_base'])
def test_every_way_to_another_image_size_agrees(name):
    assert_sizes_agree(partial(small, name), 48, 80)


# Four-way mixer


def test_columns_are_rows_of_the_transposed_image():
    """With the parameter sets of rows and columns exchanged, the transposed image gives the transposed map."""
    model, mirrored = small('mambamlp_base', depth=2).double().eval(), small('mambamlp_base', depth=2).double().eval()
    for block in model.layers:
        for suffix in ('_b', '_c', '_c_b'):
            torch.nn.init.normal_(getattr(block.mixer, f'dt_proj{suffix}').bias)
    swapped = {}
    for key, value in model.state_dict().items():
        parts = key.split('.')
        if 'mixer' in key and parts[3] not in ('in_proj', 'out_proj'):
            name, log = parts[3].removesuffix('_log'), '_log' if parts[3].endswith('_log') else ''
            base = name.removesuffix('_b').removesuffix('_c')
            suffix = {'': '_c', '_b': '_c_b', '_c': '', '_c_b': '_b'}[name.removeprefix(base)]
            parts[3] = base + suffix + log
        swapped['.'.join(parts)] = value
    grid = swapped['pos_embed'][:, 1:].unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
    swapped['pos_embed'] = torch.cat((swapped['pos_embed'][:, :1], grid), dim=1)
    swapped['patch_embed.proj.weight'] = swapped['patch_embed.proj.weight'].transpose(2, 3)
    mirrored.load_state_dict(swapped)
    x = images(dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(mirrored(x.transpose(2, 3)), model(x))


@pytest.mark.parametrize(('scan', 'params'), [('cross', 85_031_656), ('forward_backward', 82_248_424)])
def test_mambamlp_has_the_published_number_of_parameters(scan, params):
    model = timm.create_model('mambamlp_base', scan=scan, device='meta')
    assert sum(p.numel() for p in model.parameters()) == params


@pytest.mark.parametrize(
    ('name', 'params'),
    [
        ('shufflemamba_small', 25_796_584),
        ('shufflemamba_reg_large', 341_222_376),
        ('mambamlp_large', 297_035_720),
        ('mambamlp_huge', 662_682_088),
    ],
)
def test_variants_have_the_published_number_of_parameters(name, params):
    assert sum(p.numel() for p in timm.create_model(name, device='meta').parameters()) == params


# Initial values


def test_initial_values_are_the_published_ones():
    mixer = small(embed_dim=64).layers[2].mixer
    assert all(torch.count_nonzero(proj.bias) == 0 for proj in (mixer.dt_proj, mixer.dt_proj_b))
    assert all(0.01 < proj.weight.std() < 0.03 for proj in (mixer.dt_proj, mixer.in_proj, mixer.x_proj_b))
    assert 0.9 < mixer.out_proj.weight.std() * (3 * 128 * 4) ** 0.5 < 1.1
    assert torch.count_nonzero(small().cls_token) == 0

    registers = small('shufflemamba_reg_tiny')
    assert F.softplus(registers.layers[0].mixer.dt_proj.bias).max() < 0.11
    assert all(0.01 < p.std() < 0.03 for p in (registers.cls_token, registers.pos_embed_cls, registers.pos_embed))


# Dense form


def test_dense_maps_are_the_mixers_outputs_and_at_last_the_normed_stream():
    options = {**SMALL, 'num_classes': 0, 'depth': 5}
    model = timm.create_model('shufflemamba_large_seg', **options, block_indices=(0, 1, 2, 4)).eval()
    x = images()
    outs = []
    for block in model.layers:
        block.register_forward_hook(lambda _, args, out: outs.append(out))
    with torch.inference_mode():
        maps = model(x)
        want = [outs[0][1], outs[1][1], outs[2][1], model.norm_f(outs[4][0])]
        for got, tokens in zip(maps, want, strict=True):
            assert torch.equal(got, tokens.transpose(1, 2).unflatten(2, (4, 4)))
    early = timm.create_model('shufflemamba_large_seg', **options, block_indices=(0, 1, 2, 3))
    assert not early.norm_f.weight.requires_grad


def test_a_classifier_loads_into_the_dense_form(caplog):
    source = small()
    model = timm.create_model('shufflemamba_base_seg', depth=4, embed_dim=32, img_size=64, block_indices=(0, 1, 2, 3))
    with caplog.at_level(logging.WARNING):
        model.load_state_dict(vmzoo.convert_state_dict({'model': source.state_dict()}, model))
    assert 'biases are zero' in caplog.text
    assert torch.equal(model.pos_embed, source.pos_embed[:, 1:])
    assert torch.equal(model.layers[3].norm.weight, source.layers[3].norm.weight)


def test_a_checkpoint_with_the_other_norm_says_which_it_needs():
    with pytest.raises(ValueError, match="norm_layer='layernorm'"):
        checkpoint_filter_fn(small(norm_layer='layernorm').state_dict(), small())
    with pytest.raises(ValueError, match="norm_layer='rmsnorm'"):
        checkpoint_filter_fn(small().state_dict(), small(norm_layer='layernorm'))


def test_mamba_reg_s_own_files_are_known():
    assert isinstance(small('shufflemamba_reg_base'), MambaReg)
    assert set(timm.list_pretrained('shufflemamba*')) == {
        f'shufflemamba_reg_{size}.mambar_in1k' for size in ('small', 'base', 'large')
    }
