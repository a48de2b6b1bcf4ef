"""Linear layers that are fast on a CPU, and an MLP that keeps little for its backward pass on a GPU."""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from vmzoo_kernels.common import runs_plainly

from .norm import is_bare

_ONEDNN = torch.backends.mkldnn.is_available()
_INNER_PRODUCT = getattr(torch.ops.mkldnn, '_linear_pointwise', None)

if _INNER_PRODUCT is not None and _INNER_PRODUCT not in flop_registry:

    @register_flop_formula(_INNER_PRODUCT)
    def _(x_shape, weight_shape, *args, **kwargs) -> int:
        return 2 * torch.Size(x_shape).numel() * weight_shape[0]


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether a layer is float32 on a CPU, of shapes that fit together, and no compiler or exporter looks on."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor:
        return False
    fits = x.numel() > 0 and x.shape[-1] == weight.shape[-1]
    return fits and x.device.type == 'cpu' and x.dtype == weight.dtype == torch.float32


def _is_inference(*tensors: Tensor | None) -> bool:
    if torch.is_autocast_enabled('cpu') or torch._C._are_functorch_transforms_active():
        return False
    return not (torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: [..., I] -> [..., O], with weight [O, I] and bias [O].

    In float32 on a CPU it goes through oneDNN, on AMD processors twice as fast as the BLAS library behind ``F.linear``,
    elsewhere about the same. For inference that is oneDNN's inner product, which reads the weights as they lie. Torch
    has no derivatives of that, so elsewhere it is a 1x1 convolution of rows that lie channels-last in memory already,
    which brings the weights into an order of its own at each call. Compilers, exporters and tensor subclasses see the
    plain linear layer, for which they have rules of their own.
    """
    if not _ONEDNN or not _suits_onednn(x, weight):
        return F.linear(x, weight, bias)
    if _INNER_PRODUCT is not None and _is_inference(x, weight, bias):
        bias = bias if bias is None else bias.contiguous()  # its strides are not looked at
        return _INNER_PRODUCT(x, weight, bias, 'none', [], '')
    rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # [1, I, rows, 1]
    out = F.conv2d(rows, weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def grouped_linear(x: Tensor, weight: Tensor) -> Tensor:
    """K linear maps side by side, in one product: [..., K, I] -> [..., K, O], with weight [K, O, I]."""
    out = torch.bmm(x.flatten(0, -3).transpose(0, 1), weight.mT)  # [K, rows, O]
    return out.transpose(0, 1).unflatten(0, x.shape[:-2])


@torch.no_grad()
def init_truncated_(layer: nn.Module) -> None:
    """Weight of a linear layer or convolution from a truncated normal distribution, of 0.02; no bias."""
    trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class Linear(nn.Linear):
    """``nn.Linear`` through :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _GeluLinear(torch.autograd.Function):
    """A GELU and the linear layer after it as one node, which keeps the GELU's input alone and computes it again."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        dx = dweight = dbias = None
        if needed[2]:
            dbias = rows.sum(0)
        if torch.is_grad_enabled():  # create_graph: these gradients are to have gradients
            y = F.linear(F.gelu(x.to(dy.dtype)), weight.to(dy.dtype))
            wanted = [v for v, need in zip((x, weight), needed) if need]
            grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True) if wanted else ())
            return *(next(grads) if need else None for need in needed[:2]), dbias
        if needed[0]:
            dx = torch.ops.aten.gelu_backward(torch.mm(rows, weight.to(dy.dtype)).view(x.shape), x)
        if needed[1]:
            dweight = torch.mm(rows.t(), F.gelu(x).view(-1, x.shape[-1]).to(dy.dtype))
        return dx, dweight, dbias


class Mlp(nn.Module):
    """Two linear layers with an activation between them, on the last dimension.

    Args:
        dim: Channels of input and output.
        hidden_dim: Channels between.
        act_layer: Activation.
    """

    def __init__(self, dim: int, hidden_dim: int, act_layer: type[nn.Module] = nn.GELU, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.fc1 = Linear(dim, hidden_dim, **dd)
        self.act = act_layer()
        self.fc2 = Linear(hidden_dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        x = self.fc1(x)
        if self._keeps_little(x):
            return _GeluLinear.apply(x, self.fc2.weight, self.fc2.bias)
        return self.fc2(self.act(x))

    def _keeps_little(self, x: Tensor) -> bool:
        if not (x.is_cuda and x.numel() and torch.is_grad_enabled() and runs_plainly(x, self.fc2.weight)):
            return False
        exact = is_bare(self.act, nn.GELU) and self.act.approximate == 'none'
        return exact and is_bare(self.fc2, Linear)


class SwiGlu(nn.Module):
    """Gated MLP on the last dimension, `w3(silu(w1 x) * w2 x)` (https://arxiv.org/abs/2002.05202).

    Args:
        dim: Channels of input and output.
        hidden_dim: Channels between.
    """

    def __init__(self, dim: int, hidden_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.w1 = Linear(dim, hidden_dim, **dd)
        self.w2 = Linear(dim, hidden_dim, **dd)
        self.w3 = Linear(hidden_dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        return self.w3(F.silu(self.w1(x)) * self.w2(x))
