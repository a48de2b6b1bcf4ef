"""`vmzoo doctor --selftest`: every scan backend of this machine against the definition, computed in float64."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from vmzoo_kernels import Routes, available_backends, get_routes, route_scan, routes_from_table, selective_scan
from vmzoo_kernels.backends import interpreted
from vmzoo_kernels.reference import route_scan_reference, selective_scan_reference

from .output import print_table

# Relative errors (2-norm). Those of the torch backend are bounded by what rounding can explain; those of another by
# twice (gradients: three times) the torch backend's in the same case, of which less than the floor is luck.
BOUND = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
FLOOR = {torch.float32: 1e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3}
OUTPUT_FACTOR, GRADIENT_FACTOR = 2, 3
FLOAT32 = ('A', 'D', 'dt_bias', 'delta_bias')  # whatever the dtype of the case


class Case(NamedTuple):
    """One scan.

    Attributes:
        name: What is scanned.
        dtype: Of all inputs but those in `FLOAT32`.
        d_state: N.
        inputs: The operator's tensors, on the CPU in float64.
        operator: Takes the inputs, the settings and a backend.
        reference: Takes the inputs and the settings.
        settings: The other arguments, on a device.
    """

    name: str
    dtype: torch.dtype
    d_state: int
    inputs: dict[str, Tensor]
    operator: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    settings: Callable[[torch.device], dict]

    def inputs_on(self, device: torch.device) -> dict[str, Tensor]:
        """The inputs as the operator gets them."""
        return {k: v.to(device, torch.float32 if k in FLOAT32 else self.dtype) for k, v in self.inputs.items()}


class Finding(NamedTuple):
    """How far a backend is off in a case.

    Attributes:
        errors: Relative errors of 'y' and of the gradients; none if it did not run.
        allowed: How large they may be.
        problem: What it raised.
    """

    case: Case
    backend: str
    errors: dict[str, float]
    allowed: dict[str, float]
    problem: str = ''

    @property
    def result(self) -> str:
        """In a word; what a backend says that it does not do, it leaves to another."""
        if self.problem.startswith(f'RuntimeError: scan backend {self.backend!r} cannot'):
            return 'not for it'
        if self.problem:
            return 'FAILED'
        return 'ok' if all(error <= self.allowed[name] for name, error in self.errors.items()) else 'WRONG'

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return self.result in ('ok', 'not for it')


def _routes(name: str, height: int, width: int, device: torch.device) -> Routes:
    if name != 'padded':
        return get_routes(name, height, width, device=device)
    # Two routes of several sequences, padded in front and behind, that leave out the first column
    table = torch.full((2, height, width + 2), -1, device=device)
    table[:, :, 2:-1] = torch.arange(height * width, device=device).view(height, width)[:, 1:]
    return routes_from_table(table, height * width)


def _map_case(name: str, height: int, width: int, dim: int, rank: int, d_state: int, dtype: torch.dtype) -> Case:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    k, length = _routes(name, height, width, torch.device('cpu')).num_routes, height * width
    inputs = {
        'x': draw(2, length, dim),
        'x_dbl': draw(2, length, k, rank + 2 * d_state),
        'A': -torch.exp(0.5 * draw(k, dim, d_state)),
        'D': draw(k, dim),
        'dt_weight': draw(k, dim, rank) * rank**-0.5,
        'dt_bias': draw(k, dim) - 2,
    }

    def settings(device: torch.device) -> dict:
        return {'routes': _routes(name, height, width, device)}

    title = f'{name} {height}x{width}, D={dim}'
    return Case(title, dtype, d_state, inputs, route_scan, route_scan_reference, settings)


def _sequence_case(length: int, dim: int, d_state: int, dtype: torch.dtype, segment: int = 0) -> Case:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = {
        'u': draw(2, dim, length),
        'delta': draw(2, dim, length),
        'A': -torch.exp(0.5 * draw(dim, d_state)),
        'B': draw(2, 2, d_state, length),  # two groups of channels
        'C': draw(2, 2, d_state, length),
        'D': draw(dim),
        'delta_bias': draw(dim) - 2,
    }

    def reference(**kwargs) -> Tensor:
        return selective_scan_reference(**{**kwargs, 'segment': segment})[0]

    def settings(device: torch.device) -> dict:
        return {'delta_softplus': True, 'segment': segment or None}

    title = f'sequence of {length}, D={dim}' + (f', in segments of {segment}' if segment else '')
    return Case(title, dtype, d_state, inputs, selective_scan, reference, settings)


def all_cases() -> list[Case]:
    """Few combinations of dtype, D and N, each of which is compiled; the first map is large enough to be cut up."""
    return [
        _map_case('cross', 33, 31, 64, 4, 1, torch.float16),
        _map_case('forward_backward', 7, 9, 48, 3, 16, torch.bfloat16),
        _map_case('rotate', 1, 5, 48, 3, 16, torch.bfloat16),
        _map_case('padded', 5, 8, 48, 3, 16, torch.bfloat16),
        _map_case('bidi', 5, 7, 20, 3, 1, torch.float32),
        _map_case('cascade_rows', 13, 2, 20, 3, 1, torch.float32),
        _sequence_case(197, 24, 16, torch.float16),
        _sequence_case(50, 12, 1, torch.float32),
        _sequence_case(197, 24, 16, torch.float32, segment=8),
    ]


def _values(function: Callable[..., Tensor], inputs: dict[str, Tensor], settings: dict) -> dict[str, Tensor]:
    """The output and the gradients of all inputs, on the CPU in float64."""
    leaves = {name: v.detach().requires_grad_() for name, v in inputs.items()}
    y = function(**leaves, **settings)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()  # the same in every dtype
    grads = torch.autograd.grad(y, leaves.values(), dy.to(y))
    return {name: v.detach().cpu().double() for name, v in zip(('y', *leaves), (y, *grads))}


def examine(case: Case, backends: Sequence[str], device: torch.device) -> Iterator[Finding]:
    """Runs a case on the torch backend and on the others of `backends`."""
    inputs = case.inputs_on(device)
    exact = _values(
        case.reference, {k: v.cpu().double() for k, v in inputs.items()}, case.settings(torch.device('cpu'))
    )
    allowed = dict.fromkeys(exact, BOUND[case.dtype])
    for backend in ('torch', *(name for name in backends if name != 'torch')):
        try:
            got = _values(partial(case.operator, backend=backend), inputs, case.settings(device))
        except Exception as error:  # whatever a compiler or a driver raises
            yield Finding(case, backend, {}, allowed, f'{type(error).__name__}: {error}')
            continue
        errors = {k: ((got[k] - v).norm() / v.norm().clamp(min=1e-30)).item() for k, v in exact.items()}
        yield Finding(case, backend, errors, allowed)
        if backend == 'torch':
            factors = {k: OUTPUT_FACTOR if k == 'y' else GRADIENT_FACTOR for k in exact}
            allowed = {k: factors[k] * max(error, FLOOR[case.dtype]) for k, error in errors.items()}


def run_selftest(device: torch.device) -> bool:
    """Prints a table of all cases on all backends that the device has; whether everything was correct."""
    start = time.perf_counter()
    backends = [
        name
        for name, reason in available_backends(device).items()
        if reason is None and not (name == 'triton' and interpreted())  # which takes minutes, and tells of no device
    ]
    findings = [finding for case in all_cases() for finding in examine(case, backends, device)]
    columns = ('scan', 'N', 'dtype', 'backend', 'output', 'allowed', 'gradients', 'allowed', 'result')
    print_table(columns, map(_cells, findings), right=('N', 'output', 'allowed'))
    for finding in findings:
        if not finding.passed and finding.problem:
            print(f'{finding.backend}, {finding.case.name}: {finding.problem}', file=sys.stderr)
    ran = [finding for finding in findings if finding.result != 'not for it']
    correct = sum(finding.passed for finding in ran)
    seconds = time.perf_counter() - start
    print(f'{correct} of {len(ran)} correct, on {device.type}, in {seconds:.0f} s with compilation')
    return correct == len(ran)


def _cells(finding: Finding) -> list[str]:
    """A row of the table: the error of the output, and that of the gradient which is nearest to what is allowed."""
    case = finding.case
    labels = [case.name, str(case.d_state), str(case.dtype).removeprefix('torch.'), finding.backend]
    if finding.problem:
        return [*labels, '-', '-', '-', '-', finding.result]
    errors, allowed = dict(finding.errors), finding.allowed
    y = errors.pop('y')
    worst = max(errors, key=lambda name: errors[name] / allowed[name])
    return [
        *labels,
        f'{y:.1e}',
        f'{allowed["y"]:.1e}',
        f'd{worst} {errors[worst]:.1e}',
        f'{allowed[worst]:.1e}',
        finding.result,
    ]
