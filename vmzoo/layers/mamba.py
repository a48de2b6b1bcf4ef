"""Mamba-1 token mixers over sequences: one global scan, or one along each of several orders of the tokens."""

from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from vmzoo_kernels import Routes, get_routes, route_scan

from .linear import Linear, SwiGlu
from .norm import LayerNorm, RMSNorm
from .ssm_init import auto_dt_rank, compute_dtype, init_A_log_, init_dt_bias_, init_dt_weight_

Scan = Literal['forward', 'backward', 'forward_backward', 'cross']

# endings of the parameters' names, one a path; the second half of the paths reverses the first
_SUFFIXES = {'forward': ('',), 'backward': ('',), 'forward_backward': ('', '_b'), 'cross': ('', '_c', '_b', '_c_b')}


class TokenPaths(NamedTuple):
    """K paths on which a mixer runs over L tokens.

    Attributes:
        orders: Different orders of the tokens: [L], the token at each place; None where tokens stay.
        order_of: Per path, the index of its order.
        reverse: Per path, whether it runs from the last place to the first.
        routes: The same for the scan, which reads tokens by place and writes them back to where they came from.
    """

    orders: tuple[Tensor | None, ...]
    order_of: tuple[int, ...]
    reverse: tuple[bool, ...]
    routes: Routes


def make_paths(
    orders: tuple[Tensor | None, ...],
    order_of: tuple[int, ...],
    reverse: tuple[bool, ...],
    length: int,
    device: torch.device,
) -> TokenPaths:
    """Paths over `length` tokens, with the arguments of :class:`TokenPaths`."""
    places = torch.arange(length, dtype=torch.int32, device=device)
    tokens = [places if order is None else order.to(torch.int32) for order in orders]
    gather = torch.stack([places.flip(0) if back else places for back in reverse])
    merge = torch.stack([tokens[i].flip(0) if back else tokens[i] for i, back in zip(order_of, reverse)])
    routes = Routes(gather.unsqueeze(1), merge.unsqueeze(1), length, True)
    return TokenPaths(orders, order_of, reverse, routes)


def token_paths(scan: Scan, length: int, device: torch.device, columns: Tensor | None = None) -> TokenPaths:
    """The paths of a :class:`MambaMixer` over `length` tokens.

    Args:
        scan: The mixer's.
        length: Number of tokens L.
        device: Where the tokens are.
        columns: [L], the tokens in column-major order; 'cross' needs it, see :func:`.tokens.column_order`.

    Raises:
        ValueError: 'cross' without `columns`.
    """
    if scan != 'cross':
        reverse = {'forward': (False,), 'backward': (True,)}.get(scan, (False, True))
        return TokenPaths((None,), (0,) * len(reverse), reverse, get_routes(scan, 1, length, device=device))
    if columns is None:
        raise ValueError("A 'cross' scan over tokens needs their column-major order: pass columns.")
    return make_paths((None, columns), (0, 1, 0, 1), (False, False, True, True), length, device)


def shuffle_paths(paths: TokenPaths, order: Tensor) -> TokenPaths:
    """The same paths over the tokens in another order [L], with outputs back in their own."""
    orders = tuple(order if inner is None else order[inner] for inner in paths.orders)
    merge = order.to(torch.int32)[paths.routes.merge.long()]
    return paths._replace(orders=orders, routes=paths.routes._replace(merge=merge, parts=None))


def _some_routes(routes: Routes, some: list[int]) -> Routes:
    return routes._replace(gather=routes.gather[some], merge=routes.merge[some], parts=None)


def causal_conv(x: Tensor, conv: nn.Conv1d, reverse: bool = False) -> Tensor:
    """Depthwise convolution that sees a token and those before it (after it, if `reverse`): [B, L, d] -> same."""
    weight, length, pad = conv.weight.unsqueeze(2), x.shape[1], conv.kernel_size[0] - 1
    # as a map of one row, [B, L, d] is a channels-last image: the 2D convolution needs no copy
    x = x.transpose(1, 2).unsqueeze(2)  # [B, d, 1, L]
    x = F.conv2d(x, weight.flip(-1) if reverse else weight, conv.bias, padding=(0, pad), groups=conv.groups)
    return x.squeeze(2).transpose(1, 2).narrow(1, pad if reverse else 0, length)


class MambaMixer(nn.Module):
    """Mamba-1 token mixer over a sequence, along one or several paths, each with parameters of its own.

    in_proj -> per path: causal depthwise conv, SiLU, scan -> sum -> gate -> out_proj. Inner width d is
    `int(expand * dim)`; parameter names and shapes are those of Vim's published checkpoints (arXiv 2401.09417), with
    endings `_b` for the reverse, `_c` for the columns, `_c_b` for their reverse.

    Args:
        dim: Token channels D.
        d_state: State size N of each inner channel.
        d_conv: Kernel of the causal convolution.
        expand: Inner width over `dim`.
        dt_rank: Rank R of the step projection; 'auto' is ceil(dim / 16).
        scan: 'forward', 'backward', 'forward_backward', or 'cross' for the last along rows and along columns.
        average: Divide the sum of the paths by their number.
        segment: Also scan every segment of so many tokens against the direction of its path, with the same parameters
            ('auto': by the number of tokens), as :func:`vmzoo_kernels.selective_scan` describes. In a mixer with paths
            both ways only those that run forwards do.

    Raises:
        ValueError: Unknown scan, or no inner channel or state.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2.0,
        dt_rank: int | str = 'auto',
        scan: Scan = 'forward_backward',
        average: bool = True,
        segment: int | Literal['auto'] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if scan not in get_args(Scan):
            raise ValueError(f'scan must be one of {", ".join(get_args(Scan))}, got {scan!r}.')
        d_inner = int(expand * dim)
        if min(d_inner, d_state) < 1:
            raise ValueError(f'A scan needs inner channels and states, got expand={expand} and d_state={d_state}.')
        self.dt_rank = auto_dt_rank(dim, dt_rank)
        self.scan = scan
        self.suffixes = _SUFFIXES[scan]
        self.scale = 1.0 / len(self.suffixes) if average else 1.0
        self.segment = segment

        for suffix in sorted(self.suffixes):
            setattr(self, f'A{suffix}_log', nn.Parameter(torch.empty(d_inner, d_state, **dd)))
            setattr(self, f'D{suffix}', nn.Parameter(torch.empty(d_inner, **dd)))
        self.in_proj = Linear(dim, 2 * d_inner, bias=False, **dd)
        for suffix in sorted(self.suffixes):
            setattr(self, f'conv1d{suffix}', nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, **dd))
            setattr(self, f'x_proj{suffix}', Linear(d_inner, self.dt_rank + 2 * d_state, bias=False, **dd))
            setattr(self, f'dt_proj{suffix}', Linear(self.dt_rank, d_inner, **dd))
        self.out_proj = Linear(d_inner, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as published; but for the first path, step projections are ordinary Linears with zero bias."""
        for module in self.children():
            module.reset_parameters()
        for suffix in self.suffixes:
            init_A_log_(getattr(self, f'A{suffix}_log'))
            nn.init.ones_(getattr(self, f'D{suffix}'))
            nn.init.zeros_(getattr(self, f'dt_proj{suffix}').bias)
        init_dt_weight_(self.dt_proj.weight)
        init_dt_bias_(self.dt_proj.bias)

    def _of_paths(self, name: str) -> list[nn.Module | Tensor]:
        return [getattr(self, name.format(suffix)) for suffix in self.suffixes]

    def scan_paths(self, x: Tensor, paths: TokenPaths, merge: bool = True) -> Tensor:
        """Convolution and scan along every path.

        Args:
            x: Tokens [B, L, d].
            paths: As many as the mixer has sets of parameters.
            merge: Sum over the paths.

        Returns:
            [B, L, d] (or [B, L, K, d] if not `merge`), in the order of `x`.
        """
        ordered = [x if order is None else x[:, order] for order in paths.orders]
        convs = self._of_paths('conv1d{}')
        xs = [causal_conv(ordered[i], conv, back) for i, back, conv in zip(paths.order_of, paths.reverse, convs)]
        x = F.silu(torch.stack(xs, dim=2))  # [B, L, K, d]
        if len(set(self.suffixes)) == 1:
            x_dbl = self.x_proj(x)  # [B, L, K, R + 2N]
        else:
            x_dbl = torch.stack([proj(x[:, :, k]) for k, proj in enumerate(self._of_paths('x_proj{}'))], dim=2)
        A_log = torch.stack(self._of_paths('A{}_log'))
        dt_projections = self._of_paths('dt_proj{}')
        parameters = (
            -torch.exp(A_log.to(compute_dtype(A_log.dtype))),
            torch.stack(self._of_paths('D{}')),
            torch.stack([proj.weight for proj in dt_projections]),
            torch.stack([proj.bias for proj in dt_projections]),
        )
        if self.segment is None or len(set(paths.reverse)) == 1:
            return route_scan(x, x_dbl, *parameters, paths.routes, merge=merge, segment=self.segment)
        ways = [[k for k, back in enumerate(paths.reverse) if back == way] for way in (False, True)]
        ys = [
            route_scan(
                x[:, :, way],
                x_dbl[:, :, way],
                *(v[way] for v in parameters),
                _some_routes(paths.routes, way),
                merge=merge,
                segment=segment,
            )
            for way, segment in zip(ways, (self.segment, None))
        ]
        if merge:
            return ys[0] + ys[1]
        order = ways[0] + ways[1]
        return torch.cat(ys, dim=2)[:, :, [order.index(k) for k in range(len(order))]]

    def forward(self, x: Tensor, paths: TokenPaths | None = None) -> Tensor:
        """Tokens [B, L, D] -> [B, L, D]; `paths` are the mixer's :func:`token_paths` or a shuffle of them."""
        if paths is None:
            paths = token_paths(self.scan, x.shape[1], x.device)
        x, z = self.in_proj(x).chunk(2, dim=-1)  # [B, L, d] each
        # all paths have the same gate at a token, so it is applied to their sum
        return self.out_proj(self.scan_paths(x, paths) * (F.silu(z) * self.scale))


class VimBlock(nn.Module):
    """Pre-norm residual block around a :class:`MambaMixer` (extra arguments are its own)."""

    def __init__(
        self,
        dim: int,
        drop_path: float = 0.0,
        norm_layer: type[nn.Module] = RMSNorm,
        device=None,
        dtype=None,
        **mixer_args: Any,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.mixer = MambaMixer(dim, **mixer_args, **dd)
        self.norm = norm_layer(dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, paths: TokenPaths | None = None) -> tuple[Tensor, Tensor]:
        """Stream [B, L, D] -> the stream after the block, and the mixer's output alone."""
        mixed = self.mixer(self.norm(x), paths)
        return x + self.drop_path(mixed), mixed


class MambaMlpBlock(nn.Module):
    """Pre-norm residual block: a :class:`MambaMixer` (extra arguments are its own), then a SwiGLU MLP.

    Args:
        dim: Token channels D; the MLP is 8 D / 3 wide.
        drop_path: Stochastic depth rate of both branches.
    """

    def __init__(self, dim: int, drop_path: float = 0.0, device=None, dtype=None, **mixer_args: Any):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.mixer = MambaMixer(dim, **mixer_args, **dd)
        self.mlp = SwiGlu(dim, 8 * dim // 3, **dd)
        self.norm1 = LayerNorm(dim, **dd)
        self.norm2 = LayerNorm(dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, paths: TokenPaths | None = None) -> tuple[Tensor, Tensor]:
        """Stream [B, L, D] -> the stream after the block, and the MLP's output alone."""
        x = x + self.drop_path(self.mixer(self.norm1(x), paths))
        out = self.mlp(self.norm2(x))
        return x + self.drop_path(out), out
