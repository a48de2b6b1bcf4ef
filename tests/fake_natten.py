"""A stand-in for NATTEN 0.17: its two functions by their definition, slowly, and a record of the calls."""

import itertools
import sys
import types

import torch
from torch import Tensor


def window(position: int, size: int, kernel_size: int, dilation: int) -> list[int]:
    """The positions that one position of an axis attends to, from the definition."""
    members = list(range(position % dilation, size, dilation))
    start = min(max(members.index(position) - kernel_size // 2, 0), len(members) - kernel_size)
    return members[start : start + kernel_size]


def pairs(height: int, width: int, kernel_size: int, dilation: tuple[int, int]):
    """Every position (row, column), and each place in its window with the position there."""
    for h, w in itertools.product(range(height), range(width)):
        rows, columns = window(h, height, kernel_size, dilation[0]), window(w, width, kernel_size, dilation[1])
        for place, (y, x) in enumerate(itertools.product(rows, columns)):
            yield h, w, place, y, x


def na2d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size,
    dilation=1,
    additional_keys=None,
    is_causal=False,
    rpb: Tensor | None = None,
) -> Tensor:
    height, width = query.shape[2:4]
    scores = [[[None] * kernel_size**2 for _ in range(width)] for _ in range(height)]
    for h, w, place, y, x in pairs(height, width, kernel_size, dilation):
        scores[h][w][place] = (query[:, :, h, w] * key[:, :, y, x]).sum(-1)
        if rpb is not None:
            dy, dx = (y - h) // dilation[0], (x - w) // dilation[1]
            scores[h][w][place] = scores[h][w][place] + rpb[:, dy + kernel_size - 1, dx + kernel_size - 1]
    return torch.stack([torch.stack([torch.stack(row, -1) for row in line], 2) for line in scores], 2)


def na2d_av(attn: Tensor, value: Tensor, kernel_size, dilation=1, additional_values=None, is_causal=False) -> Tensor:
    height, width = value.shape[2:4]
    out = [[0] * width for _ in range(height)]
    for h, w, place, y, x in pairs(height, width, kernel_size, dilation):
        out[h][w] = out[h][w] + attn[:, :, h, w, place, None] * value[:, :, y, x]
    return torch.stack([torch.stack(line, 2) for line in out], 2)


def install(monkeypatch, version: str = '0.17.5', **functions) -> list[str]:
    """Makes `import natten` find this, or other functions; returns the names of its functions as they are called."""
    calls = []

    def recorded(name, function):
        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        call.__wrapped__ = function  # keeps the signature
        return call

    functions = functions or {'na2d_qk': na2d_qk, 'na2d_av': na2d_av}
    package, functional = types.ModuleType('natten'), types.ModuleType('natten.functional')
    package.__version__, package.functional = version, functional
    for name, function in functions.items():
        setattr(functional, name, recorded(name, function))
    monkeypatch.setitem(sys.modules, 'natten', package)
    monkeypatch.setitem(sys.modules, 'natten.functional', functional)
    return calls
