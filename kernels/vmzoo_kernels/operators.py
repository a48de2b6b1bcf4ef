"""What the operators of this package have in common beside their kernels: autocast, gradients in the form that they
promise, and calls without torch's dispatcher."""

from collections.abc import Callable

import torch
from torch import Tensor

from .common import runs_plainly

_DEVICE_TYPES = ('cpu', 'cuda')
_FLOWING = 4  # the first tensors of an operator flow through the model, the others are parameters
_LIBRARY = torch.library.Library('vmzoo', 'FRAGMENT')


def own_grads(inputs: tuple[Tensor | None, ...], grads: tuple[Tensor | None, ...], apart: bool = False) -> list[Tensor]:
    """Gradients as an operator promises them: contiguous, in the dtypes of its inputs, sharing memory with no other
    tensor; empty for inputs not given.

    Args:
        inputs: Of the operator.
        grads: Of the inputs.
        apart: Whether none of those that are contiguous shares memory, which takes time to find out.
    """
    return [inputs[0].new_empty(0) if v is None else _own(grad, v.dtype, apart) for v, grad in zip(inputs, grads)]


def _own(grad: Tensor, dtype: torch.dtype, apart: bool) -> Tensor:
    if grad.dtype == dtype and grad.is_contiguous() and (apart or grad.untyped_storage().nbytes() == grad.nbytes):
        return grad
    return grad.to(dtype, copy=True, memory_format=torch.contiguous_format)


def empty_grads(inputs: tuple[Tensor | None, ...]) -> list[Tensor]:
    """What :func:`own_grads` returns, without values."""
    return [inputs[0].new_empty(0) if v is None else v.new_empty(v.shape) for v in inputs]


def _autocast_tensors(tensors: tuple[Tensor | None, ...], device_type: str) -> list[Tensor | None]:
    """What flows in the autocast dtype, parameters in float32; float64 as it is.

    Only what flows is cast: the scan is sensitive to its parameters, and they are small.
    """
    dtype = torch.get_autocast_dtype(device_type)
    wanted = [dtype] * _FLOWING + [torch.float32] * (len(tensors) - _FLOWING)
    return [v if v is None or v.dtype == torch.float64 else v.to(to) for v, to in zip(tensors, wanted)]


def register(
    name: str,
    function: Callable,
    fake: Callable,
    gradients: Callable | None = None,
    setup_context: Callable | None = None,
) -> None:
    """Make ``vmzoo::name`` of a function whose results share no memory with its arguments.

    As ``torch.library.custom_op`` does, but for the look at the memory of all tensors at each call, which takes the
    host longer than several launches.

    Args:
        name: Of the operator.
        function: Its computation on any device, with annotations.
        fake: Its results without values.
        gradients: Of (ctx, gradients of the results); None if it has none.
        setup_context: Saves what ``gradients`` needs.
    """
    qualified = f'vmzoo::{name}'
    schema = torch.library.infer_schema(function, mutates_args=())
    _LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, function, 'CompositeExplicitAutograd')
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if gradients is None:

        def gradients(ctx, *unused):
            raise RuntimeError(f'{qualified} has no autograd formula: the selective scan has no second derivative')

    torch.library.register_autograd(qualified, gradients, setup_context=setup_context, lib=_LIBRARY)


def register_autocast(name: str, num_tensors: int) -> None:
    """Autocast of ``vmzoo::name``, whose first arguments are so many tensors."""
    operator = getattr(torch.ops.vmzoo, name)

    def autocast(device_type: str):
        def kernel(_, *inputs):
            tensors = _autocast_tensors(inputs[:num_tensors], device_type)
            keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
            keys = keys | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return operator(*tensors, *inputs[num_tensors:])

        return kernel

    for device_type in _DEVICE_TYPES:
        _LIBRARY.impl(name, autocast(device_type), f'Autocast{device_type.upper()}', with_keyset=True)


def direct_call(
    name: str, forward: Callable, setup_context: Callable, gradients: Callable, backward: Callable
) -> Callable[..., tuple[Tensor, ...]]:
    """A function of (tensors, *options) that is ``vmzoo::name``, directly where nothing looks into the computation.

    torch's dispatcher takes longer, in Python, than the kernel of a small map.

    Args:
        name: Of the operator; that of its backward pass ends in _backward.
        forward: The operator's computation.
        setup_context: As for ``register_autograd``.
        gradients: Of (ctx, dy, backward pass), as for ``register_autograd``.
        backward: The computation of the operator's backward pass.
    """
    operator, backward_operator = getattr(torch.ops.vmzoo, name), getattr(torch.ops.vmzoo, f'{name}_backward')

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = forward(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, dy, *unused):
            # With create_graph, the operator says that its gradients have none.
            return gradients(ctx, dy, backward_operator if torch.is_grad_enabled() else backward)

    def call(tensors: tuple[Tensor | None, ...], *options):
        device_type = tensors[0].device.type
        if device_type not in _DEVICE_TYPES or not runs_plainly(*tensors):
            return operator(*tensors, *options)
        if torch.is_autocast_enabled(device_type):
            tensors = _autocast_tensors(tensors, device_type)
        return Direct.apply(*tensors, *options)

    return call
