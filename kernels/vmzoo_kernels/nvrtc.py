"""CUDA C++ kernels compiled at first use by NVRTC, the compiler library that PyTorch's CUDA wheels bring.

A kernel is ``extern "C" __global__ void name(const __grid_constant__ Params p)``: one struct is all that it takes, and
macros are its template constants. It finds the files beside ``cuda/prelude.cuh``, and no header of CUDA.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

Defines = tuple[tuple[str, int | str], ...]

_HEADERS = Path(__file__).parent / 'cuda'

# Of cuda.h
_INVALID_CONTEXT = 201
_SHARED_SIZE_BYTES, _LOCAL_SIZE_BYTES, _NUM_REGS, _MAX_DYNAMIC_SHARED_SIZE_BYTES = 1, 3, 4, 8
_SHARED_MEMORY_PER_BLOCK_OPTIN = 97
_RELAXED = 2


def _folders() -> Iterator[Path]:
    """Where the wheels of CUDA, those of torch and conda put libraries."""
    packages = Path(torch.__file__).parents[1]
    for site in dict.fromkeys([packages, *map(Path, sys.path)]):
        yield from sorted(site.glob('nvidia/*/lib'))
    yield packages / 'torch' / 'lib'
    yield Path(sys.prefix) / 'lib'


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """The library of torch's major version of CUDA.

    Raises:
        RuntimeError: There is none.
    """
    if torch.version.cuda is None:
        raise RuntimeError('torch is built without CUDA')
    major = torch.version.cuda.split('.')[0]
    if sys.platform == 'win32':
        name, builtins = f'nvrtc64_{major}0_0.dll', f'nvrtc-builtins64_{major}*.dll'
    else:
        name, builtins = f'libnvrtc.so.{major}', f'libnvrtc-builtins.so.{major}.*'
    found = next((folder for folder in _folders() if (folder / name).is_file()), None)
    try:
        # NVRTC looks for its second library by name alone, which finds what the process has loaded
        for path in found.glob(builtins) if found else ():
            ctypes.CDLL(str(path))
        nvrtc = ctypes.CDLL(str(found / name) if found else name)
    except OSError as error:
        package = 'nvidia-cuda-nvrtc' + ('-cu12' if major == '12' else '')
        raise RuntimeError(f'NVRTC of CUDA {major} is missing (pip install {package}): {error}') from None
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    return nvrtc


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL('nvcuda.dll' if sys.platform == 'win32' else 'libcuda.so.1')
    except OSError as error:
        raise RuntimeError(f"NVIDIA's driver is missing: {error}") from None
    driver.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
    return driver


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint) for name in ('x', 'y', 'z', 'block_x', 'block_y', 'block_z', 'shared_bytes')),
        *(('stream', ctypes.c_void_p), ('attributes', ctypes.c_void_p), ('num_attributes', ctypes.c_uint)),
    )


@functools.cache
def why_not() -> str | None:
    """Why CUDA kernels cannot be compiled and run here; None if they can."""
    if torch.version.hip is not None:
        return 'torch is built for ROCm, which does not run CUDA'
    if torch.version.cuda is None:
        return 'torch is built without CUDA'
    if not torch.cuda.is_available():
        return 'torch sees no CUDA device'
    try:
        _nvrtc(), _driver()
    except RuntimeError as error:
        return str(error)
    return None


def _compiler_call(function: str, *args) -> None:
    if error := getattr(_nvrtc(), function)(*args):
        raise RuntimeError(f'{function} fails: {_nvrtc().nvrtcGetErrorString(error).decode()}')


def _driver_call(function: str, *args) -> None:
    if error := getattr(_driver(), function)(*args):
        raise RuntimeError(f'{function} fails: {_describe(error)}')


def _describe(error: int) -> str:
    text = ctypes.c_char_p()
    _driver().cuGetErrorString(error, ctypes.byref(text))
    return f'{(text.value or b"unknown error").decode()} ({error})'


def _version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _compiler_call('nvrtcVersion', ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def _supported() -> list[int]:
    count = ctypes.c_int()
    _compiler_call('nvrtcGetNumSupportedArchs', ctypes.byref(count))
    archs = (ctypes.c_int * count.value)()
    _compiler_call('nvrtcGetSupportedArchs', archs)
    return list(archs)


def _target(arch: int) -> str:
    """What to compile for a device: its machine code, or for one newer than NVRTC the newest PTX, which the driver
    translates."""
    supported = _supported()
    if arch in supported:
        return f'sm_{arch}'
    return f'compute_{max((known for known in supported if known < arch), default=arch)}'


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _compiler_call(f'nvrtcGet{what}Size', program, ctypes.byref(size))
    data = ctypes.create_string_buffer(size.value)
    _compiler_call(f'nvrtcGet{what}', program, data)
    return data.raw


def _strings(texts: list[bytes]) -> ctypes.Array:
    return (ctypes.c_char_p * len(texts))(*texts)


def _compile(name: str, source: bytes, headers: dict[str, bytes], options: list[str]) -> bytes:
    program = ctypes.c_void_p()
    names = _strings([header.encode() for header in headers])
    _compiler_call(
        'nvrtcCreateProgram',
        *(ctypes.byref(program), source, name.encode(), len(headers), _strings([*headers.values()]), names),
    )
    try:
        arguments = _strings([option.encode() for option in options])
        try:
            _compiler_call('nvrtcCompileProgram', program, len(options), arguments)
        except RuntimeError as error:
            log = _read(program, 'ProgramLog').rstrip(b'\0').decode(errors='replace')
            raise RuntimeError(f'{name} does not compile with {" ".join(options)}: {error}\n{log}') from None
        return _read(program, 'PTX' if 'compute_' in options[0] else 'CUBIN')
    finally:
        _nvrtc().nvrtcDestroyProgram(ctypes.byref(program))


def _cache_folder() -> Path:
    if folder := os.environ.get('VMZOO_CACHE_DIR'):
        return Path(folder).expanduser()
    return Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'vmzoo'


def _read_cache(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, binary = data[:32], data[32:]
    return binary if hashlib.sha256(binary).digest() == digest else None


def _write_cache(path: Path, binary: bytes) -> None:
    """A cache that cannot be written costs time, not the kernel."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with open(handle, 'wb') as file:
                file.write(hashlib.sha256(binary).digest() + binary)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)


def _binary(source_file: Path, defines: Defines, arch: int, options: tuple[str, ...]) -> bytes:
    """Machine code from the cache, or else from NVRTC."""
    source = source_file.read_bytes()
    headers = {path.name: path.read_bytes() for path in sorted(_HEADERS.glob('*.cuh'))}
    flags = [f'--gpu-architecture={_target(arch)}', '-std=c++17', *options]
    flags += [f'-D{name}={value}' for name, value in defines]
    key = hashlib.sha256(repr((_version(), source_file.name, source, headers, flags)).encode()).hexdigest()
    try:
        path = _cache_folder() / f'{key}.cubin'
    except RuntimeError:  # a user without a home
        return _compile(source_file.name, source, headers, flags)
    binary = _read_cache(path)
    if binary is None:
        binary = _compile(source_file.name, source, headers, flags)
        _write_cache(path, binary)
    return binary


def compile_only(source_file: Path, defines: Defines, kernel: str, arch: str, options: tuple[str, ...] = ()) -> bytes:
    """The machine code of a kernel for a GPU that need not be there.

    Args:
        arch: Such as 'sm_90'.
        defines, options: As for ``load``.

    Raises:
        RuntimeError: NVRTC is missing, the source does not compile, or has no such kernel.
    """
    binary = _binary(source_file, defines, int(arch.removeprefix('sm_')), options)
    if not any(mark.encode() in binary for mark in (f'.text.{kernel}\0', f'.entry {kernel}(')):
        raise RuntimeError(f'{source_file.name} has no extern "C" kernel {kernel!r}')
    return binary


@functools.cache
def _device(index: int) -> tuple[ctypes.c_int, ctypes.c_void_p]:
    """A device and the context that torch uses on it."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _driver_call('cuDeviceGet', ctypes.byref(device), index)
    _driver_call('cuDevicePrimaryCtxRetain', ctypes.byref(context), device)
    return device, context


@functools.cache
def _module(source_file: Path, defines: Defines, index: int, options: tuple[str, ...]) -> ctypes.c_void_p:
    major, minor = torch.cuda.get_device_capability(index)
    binary = _binary(source_file, defines, 10 * major + minor, options)
    module = ctypes.c_void_p()
    _driver_call('cuModuleLoadData', ctypes.byref(module), binary)
    return module


class Kernel:
    """A kernel on a device.

    Attributes:
        registers: Of a thread.
        local_bytes: Local memory of a thread, where registers spill.
        shared_bytes: Static shared memory of a block.
        max_shared_bytes: Dynamic shared memory that a block may have.
    """

    def __init__(self, function: ctypes.c_void_p, index: int) -> None:
        self._function = function
        self._index = index
        self._cuda_launch = _driver().cuLaunchKernelEx
        self._configs: dict[tuple, _LaunchConfig] = {}
        self.registers = self._attribute(_NUM_REGS)
        self.local_bytes = self._attribute(_LOCAL_SIZE_BYTES)
        self.shared_bytes = self._attribute(_SHARED_SIZE_BYTES)
        most = ctypes.c_int()
        _driver_call('cuDeviceGetAttribute', ctypes.byref(most), _SHARED_MEMORY_PER_BLOCK_OPTIN, _device(index)[0])
        self.max_shared_bytes = most.value - self.shared_bytes
        _driver_call('cuFuncSetAttribute', function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, self.max_shared_bytes)

    def _attribute(self, attribute: int) -> int:
        value = ctypes.c_int()
        _driver_call('cuFuncGetAttribute', ctypes.byref(value), attribute, self._function)
        return value.value

    def launch(self, grid: tuple[int, ...], block: int, shared_bytes: int, params: bytes) -> None:
        """Start the kernel on torch's current stream of the device.

        Args:
            grid: Blocks along x, y, z.
            block: Threads of a block.
            shared_bytes: Dynamic shared memory of a block.
            params: The kernel's struct.

        Raises:
            RuntimeError: The driver refuses the launch.
        """
        if torch._C._cuda_getDevice() != self._index:
            with torch.cuda.device(self._index):
                return self.launch(grid, block, shared_bytes, params)
        stream = torch._C._cuda_getCurrentRawStream(self._index)
        key = (grid, block, shared_bytes, stream)
        config = self._configs.get(key)
        if config is None:
            if len(self._configs) == 4096:  # sizes without end
                self._configs.clear()
            config = self._configs[key] = _LaunchConfig(*(*grid, 1, 1)[:3], block, 1, 1, shared_bytes, stream)
        # The arguments are an array of pointers, here of one: that to the bytes
        launch = (ctypes.byref(config), self._function, ctypes.byref(ctypes.c_char_p(params)), None)
        error = self._cuda_launch(*launch)
        if error == _INVALID_CONTEXT:  # a thread that did not use the device before
            _driver_call('cuCtxSetCurrent', _device(self._index)[1])
            error = self._cuda_launch(*launch)
        if error:
            raise RuntimeError(
                f'the launch of {grid} blocks of {block} threads with {shared_bytes} bytes of shared memory (at most '
                f'{self.max_shared_bytes}) fails: {_describe(error)}'
            )


@functools.cache
def load(
    source_file: Path, defines: Defines, kernel: str, device: torch.device, options: tuple[str, ...] = ()
) -> Kernel:
    """Compile a kernel, or take it from the cache, and load it.

    The cache is $VMZOO_CACHE_DIR, or vmzoo in $XDG_CACHE_HOME or ~/.cache.

    Args:
        source_file: Includes what it needs from the folder of the prelude.
        defines: Macros and their values.
        kernel: Its name.
        device: With its index.
        options: More options of NVRTC, such as '--use_fast_math'.

    Raises:
        RuntimeError: NVRTC or the driver fails; for an error in the source, with the compiler's messages.
    """
    index = device.index
    function = ctypes.c_void_p()
    mode = ctypes.c_int(_RELAXED)
    with torch.cuda.device(index):
        _driver_call('cuCtxSetCurrent', _device(index)[1])
        # Else nothing could be loaded while the thread captures a CUDA graph
        _driver_call('cuThreadExchangeStreamCaptureMode', ctypes.byref(mode))
        try:
            module = _module(source_file, defines, index, options)
            _driver_call('cuModuleGetFunction', ctypes.byref(function), module, kernel.encode())
            return Kernel(function, index)
        finally:
            _driver_call('cuThreadExchangeStreamCaptureMode', ctypes.byref(mode))
