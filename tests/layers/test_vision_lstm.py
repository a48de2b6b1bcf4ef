"""The matrix LSTM in chunks is the recurrent one, at any size of the gates, and the block around it."""

import pytest
import torch
import torch.nn.functional as F

from vmzoo.layers import MatrixLSTMMixer, VisionLSTMBlock, matrix_lstm


def recurrent(q, k, v, igate, fgate, eps=1e-6):
    """The definition, step by step."""
    batch, heads, length, dim = q.shape
    C, n = q.new_zeros(batch, heads, dim, dim), q.new_zeros(batch, heads, dim)
    m = q.new_full((batch, heads), -torch.inf)
    out = []
    for t in range(length):
        log_f, before = F.logsigmoid(fgate[..., t]), m
        m = torch.maximum(log_f + before, igate[..., t])
        forget, write = (log_f + before - m).exp()[..., None], (igate[..., t] - m).exp()[..., None]
        key = k[:, :, t] / dim**0.5
        C = forget[..., None] * C + (write * key)[..., None] * v[:, :, t, None, :]
        n = forget * n + write * key
        query = q[:, :, t]
        norm = torch.maximum((query * n).sum(-1).abs(), (-m).exp()) + eps
        out.append((query[..., None, :] @ C).squeeze(-2) / norm[..., None])
    return torch.stack(out, dim=2)


def inputs(length, gate_scale=1.0, dtype=torch.float64, dim=8):
    q, k, v = (torch.randn(2, 3, length, dim, dtype=torch.float64) for _ in range(3))
    gates = [gate_scale * torch.randn(2, 3, length, dtype=torch.float64) for _ in range(2)]
    return [x.to(dtype) for x in (q, k, v, *gates)]


def error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize('length', [1, 2, 15, 16, 17, 150])
@pytest.mark.parametrize('chunk_size', [1, 16, 64])
@pytest.mark.parametrize('gate_scale', [1.0, 30.0])
def test_equals_the_recurrent_definition(length, chunk_size, gate_scale):
    x = inputs(length, gate_scale)
    got = matrix_lstm(*x, chunk_size=chunk_size)
    torch.testing.assert_close(got, recurrent(*x), rtol=1e-9, atol=1e-9)


def test_gradients_are_those_of_the_recurrent_definition():
    x = [v.requires_grad_() for v in inputs(37)]
    weight = torch.randn(2, 3, 37, 8, dtype=torch.float64)
    grads = [torch.autograd.grad((f * weight).sum(), x) for f in (matrix_lstm(*x, chunk_size=16), recurrent(*x))]
    for got, want in zip(*grads):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('shift', [-3e4, -300.0, 0.0, 300.0, 3e4])
@pytest.mark.parametrize('gate_scale', [10.0, 1e4])
def test_gates_of_any_size_are_finite_and_exact(dtype, shift, gate_scale):
    x = inputs(90, gate_scale, dtype)
    x[3] = (x[3].float() + shift).to(dtype)
    x = [v.requires_grad_() for v in x]
    h = matrix_lstm(*x, chunk_size=16)
    assert h.dtype == torch.float32
    assert torch.isfinite(h).all()
    # taken as the block's norm leaves it: where the normaliser is nearly zero, the length of h has no exact digit
    got, want = (F.layer_norm(y, y.shape[-1:]) for y in (h, recurrent(*(v.double() for v in x)).detach()))
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad((got * torch.randn_like(got)).sum(), x))
    # float32 has a gate of 3e4 to 2e-3, and its exponential to as many parts of itself
    tolerance = 1e-5 if gate_scale + abs(shift) < 1000 else 1e-2
    assert (got.double() - want).norm() <= tolerance * want.norm() + 1e-30


def test_a_long_sequence_keeps_its_digits_in_float32():
    """Sums of the forget gates over the whole sequence reach thousands here, and their differences lose digits."""
    x = inputs(2048, dtype=torch.float32)
    want = matrix_lstm(*(v.double() for v in x), chunk_size=2048)
    assert matrix_lstm(*x).dtype == torch.float32
    assert error(matrix_lstm(*x), want) < 2e-5


def test_later_tokens_change_nothing():
    x = inputs(40)
    want = matrix_lstm(*x, chunk_size=16)[:, :, :23]
    for v in x:
        v[:, :, 23:] = torch.randn_like(v[:, :, 23:])
    torch.testing.assert_close(matrix_lstm(*x, chunk_size=16)[:, :, :23], want)


@pytest.mark.parametrize('dim, heads', [(8, 4), (6, 2), (25, 2)])
def test_heads_follow_the_width(dim, heads):
    block = VisionLSTMBlock(dim)
    assert block.layer.num_heads == heads
    assert block.layer.q_proj.shape == (2 * dim // heads, heads, heads)
    assert block(torch.randn(2, 5, dim)).shape == (2, 5, dim)


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match='multiple of 2, got 15'):
        MatrixLSTMMixer(5, expand=3)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bfloat16', 'float16'])
def test_autocast_leaves_the_block_in_float32(dtype):
    block = VisionLSTMBlock(8)
    x = torch.randn(2, 70, 8)
    want = block(x)
    with torch.autocast('cpu', dtype):
        assert torch.equal(block(x), want)
        assert block(x.to(dtype)).dtype == torch.float32


@torch.no_grad()
def test_starts_as_published():
    mixer = MatrixLSTMMixer(400)
    assert mixer.proj_up.weight.std() == pytest.approx((2 / 2000) ** 0.5, rel=0.05)
    assert mixer.v_proj.std() == pytest.approx((2 / 2000) ** 0.5, rel=0.05)
    assert mixer.proj_down.weight.std() == pytest.approx(2 / 20, rel=0.05)
    assert not mixer.igate.weight.any() and not mixer.fgate.weight.any()
    assert mixer.fgate.bias.tolist() == [3, 4, 5, 6]
