"""The token mixer over every named set of routes, and what each of them costs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vmzoo.layers import SS2D, scan_names
from vmzoo_kernels import get_routes, route_names
from vmzoo_kernels.reference import route_scan_reference


def mixer(**kwargs) -> SS2D:
    layer = SS2D(8, d_state=2, dt_rank=3, **kwargs).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return layer


def reference(layer: SS2D, x: torch.Tensor) -> torch.Tensor:
    """The layer with the definition of the scan, every route projecting the whole map."""
    u = layer.act(layer.conv2d(layer.in_proj(x).permute(0, 3, 1, 2))).flatten(2).mT  # [B, L, D]
    x_dbl = torch.einsum('bld,krd->blkr', u, layer.x_proj_weight)
    A_log, *parameters = layer.scan_parameters()
    y = route_scan_reference(u, x_dbl, -A_log.exp(), *parameters, get_routes(layer.scan, *x.shape[1:3]))
    return layer.out_proj(layer.out_norm(y)).unflatten(1, x.shape[1:3])


@pytest.mark.parametrize('scan', route_names())
@pytest.mark.parametrize('size', [(4, 6), (5, 7), (1, 3)], ids=str)
def test_equals_its_definition_along_all_routes(scan, size):
    layer = mixer(scan=scan)
    x = torch.randn(2, *size, 8, dtype=torch.float64, requires_grad=True)
    outputs = [f(x) for f in (layer, lambda x: reference(layer, x))]
    torch.testing.assert_close(*outputs)
    weight = torch.randn_like(outputs[0])
    leaves = [x, *layer.parameters()]
    torch.testing.assert_close(*([*torch.autograd.grad((y * weight).sum(), leaves)] for y in outputs))


def test_cascade_is_rows_then_columns_with_parameters_of_their_own():
    layer = mixer(scan='cascade')
    assert 'cascade' in scan_names() and layer.num_routes == len(layer.x_proj_weight) == 4
    assert mixer(scan='cascade_rows').num_routes == 2


def test_routes_that_share_the_map_out_project_and_scan_it_once():
    def flops(scan: str, size: int) -> int:
        layer, x = mixer(scan=scan), torch.randn(1, size, size, 8, dtype=torch.float64)
        outside = 2 * x.numel() * 16 * 2 + 2 * size * size * 16 * 9  # the projections at both ends, the convolution
        with FlopCounterMode(display=False) as counter:
            layer(x)
        return counter.get_total_flops() - outside

    assert flops('cross', 8) == 4 * flops('atrous', 8)
    assert flops('atrous', 7) == flops('atrous', 8)  # padded
