"""Vision-LSTM block (ViL, arXiv 2406.04303): a matrix LSTM (xLSTM, arXiv 2405.04517) over tokens in one order."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from .linear import Linear, grouped_linear
from .mamba import causal_conv
from .ssm_init import compute_dtype

_NOTHING = -1e30  # logarithm of a weight that is zero; finite, so that differences and gradients are


def _segment_sums(x: Tensor) -> Tensor:
    """[..., T] -> [..., T, T]: at (t, s) the sum of x over s < r <= t, and `_NOTHING` where s > t.

    Each is summed up on its own: differences of sums from the start would lose digits.
    """
    steps = x.shape[-1]
    lower = torch.ones(steps, steps, dtype=torch.bool, device=x.device).tril()
    sums = x.unsqueeze(-1).expand(*x.shape, steps).masked_fill(~lower.tril(-1), 0.0).cumsum(-2)
    return sums.masked_fill(~lower, _NOTHING)


def matrix_lstm(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, chunk_size: int = 64, eps: float = 1e-6
) -> Tensor:
    """Matrix LSTM with exponential input gates and sigmoid forget gates.

    With states C (matrix) and n (vector) of zero at first, and m their stabiliser:

        m_t = max(logsigmoid(f_t) + m_{t-1}, i_t)
        C_t = exp(logsigmoid(f_t) + m_{t-1} - m_t) C_{t-1} + exp(i_t - m_t) k_t v_t^T / sqrt(D)
        n_t = the same of k_t / sqrt(D)
        h_t = q_t C_t / (max(|q_t n_t|, exp(-m_t)) + eps)

    It is computed without recurrence: within chunks every step looks at those before it, and the states at the ends of
    the chunks do the same among themselves. Time and memory grow with L times the chunk. Everything is computed in at
    least float32; exponents are never positive, so that gates of any size give finite results and gradients.

    Args:
        q: Queries [B, H, L, D].
        k: Keys [B, H, L, D].
        v: Values [B, H, L, D].
        igate: Input gates before the exponential, [B, H, L].
        fgate: Forget gates before the sigmoid, [B, H, L].
        chunk_size: Steps of a chunk.
        eps: Added to the normaliser.

    Returns:
        [B, H, L, D], in float32, or float64 if that is the dtype of `q`.
    """
    dtype, length = compute_dtype(q.dtype), q.shape[2]
    steps = min(chunk_size, length)
    beyond = -length % steps

    def chunks(x: Tensor) -> Tensor:  # [B, H, L, ...] -> [B, H, chunks, T, ...]; what is added at the end is never seen
        x = x.to(dtype)
        x = F.pad(x, (0, 0) * (x.ndim - 3) + (0, beyond)) if beyond else x
        return x.unflatten(2, (-1, steps))

    q, k, v, igate = chunks(q), chunks(k) * q.shape[-1] ** -0.5, chunks(v), chunks(igate)
    log_f = chunks(F.logsigmoid(fgate.to(dtype)))
    v = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)  # the last column sums up the normaliser

    # [..., t, s]: logarithm of the weight of step s for step t of the same chunk
    log_weight = _segment_sums(log_f) + igate.unsqueeze(-2)
    m_within = log_weight.amax(-1)  # [B, H, chunks, T]
    # what the steps of a chunk leave at its end, and what all chunks have left there
    left = k * (log_weight[..., -1, :] - m_within[..., -1:]).exp().unsqueeze(-1)
    states = left.mT @ v  # [B, H, chunks, D, D + 1]
    log_state = _segment_sums(log_f.sum(-1)) + m_within[..., -1].unsqueeze(-2)  # [..., end of chunk, chunk]
    m_state = log_state.amax(-1)  # [B, H, chunks]
    states = ((log_state - m_state.unsqueeze(-1)).exp() @ states.flatten(-2)).view_as(states)
    # a chunk starts with the states at the end of the one before it
    states = F.pad(states, (0, 0, 0, 0, 1, -1))
    m_before = log_f.cumsum(-1) + F.pad(m_state, (1, -1), value=_NOTHING).unsqueeze(-1)

    m = torch.maximum(m_within, m_before)
    scale = m.clamp(min=0.0)  # what m is scaled by; exp(-m) would overflow
    weights = (q @ k.mT) * (log_weight - scale.unsqueeze(-1)).exp()
    h = weights @ v + (q * (m_before - scale).exp().unsqueeze(-1)) @ states
    h, norm = h[..., :-1], h[..., -1]
    norm = torch.maximum(norm.abs(), (-scale).exp()) + eps * (m - scale).exp()
    return (h / norm.unsqueeze(-1)).flatten(2, 3)[:, :, :length]


class MatrixLSTMMixer(nn.Module):
    """Token mixer of a Vision-LSTM block: projection, causal convolution, matrix LSTM, gate, projection.

    Blocks of as many channels as there are heads (4, or 2 if `dim` is no multiple of 4) share a linear map to queries,
    one to keys and one to values; parameter names are the published ones.

    Args:
        dim: Token channels D.
        d_conv: Kernel of the causal convolution.
        expand: Inner width over `dim`.
    """

    def __init__(self, dim: int, d_conv: int = 4, expand: int = 2, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.dim = dim
        self.num_heads = heads = 4 if dim % 4 == 0 else 2
        d_inner = expand * dim
        if d_inner % heads:
            raise ValueError(f'The inner width must be a multiple of {heads}, got {d_inner} (dim={dim}).')
        self.learnable_skip = nn.Parameter(torch.empty(d_inner, **dd))
        self.proj_up = Linear(dim, 2 * d_inner, bias=False, **dd)
        for name in ('q_proj', 'k_proj', 'v_proj'):
            self.register_parameter(name, nn.Parameter(torch.empty(d_inner // heads, heads, heads, **dd)))
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, **dd)
        self.igate = Linear(3 * d_inner, heads, **dd)
        self.fgate = Linear(3 * d_inner, heads, **dd)
        self.outnorm = nn.Parameter(torch.empty(d_inner, **dd))
        self.proj_down = Linear(d_inner, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as published; gates start open for the past and independent of the tokens."""
        self.conv1d.reset_parameters()
        std = (2 / (5 * self.dim)) ** 0.5
        for weight in (self.proj_up.weight, self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(weight, std=std)
        nn.init.normal_(self.proj_down.weight, std=2 * self.dim**-0.5)
        nn.init.zeros_(self.igate.weight)
        nn.init.normal_(self.igate.bias, std=0.1)
        nn.init.zeros_(self.fgate.weight)
        with torch.no_grad():
            self.fgate.bias.copy_(torch.linspace(3.0, 6.0, self.num_heads, device=self.fgate.bias.device))
        nn.init.ones_(self.learnable_skip)
        nn.init.ones_(self.outnorm)

    def _blocks(self, x: Tensor, weight: Tensor) -> Tensor:
        """[B, L, d] -> [B, L, d], each block of channels by its own map."""
        return grouped_linear(x.unflatten(-1, (-1, self.num_heads)), weight).flatten(-2)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, L, d] -> [B, H, L, d / H]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, L, D] -> [B, L, D]."""
        u, z = self.proj_up(x).chunk(2, dim=-1)  # [B, L, d] each
        c = F.silu(causal_conv(u, self.conv1d))
        q, k, v = self._blocks(c, self.q_proj), self._blocks(c, self.k_proj), self._blocks(u, self.v_proj)
        qkv = torch.cat((q, k, v), dim=-1)
        igate, fgate = self.igate(qkv).transpose(1, 2), self.fgate(qkv).transpose(1, 2)  # [B, H, L]
        h = matrix_lstm(self._heads(q), self._heads(k), self._heads(v), igate, fgate)
        h = F.layer_norm(h, h.shape[-1:]).transpose(1, 2).flatten(2).to(x.dtype) * self.outnorm
        return self.proj_down((h + self.learnable_skip * c) * F.silu(z))


class VisionLSTMBlock(nn.Module):
    """Pre-norm residual block around a :class:`MatrixLSTMMixer` (extra arguments are its own).

    As published it is computed in float32 under autocast.

    Args:
        dim: Token channels D.
        drop_path: Stochastic depth rate.
    """

    def __init__(self, dim: int, drop_path: float = 0.0, device=None, dtype=None, **mixer_args: int):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm = nn.LayerNorm(dim, bias=False, **dd)
        self.layer = MatrixLSTMMixer(dim, **mixer_args, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, L, D] -> [B, L, D]."""
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            x = x.to(self.norm.weight.dtype)
            return x + self.drop_path(self.layer(self.norm(x)))
