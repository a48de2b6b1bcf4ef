"""Routes: the orders in which a 2D selective scan visits the positions of an H×W map.

A route is a permutation of the L = H·W positions, or a partition of them into several sequences; positions are numbered
row-major (``p = h * W + w``). Operators take a set of K routes as two tables, so a new scan order never needs a new
kernel: it is a function here, or a table given to :func:`routes_from_table`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Routes(NamedTuple):
    """K routes of S sequences of T steps over a map of ``num_positions`` positions.

    Attributes:
        gather: [K, S, T] int32; the position read at each step, -1 for padding. A padded step is a zero token: it adds
            nothing to the state, which still decays by ``exp(softplus(dt_bias) * A)``, as when a published model pads
            its map with zeros.
        merge: [K, S, T] int32; the position that receives each step's output, -1 for nowhere. The same tensor as
            ``gather`` except for scans that put their outputs elsewhere than they read.
        num_positions: L.
        complete: whether every route reads and writes every position, exactly once each.
        parts: the map in K parts, if the routes share its positions out between them; None if a position is visited
            twice, or never. A scan of the parts needs no more projections than the map has positions, and takes every
            backend.
    """

    gather: Tensor
    merge: Tensor
    num_positions: int
    complete: bool
    parts: 'Parts | None' = None

    @property
    def num_routes(self) -> int:
        """K, the number of routes, each with its own projections and A, D, dt parameters."""
        return self.gather.shape[0]


class Parts(NamedTuple):
    """A map whose positions K routes share out between them, as K maps of S·T positions (see :func:`split_map`).

    Attributes:
        routes: K routes that visit the positions of their own part in order.
        writer: [L] int32; the step that writes each position of the map, counted over [S·T, K].
    """

    routes: Routes
    writer: Tensor


def _parts(gather: Tensor, merge: Tensor, num_positions: int) -> Parts:
    num_routes, sequences, steps = gather.shape
    order = torch.arange(merge.numel(), dtype=torch.int32, device=gather.device)
    table = order[: sequences * steps].view(1, sequences, steps).repeat(num_routes, 1, 1)
    written = merge.flatten(1).t().flatten()  # [S·T·K]
    writer = order.new_empty(num_positions + 1)
    writer.scatter_(0, torch.where(written < 0, num_positions, written).long(), order)  # the last takes the padding
    return Parts(Routes(table, table, sequences * steps, True), writer[:num_positions])


def _positions(height: int, width: int, device: torch.device) -> Tensor:
    return torch.arange(height * width, dtype=torch.int32, device=device).view(height, width)


def _permutations(*orders: Tensor) -> Routes:
    table = torch.stack([order.reshape(-1) for order in orders]).unsqueeze(1)  # [K, 1, L]
    return Routes(table, table, table.shape[-1], True)


def _cross(pos: Tensor) -> Routes:
    return _permutations(pos, pos.t(), pos.reshape(-1).flip(0), pos.t().reshape(-1).flip(0))


def _unidi(pos: Tensor) -> Routes:
    return _permutations(pos, pos, pos, pos)


def _bidi(pos: Tensor) -> Routes:
    backward = pos.reshape(-1).flip(0)
    return _permutations(pos, pos, backward, backward)


def _rotate(pos: Tensor) -> Routes:
    return _permutations(*(torch.rot90(pos, k) for k in range(4)))


def _forward(pos: Tensor) -> Routes:
    return _permutations(pos)


def _backward(pos: Tensor) -> Routes:
    return _permutations(pos.reshape(-1).flip(0))


def _forward_backward(pos: Tensor) -> Routes:
    return _permutations(pos, pos.reshape(-1).flip(0))


def _cascade(lines: Tensor) -> Routes:
    # The second direction reads every line backwards, but its outputs are stored as if it had read forwards: the
    # published cascade adds the two without turning the second one back.
    gather = torch.stack((lines, lines.flip(1)))  # [2, S, T]
    return Routes(gather, torch.stack((lines, lines)), lines.numel(), True)


def _cascade_rows(pos: Tensor) -> Routes:
    return _cascade(pos)


def _cascade_cols(pos: Tensor) -> Routes:
    return _cascade(pos.t())


def _atrous(pos: Tensor) -> Routes:
    height, width = pos.shape
    rows, columns = (height + 1) // 2, (width + 1) // 2
    pos = F.pad(pos, (0, 2 * columns - width, 0, 2 * rows - height), value=-1)
    cells = pos.unflatten(0, (rows, 2)).unflatten(2, (columns, 2)).permute(3, 1, 0, 2)  # [column, row, rows, columns]
    by_rows, by_columns = cells[:, 0].flatten(1), cells[:, 1].mT.flatten(1)  # [column, T]
    table = torch.stack((by_rows, by_columns), dim=1).flatten(0, 1).unsqueeze(1)  # [4, 1, T]
    return Routes(table, table, height * width, False, parts=_parts(table, table, height * width))


def _back_and_forth(first: Tensor, second: Tensor) -> Routes:
    first, second = first.reshape(-1), second.reshape(-1)
    return _permutations(first, first.flip(0), second, second.flip(0))


def _sorted_by(step: Tensor, pos: Tensor) -> Tensor:
    """The positions of a map in the order of `step`, a number for each."""
    return pos.reshape(-1)[step.reshape(-1).argsort()]


def _coordinates(pos: Tensor) -> tuple[Tensor, Tensor]:
    height, width = pos.shape
    return torch.arange(height, device=pos.device)[:, None], torch.arange(width, device=pos.device)


def _raster(pos: Tensor) -> Routes:
    return _back_and_forth(pos, pos.t())


def _turning(lines: Tensor) -> Tensor:
    number, _ = _coordinates(lines)
    return torch.where(number % 2 == 0, lines, lines.flip(1))


def _serpentine(pos: Tensor) -> Routes:
    return _back_and_forth(_turning(pos), _turning(pos.t()))


def _diagonal(pos: Tensor) -> Routes:
    row, column = _coordinates(pos)
    number = row + column
    height = pos.shape[0]
    step = number * height + torch.where(number % 2 == 0, height - 1 - row, row)
    return _back_and_forth(_sorted_by(step, pos), _sorted_by(step, pos.flip(1)))


def _spiral(pos: Tensor) -> Routes:
    height, width = pos.shape
    row, column = _coordinates(pos)
    ring = torch.minimum(torch.minimum(row, height - 1 - row), torch.minimum(column, width - 1 - column))
    rows, columns = height - 2 * ring, width - 2 * ring  # of the ring and what is inside
    down, right = row - ring, column - ring  # from its corner
    on_edges = torch.where(down == rows - 1, 2 * columns + rows - 3 - right, 2 * (columns + rows - 2) - down)
    on_edges = torch.where(right == columns - 1, columns - 1 + down, on_edges)
    on_edges = torch.where(down == 0, right, on_edges)  # top, right, bottom, left: of a single line only the first
    step = height * width - rows * columns + on_edges
    return _back_and_forth(_sorted_by(step, pos), _sorted_by(step, pos.flip(0)))


def _heads(number: int, pos: Tensor) -> Routes:
    sets = [build(pos) for build in (_serpentine, _diagonal, _spiral, _raster)[:number]]
    table = torch.cat([routes.gather for routes in sets])
    return Routes(table, table, pos.numel(), True)


_BUILDERS: dict[str, Callable[[Tensor], Routes]] = {
    'cross': _cross,
    'unidi': _unidi,
    'bidi': _bidi,
    'rotate': _rotate,
    'forward': _forward,
    'backward': _backward,
    'forward_backward': _forward_backward,
    'cascade_rows': _cascade_rows,
    'cascade_cols': _cascade_cols,
    'atrous': _atrous,
    'raster': _raster,
    'serpentine': _serpentine,
    'diagonal': _diagonal,
    'spiral': _spiral,
    'heads_3': functools.partial(_heads, 3),
    'heads_4': functools.partial(_heads, 4),
}


def route_names() -> list[str]:
    """Names that :func:`get_routes` accepts."""
    return sorted(_BUILDERS)


@functools.lru_cache(maxsize=512)
def _cached(name: str, height: int, width: int, device: torch.device) -> Routes:
    with torch.inference_mode(False):  # an inference tensor could not be used for training later
        return _BUILDERS[name](_positions(height, width, device))


def cacheable(device: torch.device) -> bool:
    """Whether a table made now may be kept: one made under tracing, a fake-tensor mode or graph capture may not."""
    if torch.compiler.is_compiling() or type(torch.empty(0, device=device)) is not Tensor:
        return False
    return device.type != 'cuda' or not torch.cuda.is_current_stream_capturing()


# Routes found by sorting, and how many they are. Compilers see them as one operation: their steps are many, each block
# of a model has them anew, and compiled code would sort at every call.
_SORTED = {'diagonal': 4, 'spiral': 4, 'heads_3': 12, 'heads_4': 16}


@torch.library.custom_op('vmzoo::route_table', mutates_args=())
def _route_table(name: str, height: int, width: int, device: torch.device) -> Tensor:
    return get_routes(name, height, width, device).gather.clone()  # a compiler may write to it later


@_route_table.register_fake
def _(name: str, height: int, width: int, device: torch.device) -> Tensor:
    return torch.empty(_SORTED[name], 1, height * width, dtype=torch.int32, device=device)


def get_routes(name: str, height: int, width: int, device: torch.device | str | None = None) -> Routes:
    """The named routes over a map of the given size.

    ``cross`` (row-major, column-major and both reversed), ``unidi`` (row-major four times), ``bidi`` (row-major twice,
    reversed twice) and ``rotate`` (the map turned by 0, 90, 180 and 270 degrees) are the four scan modes of VMamba
    (arXiv 2401.10166); ``cascade_rows`` and ``cascade_cols`` are the two halves of its cascaded scan, one sequence a
    row or column. ``forward`` and ``backward`` are the row-major order and its reverse, ``forward_backward`` both (Vim,
    arXiv 2401.09417). ``atrous`` is EfficientVMamba's scan with skipped positions (arXiv 2403.09977): each of four
    routes visits one pixel of every 2x2 cell, (0, 0), (1, 0), (0, 1) or (1, 1), the second and the fourth column by
    column; at an odd side the cells are padded. ``serpentine``, ``diagonal``, ``spiral`` and ``raster`` are the scans
    of MHS-VM's heads (arXiv 2406.05992), each two orders, both followed by their reverse: rows and columns that turn at
    their ends; anti-diagonals that do, from the left and the right upper corner; spirals inwards, clockwise from the
    left upper and counter-clockwise from the left lower corner; rows and columns.
    ``heads_3`` and ``heads_4`` are the first three and all four of these sets, one after another.

    Args:
        name: One of :func:`route_names`.
        height: Rows of the map, at least 1.
        width: Columns of the map, at least 1.
        device: Where the tables live.

    Returns:
        Tables, shared between calls: do not write to them.

    Raises:
        ValueError: Unknown name, or an empty map.
    """
    if name not in _BUILDERS:
        raise ValueError(f'unknown routes {name!r}; choose from {", ".join(route_names())}')
    if height < 1 or width < 1:
        raise ValueError(f'routes need a map of at least 1x1 positions, got {height}x{width}')
    device = torch.device(device if device is not None else 'cpu')
    if name in _SORTED and torch.compiler.is_compiling():
        table = _route_table(name, height, width, device)
        return Routes(table, table, height * width, True)
    if not cacheable(device):
        return _BUILDERS[name](_positions(height, width, device))
    if device.type == 'cuda' and device.index is None:  # of several GPUs, the current one
        device = torch.device('cuda', torch.cuda.current_device())
    return _cached(name, height, width, device)


def routes_from_table(gather: Tensor, num_positions: int, merge: Tensor | None = None) -> Routes:
    """Routes from position tables, checked.

    Args:
        gather: [K, S, T] or [K, T] integer positions in ``[0, num_positions)``, or -1 for padding.
        num_positions: L, the number of positions of the map.
        merge: Where outputs go, same shape; default: where they were read.

    Returns:
        The routes, with int32 tables.

    Raises:
        ValueError: Wrong shape, a position out of range, or one that a route reads or writes twice.
    """
    merge = gather if merge is None else merge
    if gather.ndim == 2:
        gather, merge = gather.unsqueeze(1), merge.unsqueeze(1)
    if gather.ndim != 3 or gather.shape != merge.shape or gather.is_floating_point():
        raise ValueError(
            f'a route table is [K, S, T] integers, the same for gather and merge; '
            f'got {tuple(gather.shape)} {gather.dtype} and {tuple(merge.shape)} {merge.dtype}'
        )
    for name, table in (('gather', gather), ('merge', merge)):
        if table.min() < -1 or table.max() >= num_positions:
            raise ValueError(
                f'{name} table holds positions from {int(table.min())} to {int(table.max())}; '
                f'allowed are 0 to {num_positions - 1}, and -1 for padding'
            )
    complete = True
    for verb, table in (('reads', gather), ('writes', merge)):
        for k, row in enumerate(table.flatten(1)):
            count = torch.bincount(row[row >= 0].long(), minlength=num_positions)
            if count.max() > 1:
                raise ValueError(f'route {k} {verb} position {int(count.argmax())} {int(count.max())} times')
            complete = complete and bool((count == 1).all()) and row.numel() == num_positions
    tables = (gather.to(torch.int32).contiguous(), merge.to(torch.int32).contiguous())
    shared_out = all(bool((v[v >= 0].bincount(minlength=num_positions) == 1).all()) for v in tables)
    return Routes(*tables, num_positions, complete, _parts(*tables, num_positions) if shared_out else None)


def gather_routes(x: Tensor, routes: Routes) -> Tensor:
    """The positions of a map in the order of each route.

    Args:
        x: [B, L, D], or [B, L, K, D] where each route has its own values.
        routes: K routes over L positions.

    Returns:
        [B, K, S, T, D]; zeros where a route is padded.
    """
    k, s, t = routes.gather.shape
    index = routes.gather.flatten(1).long()  # [K, S*T]
    safe = index.clamp(min=0)
    if x.ndim == 3:
        out = x[:, safe]  # [B, K, S*T, D]
    else:
        out = x[:, safe, torch.arange(k, device=x.device)[:, None]]
    if not routes.complete:
        out = out.masked_fill((index < 0).unsqueeze(-1), 0.0)
    return out.unflatten(2, (s, t))


def merge_routes(y: Tensor, routes: Routes, reduce: bool = True) -> Tensor:
    """Put each route's values back to their positions: the inverse of :func:`gather_routes`.

    Args:
        y: [B, K, S, T, D].
        routes: K routes over L positions.
        reduce: Sum over the routes.

    Returns:
        [B, L, D] summed over routes, or [B, L, K, D]; zeros where no route writes.
    """
    index = routes.merge.flatten(1).long()  # [K, S*T]
    y = y.flatten(2, 3)  # [B, K, S*T, D]
    if not routes.complete:
        y = y.masked_fill((index < 0).unsqueeze(-1), 0.0)
    index = index.clamp(min=0)[None, :, :, None].expand(y.shape)
    out = y.new_zeros(y.shape[0], y.shape[1], routes.num_positions, y.shape[3]).scatter_add(2, index, y)
    return out.sum(1) if reduce else out.transpose(1, 2)


def split_map(x: Tensor, routes: Routes) -> Tensor:
    """The part of each route, in its order, of a map that the routes share out (those with ``parts``).

    Args:
        x: [B, L, D].
        routes: K routes over L positions.

    Returns:
        [B, S·T, K, D]; zeros where a route is padded.
    """
    index = routes.gather.flatten(1).t().flatten()
    out = x.index_select(1, index.clamp(min=0))
    if torch.compiler.is_compiling() or len(index) > routes.num_positions:  # compiled code is for any size
        out = out.masked_fill((index < 0).unsqueeze(-1), 0.0)
    return out.unflatten(1, (-1, routes.num_routes))


def join_map(y: Tensor, routes: Routes) -> Tensor:
    """The map of which each route has a part: the inverse of :func:`split_map`, by the routes' ``merge`` table.

    Args:
        y: [B, S·T, K, D].
        routes: K routes over L positions.

    Returns:
        [B, L, D].
    """
    return y.flatten(1, 2).index_select(1, routes.parts.writer)
