"""2D neighbourhood attention with relative bias, in two steps: scores, then the weighted sum of values.

Each position attends to a window of `kernel_size` x `kernel_size` positions that lie `dilation` apart, centred on it
where the map allows and shifted inwards at its borders (NAT, https://arxiv.org/abs/2204.07143; DiNAT,
https://arxiv.org/abs/2209.15001). The two steps are apart so that one attention map can serve several values. Nothing
is compiled: a window is a band of a few rows of keys, read by a matrix product. Memory follows the windows, not the
square of the map.
"""

import functools
import importlib
import inspect
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vmzoo_kernels.routes import cacheable

_BACKENDS = ('torch', 'natten')
# Most products of a block of rows with the rows of its windows: what stays in a CPU's cache, or fills a GPU.
_CPU_BLOCK, _GPU_BLOCK = 2**18, 2**27


def neighbours(size: int, kernel_size: int, dilation: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Windows along one axis: positions p, p + dilation, p + 2 dilation, ... see each other.

    Returns:
        [size, kernel_size] int64 each: the positions in the window of each position, and their distances in steps of
        `dilation`, counted from `-(kernel_size - 1)` on so that they index a table of relative biases.
    """
    position = torch.arange(size, device=device)
    own, phase = position // dilation, position % dilation
    members = (size - phase + dilation - 1) // dilation
    start = torch.minimum((own - kernel_size // 2).clamp(min=0), members - kernel_size)
    member = start.unsqueeze(1) + torch.arange(kernel_size, device=device)
    return member * dilation + phase.unsqueeze(1), member - own.unsqueeze(1) + kernel_size - 1


@functools.lru_cache(maxsize=256)
def _cached(size: int, kernel_size: int, dilation: int, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # an inference tensor could not be used for training later
        return neighbours(size, kernel_size, dilation, device)


def _axis(size: int, kernel_size: int, dilation: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return (_cached if cacheable(device) else neighbours)(size, kernel_size, dilation, device)


def _check(shape: torch.Size, kernel_size: int, dilation: Sequence[int]) -> None:
    height, width = shape[2:4]
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f'kernel_size must be odd and positive, got {kernel_size}.')
    if min(dilation) < 1:
        raise ValueError(f'dilation must be at least 1, got {tuple(dilation)}.')
    if kernel_size * dilation[0] > height or kernel_size * dilation[1] > width:
        raise ValueError(
            f'A window of {kernel_size}x{kernel_size} positions with dilation {dilation[0]}x{dilation[1]} does not fit '
            f'a {height}x{width} map: enlarge the map, or reduce kernel_size or dilation.'
        )


class _Windows:
    """Blocks of query rows of a map [B, N, H, W, D], and the bands of keys that their windows lie in."""

    def __init__(self, x: Tensor, kernel_size: int, dilation: list[int]):
        _check(x.shape, kernel_size, dilation)  # here, so that a compiler takes no notice of it
        self.batch, self.heads, self.height, self.width, _ = x.shape
        self.kernel_size = kernel_size
        self.rows = _axis(self.height, kernel_size, dilation[0], x.device)[0]
        columns = _axis(self.width, kernel_size, dilation[1], x.device)[0]
        row = torch.arange(kernel_size, device=x.device).view(-1, 1)
        self.columns = (row * self.width + columns.unsqueeze(1)).flatten(1)  # [W, k * k] of a band's k * W
        band = self.batch * self.heads * self.width * kernel_size * self.width
        self.step = max(1, (_CPU_BLOCK if x.device.type == 'cpu' else _GPU_BLOCK) // max(band, 1))

    def blocks(self) -> list[slice]:
        return [slice(h, min(h + self.step, self.height)) for h in range(0, self.height, self.step)]

    def band(self, x: Tensor, block: slice) -> Tensor:
        """The rows of `x` that the block's windows lie in, [B, N, h, k * W, D]."""
        near = x.index_select(2, self.rows[block].flatten())
        return near.unflatten(2, (-1, self.kernel_size)).flatten(3, 4)

    def take(self, products: Tensor) -> Tensor:
        """The windows' part of products with a band: [B, N, h, W, k * W] -> [B, N, h, W, k * k]."""
        return products.gather(-1, self.columns.expand(*products.shape[:-1], -1))

    def put(self, attn: Tensor) -> Tensor:
        """The adjoint of `take`: attention over a band, zero outside the windows."""
        band = attn.new_zeros(*attn.shape[:-1], self.kernel_size * self.width)
        return band.scatter_(-1, self.columns.expand_as(attn), attn)


def _without_autocast(fn):
    @functools.wraps(fn)
    def wrapper(x: Tensor, y: Tensor, kernel_size: int, dilation: list[int]) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return fn(x, y, kernel_size, dilation)

    return wrapper


@torch.library.custom_op('vmzoo::na2d_qk', mutates_args=())
@_without_autocast
def _qk(query: Tensor, key: Tensor, kernel_size: int, dilation: list[int]) -> Tensor:
    windows = _Windows(query, kernel_size, dilation)
    out = query.new_empty(*query.shape[:-1], kernel_size**2)
    for block in windows.blocks():
        out[:, :, block] = windows.take(query[:, :, block] @ windows.band(key, block).mT)
    return out


@torch.library.custom_op('vmzoo::na2d_av', mutates_args=())
@_without_autocast
def _av(attn: Tensor, value: Tensor, kernel_size: int, dilation: list[int]) -> Tensor:
    windows = _Windows(value, kernel_size, dilation)
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    for block in windows.blocks():
        out[:, :, block] = windows.put(attn[:, :, block]) @ windows.band(value, block)
    return out


@torch.library.custom_op('vmzoo::na2d_av_adjoint', mutates_args=())
@_without_autocast
def _av_adjoint(attn: Tensor, x: Tensor, kernel_size: int, dilation: list[int]) -> Tensor:
    """What every position's output gives back to the positions of its window."""
    windows = _Windows(x, kernel_size, dilation)
    # A position lies in many windows: their sum is kept in float32.
    out = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32), memory_format=torch.contiguous_format)
    for block in windows.blocks():
        given = windows.put(attn[:, :, block]).mT @ x[:, :, block]  # [B, N, h, k * W, D]
        given = given.unflatten(3, (kernel_size, -1)).flatten(2, 3)
        out.index_add_(2, windows.rows[block].flatten(), given.to(out.dtype))
    return out.to(x.dtype)


@_qk.register_fake
def _(query, key, kernel_size, dilation):
    return query.new_empty(*query.shape[:-1], kernel_size**2)


@_av.register_fake
@_av_adjoint.register_fake
def _(attn, value, kernel_size, dilation):
    return torch.empty_like(value, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    *tensors, kernel_size, dilation = inputs
    ctx.save_for_backward(*tensors)
    ctx.windows = (kernel_size, dilation)


# Each of the three is linear in both of its inputs, and their derivatives are one another.
def _qk_backward(ctx, grad):
    query, key = ctx.saved_tensors
    return _av(grad, key, *ctx.windows), _av_adjoint(grad, query, *ctx.windows), None, None


def _av_backward(ctx, grad):
    attn, value = ctx.saved_tensors
    return _qk(grad, value, *ctx.windows), _av_adjoint(attn, grad, *ctx.windows), None, None


def _av_adjoint_backward(ctx, grad):
    attn, x = ctx.saved_tensors
    return _qk(x, grad, *ctx.windows), _av(attn, grad, *ctx.windows), None, None


_qk.register_autograd(_qk_backward, setup_context=_save)
_av.register_autograd(_av_backward, setup_context=_save)
_av_adjoint.register_autograd(_av_adjoint_backward, setup_context=_save)


@register_flop_formula([torch.ops.vmzoo.na2d_qk, torch.ops.vmzoo.na2d_av, torch.ops.vmzoo.na2d_av_adjoint])
def _(x_shape, map_shape, kernel_size, *args, **kwargs) -> int:
    return 2 * torch.Size(map_shape).numel() * kernel_size**2


def _natten() -> ModuleType:
    """`natten.functional`, if it has attention in two steps and with a bias: versions before 0.20 do."""
    try:
        natten = importlib.import_module('natten')
        functional = importlib.import_module('natten.functional')
    except ImportError as error:
        raise RuntimeError(
            f"Backend 'natten' cannot be imported ({error}): install a natten 0.17 built for your torch, or use "
            "backend 'torch', which needs nothing."
        ) from error
    qk = getattr(functional, 'na2d_qk', None)
    if qk is None or not hasattr(functional, 'na2d_av') or 'rpb' not in inspect.signature(qk).parameters:
        raise RuntimeError(
            f'natten {getattr(natten, "__version__", "of unknown version")} has no attention in two steps with a '
            "relative bias (na2d_qk with rpb, na2d_av): install natten 0.17, or use backend 'torch'."
        )
    return functional


def check_attention_backend(backend: str) -> str:
    """Returns the name of a backend that can run here.

    Raises:
        ValueError: Unknown name.
        RuntimeError: NATTEN is asked for and is not installed, or its version has not what is needed.
    """
    if backend not in _BACKENDS:
        raise ValueError(f'Unknown attention backend {backend!r}; choose from {", ".join(_BACKENDS)}.')
    if backend == 'natten':
        _natten()
    return backend


def _pair(dilation: int | tuple[int, int]) -> tuple[int, int]:
    return (dilation, dilation) if isinstance(dilation, int) else tuple(dilation)


def _flowing(*tensors: Tensor) -> list[Tensor]:
    """Tensors as a matrix product takes them: in the autocast dtype, or that of the last one; float64 as it is."""
    dtype, device_type = tensors[-1].dtype, tensors[-1].device.type
    if dtype != torch.float64 and device_type in ('cpu', 'cuda') and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    return [v.to(dtype) for v in tensors]


def _relative_bias(rpb: Tensor, height: int, width: int, kernel_size: int, dilation: tuple[int, int]) -> Tensor:
    # [N, 2k - 1, 2k - 1] -> [N, H, W, k * k]
    rows = _axis(height, kernel_size, dilation[0], rpb.device)[1]
    columns = _axis(width, kernel_size, dilation[1], rpb.device)[1]
    return rpb[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(3)


def na2d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: int,
    dilation: int | tuple[int, int] = 1,
    rpb: Tensor | None = None,
    backend: str = 'torch',
) -> Tensor:
    """Scores of neighbourhood attention: each query times the keys in its window, not scaled.

    Args:
        query: [B, N, H, W, D].
        key: As `query`.
        kernel_size: Side k of the window, odd.
        dilation: Distance of its positions, one for both axes or one each; k times it must fit the map.
        rpb: [N, 2k - 1, 2k - 1], bias by distance in rows and columns.
        backend: 'torch', or 'natten' for a NATTEN before 0.20.

    Returns:
        [B, N, H, W, k * k], windows in row-major order.

    Raises:
        ValueError: A window that does not fit the map, or shapes that do not fit together.
        RuntimeError: NATTEN is asked for and cannot serve.
    """
    dilation = _pair(dilation)
    if query.ndim != 5 or query.shape != key.shape:
        raise ValueError(
            f'query and key should both be [B, N, H, W, D], got {tuple(query.shape)} and {tuple(key.shape)}.'
        )
    side = 2 * kernel_size - 1
    if rpb is not None and rpb.shape != (query.shape[1], side, side):
        raise ValueError(f'rpb should be {(query.shape[1], side, side)}, got {tuple(rpb.shape)}.')
    query, key = _flowing(query, key)
    if check_attention_backend(backend) == 'natten':
        _check(query.shape, kernel_size, dilation)
        rpb = None if rpb is None else rpb.to(query.dtype)
        return _natten().na2d_qk(query, key, kernel_size=kernel_size, dilation=dilation, rpb=rpb)
    scores = _qk(query, key, kernel_size, list(dilation))
    return scores if rpb is None else scores + _relative_bias(rpb, *query.shape[2:4], kernel_size, dilation)


def na2d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: int,
    dilation: int | tuple[int, int] = 1,
    backend: str = 'torch',
) -> Tensor:
    """Weighted sum of the values in each position's window.

    Args:
        attn: [B, N, H, W, k * k], as :func:`na2d_qk` orders it.
        value: [B, N, H, W, D].
        kernel_size: Side k of the window, odd.
        dilation: As for the scores.
        backend: 'torch' or 'natten'.

    Returns:
        [B, N, H, W, D].

    Raises:
        ValueError: A window that does not fit the map, or shapes that do not fit together.
        RuntimeError: NATTEN is asked for and cannot serve.
    """
    dilation = _pair(dilation)
    if attn.shape != (*value.shape[:-1], kernel_size**2):
        raise ValueError(f'attn should be {(*value.shape[:-1], kernel_size**2)}, got {tuple(attn.shape)}.')
    attn, value = _flowing(attn, value)
    if check_attention_backend(backend) == 'natten':
        _check(value.shape, kernel_size, dilation)
        return _natten().na2d_av(attn, value, kernel_size=kernel_size, dilation=dilation)
    return _av(attn, value, kernel_size, list(dilation))
