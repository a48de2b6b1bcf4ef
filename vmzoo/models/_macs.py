"""Multiply-accumulates of a model, as papers state them."""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import vmzoo_kernels  # noqa: F401  registers the scans' formulas


def count_macs(model: nn.Module, *inputs: Tensor) -> int:
    """Counts the multiply-accumulates of one forward pass; on the meta device, nothing is computed.

    The field's convention: a multiply-accumulate of a product or a convolution is one, and so is every single operation
    of a scan (9 a step, channel and state, and one for the skip). Norms, activations and sums are not counted.

    Args:
        model: A model in evaluation mode.
        inputs: What its `forward` takes.
    """
    formulas = {torch.ops.vmzoo.scan: _scan, torch.ops.vmzoo.sequence_scan: _sequence_scan}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops() // 2


def _scan(x, dt, B, C, A, D, dt_weight, dt_bias, gather, *args, out_shape=None, **kwargs) -> int:
    """Twice what the convention counts of the operator, given the shapes of its arguments."""
    flops = flop_registry[torch.ops.vmzoo.scan](x, dt, B, C, A, D, dt_weight, dt_bias, gather, *args, **kwargs)
    num_routes, sequences, steps = gather
    rank = 0 if dt_weight is None else dt_weight[-1]
    return 2 * flops - 2 * x[0] * num_routes * sequences * steps * A[1] * rank  # the step sizes are products


def _sequence_scan(*args, out_shape=None, **kwargs) -> int:
    """The same of a scan along a sequence, which has no product in it."""
    return 2 * flop_registry[torch.ops.vmzoo.sequence_scan](*args, **kwargs)
