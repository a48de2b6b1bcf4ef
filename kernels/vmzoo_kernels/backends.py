"""Which backend runs a scan, and why not the other."""

import functools
import importlib.util
import os
import warnings

import torch

from . import nvrtc

_ENV = 'VMZOO_SCAN_BACKEND'


@functools.cache
def _triton_missing() -> str | None:
    if importlib.util.find_spec('triton') is None:
        return 'the package triton is not installed (pip install triton)'
    try:
        importlib.import_module('triton')
    except Exception as error:  # a broken Triton must not take the torch backend down with it
        return f'triton does not import: {type(error).__name__}: {error}'
    return None


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU (set before their first use)."""
    return os.environ.get('TRITON_INTERPRET', '0') == '1'


def why_not_triton(device: torch.device) -> str | None:
    """Why the Triton backend cannot run on a device; None if it can."""
    missing = _triton_missing()
    if missing:
        return missing
    if interpreted():
        return None
    if device.type != 'cuda':
        return f'it needs a CUDA or ROCm device, not {device.type} (TRITON_INTERPRET=1 runs it slowly on the CPU)'
    if not torch.cuda.is_available():
        return 'torch sees no CUDA or ROCm device'
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0):
        return f'{torch.cuda.get_device_name(device)} is older than compute capability 7.0'
    return None


@functools.cache
def why_not_cuda(device: torch.device) -> str | None:
    """Why the CUDA backend cannot run on a device; None if it can."""
    if device.type != 'cuda':
        return f'it needs a CUDA device, not {device.type}'
    reason = nvrtc.why_not()
    if reason is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f'{torch.cuda.get_device_name(device)} is older than compute capability 8.0'
    return reason


def available_backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """Each backend's name with None if it can run on the device, or the reason why not.

    Args:
        device: Default: the first CUDA device if there is one, else the CPU.
    """
    if device is None:
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    device = torch.device(device)
    return {'torch': None, 'triton': why_not_triton(device), 'cuda': why_not_cuda(device)}


@functools.cache
def _warn_slow(reason: str) -> None:
    warnings.warn(f'the selective scan runs on the slow torch backend on this GPU: {reason}', stacklevel=3)


@torch.compiler.assume_constant_result
def resolve_backend(
    backend: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    unfit: str | None = None,
    unfit_triton: str | None = None,
) -> str:
    """The backend that ``backend`` ('auto', 'torch', 'triton' or 'cuda') means for tensors of a dtype on a device.

    'auto' follows the environment variable VMZOO_SCAN_BACKEND if it is set. Otherwise CUDA tensors go to the CUDA
    kernels where these take the scan, then to Triton; the rest goes to torch. Compiled kernels compute in float32:
    float64 is for the torch backend.

    Args:
        backend: Name.
        device: Of the tensors.
        dtype: Of the tensors.
        unfit: Why the CUDA kernels do not take this scan; None if they do.
        unfit_triton: The same of the Triton kernels.

    Raises:
        ValueError: Unknown name.
        RuntimeError: A backend asked for by name that cannot run, with the reason.
    """
    if backend == 'auto':
        backend = os.environ.get(_ENV, 'auto')
    if backend not in ('auto', 'torch', 'triton', 'cuda'):
        raise ValueError(f"unknown scan backend {backend!r}; choose 'auto', 'torch', 'triton' or 'cuda'")
    exact = dtype == torch.float64 and not interpreted()
    if backend == 'torch' or (backend == 'auto' and (device.type not in ('cuda', 'meta') or exact)):
        return 'torch'
    if backend == 'cuda' or (backend == 'auto' and device.type == 'cuda'):
        reason = unfit or why_not_cuda(device)
        if reason is None:
            return 'cuda'
        if backend == 'cuda':
            raise RuntimeError(f"scan backend 'cuda' cannot run here: {reason}")
    if backend == 'triton' and exact:
        raise RuntimeError("scan backend 'triton' cannot run here: it computes in float32, and the tensors are float64")
    if device.type != 'meta':
        reason = unfit_triton or why_not_triton(device)
        if reason is None:
            return 'triton'
        if backend == 'triton':
            raise RuntimeError(f"scan backend 'triton' cannot run here: {reason}")
        _warn_slow(reason)
    return 'torch'
