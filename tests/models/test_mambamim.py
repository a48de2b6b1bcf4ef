"""MambaMIM hides what it should, sees nothing of it, learns, and hands its encoder to a network."""

import itertools
import logging

import pytest
import timm
import torch
from torch import Tensor

import vmzoo
from vmzoo.models.hymamba import HyMamba
from vmzoo.models.mambamim import MambaMIM, from_patches, interpolate_tokens, to_patches

from .exemptions import SMALL


def network(**kwargs) -> HyMamba:
    return timm.create_model('hymamba', **{**SMALL['hymamba'], **kwargs})


def pretraining(mask_ratio: float = 0.75, as_released: bool = False, **kwargs) -> MambaMIM:
    return MambaMIM(network(**kwargs), decoder_dim=32, mask_ratio=mask_ratio, as_released=as_released)


def at_voxels(visible: Tensor) -> Tensor:
    for axis in (2, 3, 4):
        visible = visible.repeat_interleave(16, dim=axis)
    return visible


def published(**kwargs) -> tuple[dict[str, Tensor], MambaMIM]:
    """Weights of a pre-training under the published names, and the pre-training."""
    model = pretraining(**kwargs)
    state = {}
    for key, value in model.state_dict().items():
        name, _, rest = key.partition('.')
        if name == 'encoder':
            rest = rest.replace('stages.4.layers.', 'mae.blocks.').replace('stages.4.pos_embed', 'mae.pos_embed')
            if rest.startswith('stages.'):
                _, level, part, rest = rest.split('.', 3)
                part = {'blocks': 'layer', 'expand': 'expend', 'skip': 'encoder'}[part]
                rest = f'embeddings.{part}{int(level) + 1}.{rest}'
            elif rest.startswith('stem'):
                rest = f'embeddings.{rest}'
            state[f'sparse_encoder.{rest}'] = value
        elif name == 'decoder' and not rest.startswith('proj'):
            _, level, part, rest = rest.split('.', 3)
            middle = {'up': f'dec.{level}.up_sample', 'conv': f'dec.{level}.conv', 'fuse': f'fuse.{level}.conv'}[part]
            state[f'dense_decoder.{middle}.{rest}'] = value
        elif name == 'decoder':
            state[f'dense_decoder.{rest}'] = value
        elif name == 'mask_tokens':
            state[f'mask_tokens.{int(rest) + 1}'] = value
        else:
            state['sparse_encoder.mae.mask_token' if name == 'mask_token' else key] = value
    # what the published model has and no result depends on
    state['sparse_encoder.mae.blocks.0.mamba.A_b_log'] = torch.zeros(48, 4)
    state['sparse_encoder.mae.blocks.0.mamba.conv1d_b.weight'] = torch.zeros(48, 1, 4)
    for key, value in network().stages[0].skip.state_dict().items():
        state[f'sparse_encoder.embeddings.encoder1.{key}'] = value
    state['dense_decoder.fuse.0.conv.0.bias'] = torch.zeros(32)
    state['densify_projs.4.bias'] = torch.zeros(2)
    state |= {'mask_tokens.0': torch.zeros(1, 24, 1, 1, 1), 'mask_tokens.4': torch.zeros(1, 8, 1, 1, 1)}
    return state, model


@pytest.mark.parametrize(('mask_ratio', 'seen'), [(0.75, 7), (0.5, 14), (0.9, 3)])
def test_the_mask_has_the_ratio_in_every_sample(mask_ratio, seen):
    visible = pretraining(mask_ratio).draw_visible(4, (3, 3, 3))
    assert visible.shape == (4, 1, 3, 3, 3) and visible.dtype == torch.bool
    assert visible.flatten(1).sum(dim=1).tolist() == [seen] * 4
    assert not torch.equal(visible[0], visible[1])


def test_the_mask_is_that_of_the_generator():
    model, x = pretraining().eval(), torch.randn(2, 1, 32, 32, 48)
    with torch.no_grad():
        first, again, other = (model(x, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.visible, again.visible) and torch.equal(first.reconstruction, again.reconstruction)
    assert not torch.equal(first.visible, other.visible)
    with torch.no_grad():
        given = model(x, first.visible)
    assert torch.equal(given.loss, first.loss)


@torch.no_grad()
def test_hidden_voxels_change_nothing_but_the_target():
    model, x = pretraining().double().eval(), torch.randn(2, 1, 32, 32, 32, dtype=torch.float64)
    want = model(x)
    other = torch.where(at_voxels(want.visible), x, torch.full_like(x, torch.nan))
    kept = model.kept_tokens(want.visible, 2)
    for a, b in zip(model.encode(x, want.visible, kept), model.encode(other, want.visible, kept)):
        assert torch.equal(a, b)
    assert torch.equal(model(other, want.visible).reconstruction, want.reconstruction)
    seen = x.masked_fill(at_voxels(want.visible), 0.0)
    assert not torch.equal(model(seen, want.visible).reconstruction, want.reconstruction)


@torch.no_grad()
def test_masked_stages_are_sparse_convolutions():
    """Their features are those of the visible cell alone in a volume of zeros, where no neighbour is visible."""
    model = network(img_size=48).double().eval()
    for module in model.modules():  # without biases the empty space around a cell stays empty
        if getattr(module, 'bias', None) is not None:
            torch.nn.init.zeros_(module.bias)
    x = torch.randn(1, 1, 48, 48, 48, dtype=torch.float64)
    visible = torch.zeros(1, 1, 3, 3, 3, dtype=torch.bool)
    visible[..., 1, 1, 1] = True
    cell = x[..., 16:32, 16:32, 16:32]
    alone = model.forward_visible(cell, torch.ones(1, 1, 1, 1, 1, dtype=torch.bool))
    for level, features in enumerate(model.forward_visible(x, visible)[:4]):
        side = 16 >> level
        inner = features[..., side : 2 * side, side : 2 * side, side : 2 * side]
        torch.testing.assert_close(inner, alone[level], rtol=1e-9, atol=1e-9)
        assert features.count_nonzero() == inner.count_nonzero() > 0


@torch.no_grad()
def test_all_visible_is_the_network():
    model, x = network().eval(), torch.randn(1, 1, 32, 32, 32)
    want = model.forward_intermediates(x, intermediates_only=True)
    got = model.forward_visible(x, torch.ones(1, 1, 2, 2, 2, dtype=torch.bool), torch.arange(8)[None])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def plain_interpolation(x: Tensor, visible: Tensor, A: Tensor) -> Tensor:
    """The definition, anchor by anchor."""
    length = len(x)
    anchors = [i for i in range(length) if visible[i] or i in (0, length - 1)]
    out = torch.empty_like(x)
    for start, end in itertools.pairwise(anchors):
        total, gap = torch.zeros_like(x[0]), end - start
        for j in range(gap):
            share = j / (gap - 1) if gap > 1 else 0.0
            total = total + torch.linalg.matrix_power(A, gap - 1 - j) @ ((1 - share) * x[start] + share * x[end])
            out[start + j] = total
    out[-1] = A @ x[-1]
    return out


@pytest.mark.parametrize('length', [1, 2, 3, 27])
def test_interpolation_is_its_definition(length):
    x = torch.randn(3, length, 6, dtype=torch.float64, requires_grad=True)
    visible = torch.rand(3, length) < 0.25
    A = (0.4 * torch.randn(6, 6, dtype=torch.float64)).requires_grad_()
    got = interpolate_tokens(x, visible, A)
    want = torch.stack([plain_interpolation(*sample, A) for sample in zip(x, visible)])
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), (x, A)) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_interpolated_tokens_lie_at_their_cells_unless_as_released():
    x, visible = torch.randn(1, 24, 2, 2, 2), torch.rand(1, 1, 2, 2, 2) < 0.5
    model, released = pretraining(), pretraining(as_released=True)
    tokens = interpolate_tokens(x.flatten(2).mT, visible.flatten(1), torch.zeros(24, 24))
    assert torch.equal(model.interpolate(x, visible).flatten(2).mT, tokens)
    assert torch.equal(released.interpolate(x, visible).flatten(), tokens.flatten())


def test_the_release_counts_the_visible_cells_of_the_batch():
    visible = torch.tensor([[0, 1, 0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0, 1]]).bool().view(2, 1, 2, 2, 2)
    assert pretraining().kept_tokens(visible, 2).tolist() == [[1, 5], [0, 7]]
    released = pretraining(as_released=True)
    assert released.kept_tokens(visible, 2).tolist() == [[1, 5, 0, 2], [0, 7, 1, 2]]
    assert released.kept_tokens(visible.repeat(4, 1, 1, 1, 1), 2).shape == (8, 8)


@torch.no_grad()
def test_the_loss_is_that_of_hidden_normalised_cells():
    model = pretraining(in_chans=2).double()
    x, reconstruction = torch.randn(2, 2, 2, 32, 32, 48, dtype=torch.float64)
    visible = model.draw_visible(2, (2, 2, 3))
    errors = []
    for b, d, h, w in (~visible[:, 0]).nonzero().tolist():
        place = (b, slice(None), *(slice(16 * i, 16 * i + 16) for i in (d, h, w)))
        target = (x[place] - x[place].mean()) / (x[place].var() + 1e-6).sqrt()
        errors.append((reconstruction[place] - target).square().mean())
    torch.testing.assert_close(model.loss(x, reconstruction, visible), torch.stack(errors).mean())
    assert torch.equal(from_patches(to_patches(x), (2, 2, 3)), x)


@torch.no_grad()
def test_a_perfect_reconstruction_restores_the_volume():
    model, x = pretraining(), 3 + 5 * torch.randn(1, 1, 32, 32, 32)
    out = model.eval()(x)
    cells = to_patches(x)
    cells = (cells - cells.mean(-1, keepdim=True)) / (cells.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(model.restore(x, out._replace(reconstruction=from_patches(cells, (2, 2, 2)))), x)
    restored = model.restore(x, out)
    same = at_voxels(out.visible)
    assert torch.equal(restored[same], x[same]) and not torch.equal(restored, x)


def test_the_loss_falls_and_reaches_every_parameter():
    model = pretraining(drop_path_rate=0.1)
    generator = torch.Generator().manual_seed(0)
    axis = torch.linspace(-1, 1, 32)
    x = (axis[:, None, None] * axis[:, None]).cos() * axis  # smooth, so that there is something to see
    x = x.expand(2, 1, 32, 32, 32) + torch.tensor([0.0, 1.0]).view(2, 1, 1, 1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.set_grad_checkpointing()
    losses = []
    for _ in range(12):
        out = model(x, generator=generator)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3]), losses
    assert model.A_interpolation.abs().max() > 0


def test_autocast_and_bfloat16():
    model, x = pretraining(), torch.randn(1, 1, 32, 32, 32)
    with torch.autocast('cpu', torch.bfloat16):
        out = model(x)
    assert out.loss.dtype == torch.float32 and torch.isfinite(out.loss)
    out = pretraining(dtype=torch.bfloat16)(x.bfloat16())
    assert out.reconstruction.dtype == torch.bfloat16 and torch.isfinite(out.loss)


def test_compiles_without_graph_breaks():
    model, x = pretraining().eval(), torch.randn(2, 1, 32, 32, 32)
    visible = model.draw_visible(2, (2, 2, 2))
    kept = model.kept_tokens(visible, 2)

    def losses(volume: Tensor) -> Tensor:
        return model.loss(volume, model.decoder(model.densify(model.encode(volume, visible, kept), visible)), visible)

    torch.compiler.reset()
    loss = torch.compile(losses, fullgraph=True, backend='aot_eager')(x)
    torch.testing.assert_close(loss, model(x, visible).loss)
    loss.backward()
    drawn = torch.compile(model, fullgraph=True, backend='aot_eager')(x)
    assert drawn.visible.flatten(1).sum(dim=1).tolist() == [2, 2]


def test_the_encoder_goes_into_a_network(tmp_path, caplog):
    model = pretraining()
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'pretrained.pth')
    overlay = {'file': str(tmp_path / 'pretrained.pth')}
    with caplog.at_level(logging.WARNING):
        net = network(pretrained=True, pretrained_cfg_overlay=overlay, img_size=48, num_classes=3)
    assert 'has no stages.0.skip, decoder, final, head: as' in caplog.text
    shared = {key for key in model.encoder.state_dict() if key != 'stages.4.pos_embed'}
    assert shared == {
        key for key in net.state_dict() if not key.startswith(('decoder.', 'final.', 'head.', 'stages.0.skip.'))
    } - {'stages.4.pos_embed'}
    assert all(torch.equal(net.state_dict()[key], model.encoder.state_dict()[key]) for key in shared)


def test_published_names_are_converted():
    state, model = published()
    target = pretraining()
    target.load_state_dict(vmzoo.convert_state_dict({'module': None, 'config': {}, 'state_dict': state}, target))
    for key, value in model.state_dict().items():
        assert torch.equal(target.state_dict()[key], value), key
    net = network()
    net.load_state_dict(vmzoo.convert_state_dict(state, net))
    assert torch.equal(net.stages[1].expand.weight, model.encoder.stages[1].expand.weight)
    with pytest.raises(vmzoo.weights.CheckpointMismatch, match='missing'):
        vmzoo.convert_state_dict({key: value for key, value in state.items() if 'layer3' not in key}, net)


def test_bad_input_is_named():
    model = pretraining()
    x = torch.randn(2, 1, 32, 32, 32)
    with pytest.raises(ValueError, match='multiples of 16'):
        model(x[..., :30])
    with pytest.raises(ValueError, match='would hide 1'):
        model(x[..., :16, :16, :16])
    visible = torch.zeros(2, 1, 2, 2, 2, dtype=torch.bool)
    visible[0, 0, 0, 0, 0] = True
    with pytest.raises(ValueError, match=r'\[0, 1\]'):
        model(x, visible)
    with pytest.raises(ValueError, match='boolean'):
        model(x, visible.float())
    with pytest.raises(ValueError, match='mask_ratio'):
        pretraining(mask_ratio=1.0)
    with pytest.raises(ValueError, match='multiple of 16'):
        MambaMIM(network(), decoder_dim=24)
    with pytest.raises(ValueError, match='multiples of 6'):
        network(embed_dim=(8, 8, 16, 20))
    with pytest.raises(ValueError, match='embed_dim takes 4'):
        network(embed_dim=(8, 8, 16))


@torch.no_grad()
def test_other_sizes_have_their_own_position_table():
    model, built = network().eval(), network(img_size=(32, 48, 16)).eval()
    built.load_state_dict(vmzoo.convert_state_dict(model.state_dict(), built))
    x = torch.randn(1, 1, 32, 48, 16)
    assert torch.equal(model(x), built(x))
