"""Neighbourhood attention: NATTEN's values and gradients, its definition at awkward shapes, and NATTEN itself."""

import sys

import fake_natten
import pytest
import torch
from golden import golden
from torch.utils.flop_counter import FlopCounterMode

from vmzoo.layers import na2d_av, na2d_qk
from vmzoo.layers import neighborhood_attention as module

FIXTURES = sorted(path.stem for path in (golden.DIR / 'ops').glob('neighborhood_attention_2d_*.npz'))
# H, W, kernel size, dilation
SHAPES = [(1, 1, 1, (1, 1)), (2, 5, 1, (2, 3)), (3, 7, 3, (1, 2)), (11, 6, 3, (3, 2)), (5, 5, 5, (1, 1))]


def make(height, width, kernel_size, batch=2, heads=2, dim=3, dtype=torch.float64):
    """query, key, value and rpb."""
    shape = (batch, heads, height, width, dim)
    side = 2 * kernel_size - 1
    tensors = [torch.randn(shape) for _ in range(3)] + [torch.randn(heads, side, side)]
    return [v.to(dtype).requires_grad_() for v in tensors]


def attend(query, key, value, rpb, kernel_size, dilation, backend='torch'):
    attn = na2d_qk(query, key, kernel_size, dilation, rpb, backend)
    return attn, na2d_av(attn.softmax(-1), value, kernel_size, dilation, backend)


@pytest.mark.parametrize('name', FIXTURES)
def test_equals_natten(name):
    meta, want = golden.load(f'ops/{name}')
    given = {key: torch.from_numpy(golden.make_input(**spec)).double() for key, spec in meta['inputs'].items()}
    inputs = [given[key].requires_grad_() for key in ('q', 'k', 'v', 'rpb')]
    attn, out = attend(*inputs, meta['config']['kernel_size'], tuple(meta['config']['dilation']))
    gradients = torch.autograd.grad(out, inputs, given['dy'])
    got = dict(zip(('attn', 'out', 'dq', 'dk', 'dv', 'drpb'), (attn, out, *gradients)))
    errors = {key: golden.error(got[key].detach().numpy(), want[key]) for key in want}
    assert max(errors.values()) < 1e-6, errors


@pytest.mark.parametrize('rows', [1, 2, 1000])
@pytest.mark.parametrize('height, width, kernel_size, dilation', SHAPES)
def test_equals_the_definition_however_rows_are_grouped(height, width, kernel_size, dilation, rows, monkeypatch):
    monkeypatch.setattr(module, '_CPU_BLOCK', rows * 2 * 2 * width * kernel_size * width)
    inputs = make(height, width, kernel_size)
    got = attend(*inputs, kernel_size, dilation)
    query, key, value, rpb = inputs
    attn = fake_natten.na2d_qk(query, key, kernel_size, dilation, rpb=rpb)
    want = attn, fake_natten.na2d_av(attn.softmax(-1), value, kernel_size, dilation)
    torch.testing.assert_close(got, want)
    weights = [torch.randn_like(y) for y in want]
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, weights), torch.autograd.grad(want, inputs, weights), rtol=1e-9, atol=1e-9
    )


def test_one_dilation_serves_both_axes():
    query, key, value, _ = make(6, 7, 3)
    attn = na2d_qk(query, key, 3, 2)
    assert torch.equal(attn, na2d_qk(query, key, 3, (2, 2)))
    assert torch.equal(na2d_av(attn, value, 3, 2), na2d_av(attn, value, 3, (2, 2)))


def test_first_and_second_derivatives():
    query, key, value, rpb = make(4, 3, 3, batch=1, heads=1, dim=2)

    def function(*inputs):
        return attend(*inputs, 3, (1, 1))[1]

    assert torch.autograd.gradcheck(function, (query, key, value, rpb))
    assert torch.autograd.gradgradcheck(function, (query, key, value, rpb))


@pytest.mark.parametrize('name', ['na2d_qk', 'na2d_av', 'na2d_av_adjoint'])
def test_operators_are_what_they_declare(name):
    query, key, _, _ = make(5, 4, 3, dtype=torch.float32)
    first = query if name == 'na2d_qk' else torch.randn(*query.shape[:-1], 9, requires_grad=True)
    torch.library.opcheck(getattr(torch.ops.vmzoo, name).default, (first, key, 3, [1, 1]))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype):
    inputs = [v.detach().to(dtype).requires_grad_() for v in make(12, 9, 3, dim=8)]
    wide = [v.detach().double().requires_grad_() for v in inputs]
    got, want = attend(*inputs, 3, (4, 3))[1], attend(*wide, 3, (4, 3))[1]
    assert got.dtype == dtype
    pairs = zip([got, *torch.autograd.grad(got.sum(), inputs)], [want, *torch.autograd.grad(want.sum(), wide)])
    for a, b in pairs:
        assert (a.double() - b).norm() < 3 * torch.finfo(dtype).eps * b.norm()


def test_autocast_casts_what_flows():
    inputs = make(12, 9, 3, dim=8, dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        attn = na2d_qk(inputs[0], inputs[1], 3, 2)
        out = na2d_av(attn.float().softmax(-1), inputs[2], 3, 2)
    assert attn.dtype == out.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(out.float().sum(), inputs[:3]))
    double = [v.double() for v in inputs]
    with torch.autocast('cpu', torch.bfloat16):
        got = attend(*double, 3, (2, 2))
    torch.testing.assert_close(got, attend(*double, 3, (2, 2)), rtol=0, atol=0)


def test_memory_follows_the_windows():
    size, kernel_size = 64, 3
    inputs = make(size, size, kernel_size, batch=1, heads=1, dim=4, dtype=torch.float32)
    options = {'activities': [torch.profiler.ProfilerActivity.CPU], 'profile_memory': True, 'acc_events': True}
    with torch.profiler.profile(**options) as profile:
        attend(*inputs, kernel_size, (21, 21))[1].sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    whole_map = size**4 * 4
    assert 0 < largest < whole_map / 16


def test_tables_made_for_inference_serve_training():
    module._cached.cache_clear()
    inputs = make(7, 8, 3)
    with torch.inference_mode():
        attend(*inputs, 3, (2, 2))
    attend(*inputs, 3, (2, 2))[1].sum().backward()
    assert inputs[3].grad.abs().sum() > 0


def test_compiles_and_counts():
    inputs = make(6, 7, 3, dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(lambda *v: attend(*v, 3, (2, 2))[1], fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(*inputs), attend(*inputs, 3, (2, 2))[1])
    meta = [v.to('meta') for v in inputs]
    with FlopCounterMode(display=False) as counter:
        assert attend(*meta, 3, (2, 2))[1].shape == inputs[2].shape
    assert counter.get_total_flops() == 2 * (2 * 2 * 6 * 7 * 9 * 3) * 2


@pytest.mark.parametrize(
    'arguments, message',
    [
        ({'kernel_size': 4, 'rpb': None}, 'odd'),
        ({'kernel_size': -1, 'rpb': None}, 'odd'),
        ({'dilation': 0}, 'at least 1'),
        ({'dilation': (1, 3)}, 'dilation 1x3 does not fit a 6x7 map'),
        ({'kernel_size': 7, 'rpb': None}, 'window of 7x7'),
        ({'rpb': torch.zeros(2, 3, 5)}, r'\(2, 5, 5\)'),
        ({'key': torch.zeros(2, 2, 6, 6, 3)}, 'query and key'),
        ({'backend': 'cuda'}, 'torch, natten'),
    ],
    ids=str,
)
def test_bad_scores_are_named(arguments, message):
    query, key, _, rpb = make(6, 7, 3)
    with pytest.raises(ValueError, match=message):
        na2d_qk(**{'query': query, 'key': key, 'kernel_size': 3, 'dilation': 1, 'rpb': rpb, **arguments})


def test_bad_values_are_named():
    _, _, value, _ = make(6, 7, 3)
    with pytest.raises(ValueError, match='attn should be'):
        na2d_av(torch.zeros(2, 2, 6, 7, 25), value, 3)
    with pytest.raises(ValueError, match='does not fit'):
        na2d_av(torch.zeros(2, 2, 6, 7, 9), value, 3, 3)


def test_natten_equals_torch(monkeypatch):
    calls = fake_natten.install(monkeypatch)
    inputs = make(6, 7, 3)
    got = attend(*inputs, 3, (2, 1), backend='natten')
    assert calls == ['na2d_qk', 'na2d_av']
    torch.testing.assert_close(got, attend(*inputs, 3, (2, 1)))


def test_natten_takes_the_autocast_dtype(monkeypatch):
    fake_natten.install(monkeypatch)
    query, key, value, rpb = make(4, 5, 3, dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        attn = na2d_qk(query, key, 3, 1, rpb, 'natten')
        assert attn.dtype == torch.bfloat16
        assert na2d_av(attn.softmax(-1), value, 3, 1, 'natten').dtype == torch.bfloat16


def test_a_natten_that_cannot_serve_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'natten', None)
    with pytest.raises(RuntimeError, match=r'cannot be imported.*install a natten 0\.17'):
        module.check_attention_backend('natten')

    fake_natten.install(monkeypatch, '0.20.1', na2d=lambda query, key, value, kernel_size: value)
    with pytest.raises(RuntimeError, match=r'natten 0\.20\.1 has no attention in two steps'):
        module.check_attention_backend('natten')

    def without_bias(query, key, kernel_size, dilation):
        return query

    fake_natten.install(monkeypatch, '0.15.0', na2d_qk=without_bias, na2d_av=fake_natten.na2d_av)
    query, key, _, _ = make(6, 7, 3)
    with pytest.raises(RuntimeError, match=r'natten 0\.15\.0'):
        na2d_qk(query, key, 3, backend='natten')
