"""SS2D: the 2D selective scan of VMamba (https://arxiv.org/abs/2401.10166), and its Mamba-2 sibling, as token mixers.

Both work on channels-last maps [B, H, W, C]. The projections to step sizes, B and C are pointwise, so they are one
matrix product on the map itself, before any reordering; the routes exist only inside the fused scan.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmzoo_kernels import Routes, get_routes, join_map, projected_scan, route_names, route_scan, split_map
from vmzoo_kernels.layer_norm import layer_norm

from .linear import Linear, grouped_linear, linear
from .norm import LayerNorm
from .ssm_init import auto_dt_rank, compute_dtype, init_A_log_, init_dt_bias_, init_dt_weight_, init_linear_weight_

# Scans that are more than one pass over the map, each along the next routes and with the next sets of parameters.
_PASSES = {'cascade': ('cascade_rows', 'cascade_cols')}


def scan_names() -> list[str]:
    """Scans that the mixers know: every named set of routes (`vmzoo_kernels.get_routes`), and 'cascade'."""
    return sorted({*route_names(), *_PASSES})


class SS2D(nn.Module):
    """2D selective scan (S6) along K routes, each with its own projections; the outputs are summed.

    in_proj -> depthwise conv -> activation -> scan -> norm -> (gate) -> out_proj. Inner width D is
    `int(ssm_ratio * dim)`; parameter names and shapes are those of the published checkpoints.

    Args:
        dim: Channels C of input and output.
        d_state: State size N of each channel.
        ssm_ratio: Inner width over `dim`.
        dt_rank: Rank R of the step projection; 'auto' is ceil(dim / 16).
        kernel_size: Of the depthwise convolution, odd; 0 leaves it out.
        conv_bias: Bias of the depthwise convolution.
        act_layer: Activation after the convolution, and of the gate.
        gate: Multiply the output with a second projection of the input.
        gate_act: Put that projection through `act_layer` first.
        out_norm: LayerNorm on the scan's output.
        out_act_layer: Activation after that norm.
        scan: Order in which the map is visited, one of `scan_names()`. 'cross' is VMamba's; 'unidi', 'bidi' and
            'rotate' are its ablations, all of four routes; 'cascade' scans rows, then columns of the result; 'atrous'
            gives each of four routes a quarter of the map.

    Raises:
        ValueError: Unknown scan, an even kernel, or an inner width or state size below one.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 1,
        ssm_ratio: float = 2.0,
        dt_rank: int | str = 'auto',
        kernel_size: int = 3,
        conv_bias: bool = False,
        act_layer: type[nn.Module] = nn.SiLU,
        gate: bool = False,
        gate_act: bool = True,
        out_norm: bool = True,
        out_act_layer: type[nn.Module] | None = None,
        scan: str = 'cross',
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if scan not in scan_names():
            raise ValueError(f'Unknown scan {scan!r}; choose from {", ".join(scan_names())}.')
        if kernel_size and kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be odd, or 0 for no convolution, got {kernel_size}.')
        if d_state < 1:
            raise ValueError(f'd_state must be at least 1, got {d_state}.')
        self.scan = scan
        self.passes = _PASSES.get(scan, (scan,))
        self.num_routes = sum(get_routes(name, 1, 1).num_routes for name in self.passes)
        self.d_state = d_state
        self.dt_rank = auto_dt_rank(dim, dt_rank)
        self.d_inner = d_inner = int(ssm_ratio * dim)
        if d_inner < 1:
            raise ValueError(f'ssm_ratio {ssm_ratio} leaves no inner channel for dim {dim}.')

        self._build_scan_parameters(dd)
        self.in_proj = self._build_projection(dim, d_inner * (2 if gate else 1), dd)
        self.conv2d = (
            nn.Conv2d(d_inner, d_inner, kernel_size, padding=kernel_size // 2, groups=d_inner, bias=conv_bias, **dd)
            if kernel_size
            else nn.Identity()
        )
        self.act = act_layer()
        self.gate_act = (act_layer() if gate_act else nn.Identity()) if gate else None
        self.out_norm = LayerNorm(d_inner, **dd) if out_norm else nn.Identity()
        self.out_act = out_act_layer() if out_act_layer is not None else nn.Identity()
        self.out_proj = self._build_projection(d_inner, dim, dd)
        self.reset_parameters()

    def _build_projection(self, in_features: int, out_features: int, dd: dict) -> nn.Module:
        return Linear(in_features, out_features, bias=False, **dd)

    def _build_scan_parameters(self, dd: dict) -> None:
        k, d, n, r = self.num_routes, self.d_inner, self.d_state, self.dt_rank
        self.x_proj_weight = nn.Parameter(torch.empty(k, r + 2 * n, d, **dd))
        self.dt_projs_weight = nn.Parameter(torch.empty(k, d, r, **dd))
        self.dt_projs_bias = nn.Parameter(torch.empty(k, d, **dd))
        self.A_logs = nn.Parameter(torch.empty(k * d, n, **dd))  # route-major
        self.Ds = nn.Parameter(torch.empty(k * d, **dd))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the scan's own parameters; sub-modules have their own method."""
        init_linear_weight_(self.x_proj_weight)
        init_dt_weight_(self.dt_projs_weight)
        init_dt_bias_(self.dt_projs_bias)
        init_A_log_(self.A_logs)
        nn.init.ones_(self.Ds)

    def scan_parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A_log [K, D, N], D [K, D], dt_weight [K, D, R] and dt_bias [K, D]; all but dt_weight in at least float32."""
        k, dtype = self.num_routes, compute_dtype(self.A_logs.dtype)
        A_log, D = self.A_logs.to(dtype).view(k, -1, self.d_state), self.Ds.to(dtype).view(k, -1)
        return A_log, D, self.dt_projs_weight, self.dt_projs_bias.to(dtype)

    def _scan_map(self, x: Tensor, height: int, width: int) -> Tensor:
        # x [B, L, D] -> [B, L, D]
        routes = [get_routes(name, height, width, device=x.device) for name in self.passes]
        parameters = (self.x_proj_weight, *self.scan_parameters())
        if len(routes) == 1:
            return self._scan_pass(x, routes[0], *parameters)
        y = x
        for i, route in enumerate(routes):
            y = layer_norm(y, out_dtype=x.dtype)
            k = route.num_routes
            y = self._scan_pass(y, route, *(p[i * k : (i + 1) * k] for p in parameters))
        return y

    @staticmethod
    def _scan_pass(
        x: Tensor,
        routes: Routes,
        x_proj_weight: Tensor,
        A_log: Tensor,
        D: Tensor,
        dt_weight: Tensor,
        dt_bias: Tensor,
    ) -> Tensor:
        # x [B, L, D] -> [B, L, D], summed over routes; or [B, L, K, D], one map a route -> [B, L, K, D]. float32 for
        # float16 input: the sum over routes overflows float16
        out_dtype = torch.float32 if x.dtype == torch.float16 else None
        parameters = (D, dt_weight, dt_bias)
        if x.ndim == 4:
            x_dbl = SS2D._project_steps(x, x_proj_weight)
            return route_scan(x, x_dbl, -torch.exp(A_log), *parameters, routes, merge=False, out_dtype=out_dtype)
        if routes.parts is not None:
            return join_map(
                SS2D._scan_pass(split_map(x, routes), routes.parts.routes, x_proj_weight, A_log, *parameters), routes
            )
        if x.is_cuda:
            return projected_scan(x, x_proj_weight, A_log, *parameters, routes, out_dtype=out_dtype)
        x_dbl = SS2D._project_steps(x, x_proj_weight)
        return route_scan(x, x_dbl, -torch.exp(A_log), *parameters, routes, out_dtype=out_dtype)

    @staticmethod
    def _project_steps(x: Tensor, x_proj_weight: Tensor) -> Tensor:
        # [B, L, D], or [B, L, K, D] -> [B, L, K, >= R + 2N]
        if x.is_cuda:  # rows of a multiple of 16 bytes
            x_proj_weight = F.pad(x_proj_weight, (0, 0, 0, -x_proj_weight.shape[1] % 8))
        if x.ndim == 4:
            return grouped_linear(x, x_proj_weight)
        return linear(x, x_proj_weight.flatten(0, 1)).unflatten(-1, x_proj_weight.shape[:2])

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map [B, H, W, C] of any size into one of the same shape."""
        _, height, width, _ = x.shape
        x = self.in_proj(x)
        z = None
        if self.gate_act is not None:
            x, z = x.chunk(2, dim=-1)
            z = self.gate_act(z)
        x = self.act(self.mix_locally(x)).flatten(1, 2)  # [B, L, D]
        y = self._scan_map(x, height, width)
        y = self.out_act(self.out_norm(y).to(x.dtype)).unflatten(1, (height, width))
        if z is not None:
            y = y * z
        return self.project_out(y)

    def mix_locally(self, x: Tensor) -> Tensor:
        """[B, H, W, D] -> [B, H, W, D], before activation and scan."""
        return self.conv2d(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # a channels_last view: no copy

    def project_out(self, y: Tensor) -> Tensor:
        """[B, H, W, D] -> [B, H, W, C], the last step of `forward`."""
        return self.out_proj(y)


class SSD2D(SS2D):
    """SS2D with Mamba-2's state-space duality (https://arxiv.org/abs/2405.21060): R heads of D / R channels a route.

    A head has one step size and one decay for all its channels and states, so this is the same scan with shared
    parameters. Arguments are those of `SS2D`; `dt_rank` is the number of heads and must divide the inner width.
    """

    def _build_scan_parameters(self, dd: dict) -> None:
        k, d, n, r = self.num_routes, self.d_inner, self.d_state, self.dt_rank
        if d % r:
            raise ValueError(f'The inner width {d} must be a multiple of the number of heads (dt_rank) {r}.')
        self.x_proj_weight = nn.Parameter(torch.empty(k, r + 2 * n, d, **dd))
        self.dt_projs_bias = nn.Parameter(torch.empty(k, r, **dd))
        self.A_logs = nn.Parameter(torch.empty(k, r, **dd))
        self.Ds = nn.Parameter(torch.empty(k, r, d // r, **dd))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the scan's own parameters; sub-modules have their own method."""
        init_linear_weight_(self.x_proj_weight)
        nn.init.uniform_(self.dt_projs_bias, 0.0, 0.1)
        nn.init.zeros_(self.A_logs)
        nn.init.ones_(self.Ds)

    def scan_parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As in `SS2D`, with every head's step and decay repeated for its channels."""
        d, r, dtype = self.d_inner, self.dt_rank, compute_dtype(self.A_logs.dtype)
        A_log = self.A_logs.to(dtype).repeat_interleave(d // r, dim=1)  # [K, D]
        head = torch.eye(r, device=A_log.device, dtype=self.x_proj_weight.dtype).repeat_interleave(
            d // r, dim=0
        )  # [D, R]
        dt_bias = self.dt_projs_bias.to(dtype).repeat_interleave(d // r, dim=1)
        return (
            A_log.unsqueeze(-1).expand(-1, -1, self.d_state),
            self.Ds.to(dtype).flatten(1),
            head.expand(self.num_routes, -1, -1),
            dt_bias,
        )
