"""`vmzoo doctor --selftest`: it finds nothing wrong here, and what is wrong it finds."""

import re

import pytest
import torch

from vmzoo.cli import selftest
from vmzoo.cli.main import main
from vmzoo_kernels import available_backends

CPU = torch.device('cpu')


def test_every_backend_of_this_machine_is_correct(monkeypatch, capsys, device):
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    assert main(['doctor', '--selftest']) == 0
    out, err = capsys.readouterr()
    assert not err
    table = [line.split() for line in out.splitlines() if re.search(r' (ok|not for it) *$', line)]
    for name, reason in available_backends(device).items():
        rows = [row for row in table if name in row]
        assert len(rows) == (len(selftest.all_cases()) if reason is None else 0)
        assert any(row[-1] == 'ok' for row in rows) == bool(rows)
    correct, total, seconds = map(int, re.search(r'^(\d+) of (\d+) correct, on \w+, in (\d+) s', out, re.M).groups())
    assert correct == total
    assert seconds < 30


def test_cases_cover_what_may_differ():
    cases = selftest.all_cases()
    assert {case.dtype for case in cases} == {torch.float32, torch.float16, torch.bfloat16}
    assert {case.d_state for case in cases} == {1, 16}
    assert {case.operator for case in cases} == {selftest.route_scan, selftest.selective_scan}
    routes = [case.settings(CPU)['routes'] for case in cases if case.operator is selftest.route_scan]
    assert {route.complete for route in routes} == {True, False}
    assert {route.gather.shape[1] > 1 for route in routes} == {True, False}


def test_a_wrong_result_is_an_exit_code(monkeypatch, capsys):
    scan = selftest.selective_scan
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    monkeypatch.setattr(selftest, 'selective_scan', lambda *args, **kwargs: 1.01 * scan(*args, **kwargs))
    assert main(['doctor', '--selftest']) == 1
    out, err = capsys.readouterr()
    assert len(re.findall(r'sequence of .* WRONG', out)) == out.count('WRONG') >= 2
    assert 'error: the selftest found wrong results' in err


class _Scaled(torch.autograd.Function):
    """Leaves the values alone and changes the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


def broken(how):
    """A case on the CPU whose backend 'other' is off in one way."""
    case = selftest.all_cases()[4]
    scan = case.operator

    def operator(x, *, backend, **kwargs):
        if backend == 'torch':
            return scan(x=x, backend='torch', **kwargs)
        if how == 'gradient':
            return scan(x=_Scaled.apply(x), backend='torch', **kwargs)
        if how == 'crash':
            raise RuntimeError('the driver is asleep')
        if how == 'refusal':
            raise RuntimeError("scan backend 'other' cannot run here: it takes squares")
        y = scan(x=x, backend='torch', **kwargs)
        return {'right': y, 'value': y * (1 + 1e-5), 'not a number': y * torch.nan}[how]

    return case._replace(operator=operator)


@pytest.mark.parametrize('how', ['right', 'refusal', 'value', 'gradient', 'not a number', 'crash'])
def test_whatever_is_wrong_is_found(how):
    reference, other = selftest.examine(broken(how), ['torch', 'other'], CPU)
    assert (reference.backend, other.backend) == ('torch', 'other')
    assert reference.passed
    assert other.passed == (how in ('right', 'refusal'))
    result = {'right': 'ok', 'refusal': 'not for it', 'crash': 'FAILED'}.get(how, 'WRONG')
    assert selftest._cells(other)[-1] == result
    assert ('asleep' in other.problem) == (how == 'crash')
    if how == 'gradient':
        assert [name for name in other.errors if other.errors[name] > other.allowed[name]] == ['x']


def test_what_is_allowed_follows_the_torch_backend():
    case = selftest.all_cases()[0]
    torchs, other = selftest.examine(case._replace(operator=lambda backend, **kw: case.operator(**kw)), ['other'], CPU)
    assert set(torchs.allowed.values()) == {selftest.BOUND[torch.float16]}
    assert other.allowed['y'] == pytest.approx(2 * torchs.errors['y'])
    assert other.allowed['x'] == pytest.approx(3 * torchs.errors['x'])
    assert other.allowed['A'] == 3 * selftest.FLOOR[torch.float16]
