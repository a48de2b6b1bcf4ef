"""CUDA kernels on the CPU: built with g++ and the emulator beside this file, instead of NVRTC.

``load`` takes the arguments of ``vmzoo_kernels.nvrtc.load`` and returns an object with the same ``launch``.
"""

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

import vmzoo_kernels

_EMULATOR = Path(__file__).parent / 'emulator'
_SOURCES = Path(vmzoo_kernels.__file__).parent / 'cuda'
_FLAGS = (
    *('-std=c++17', '-O1', '-shared', '-fPIC', '-w', '-Wl,-z,defs'),
    # One process loads many kernels, all with the same names
    *('-fvisibility=hidden', '-fno-gnu-unique'),
    # Fibers leave their stacks by longjmp, which some distributions' checks forbid
    *('-U_FORTIFY_SOURCE', '-D_FORTIFY_SOURCE=0'),
    # As a GPU does it: memory has no type, integers wrap
    *('-fno-strict-aliasing', '-fwrapv'),
    # and misaligned vectors are an error; a stack that overflows does so at its end
    *('-fstack-clash-protection', '-fsanitize=alignment,bounds', '-fsanitize-undefined-trap-on-error'),
)

needs_compiler = pytest.mark.skipif(shutil.which('g++') is None, reason='no g++, which builds CUDA kernels for the CPU')


class EmulatedKernel:
    def __init__(self, library: ctypes.CDLL, name: str):
        self._params_size = ctypes.c_size_t.in_dll(library, f'params_size_{name}').value
        self._launch = library[f'launch_{name}']
        self._launch.restype = ctypes.c_char_p

    def launch(
        self,
        grid: tuple[int, ...],
        block: int | tuple[int, ...],
        shared_bytes: int,
        params: bytes,
        reverse: bool = False,
    ) -> None:
        """Run the kernel.

        Args:
            grid: Blocks along x, y, z.
            block: Threads.
            shared_bytes: Dynamic shared memory.
            params: The kernel's one parameter, a struct.
            reverse: Blocks, and threads that no barrier orders, run from the last to the first. A kernel without races
                computes the same.

        Raises:
            RuntimeError: Deadlock, divergent warp, or a memory access that a GPU would not forgive.
        """
        if len(params) != self._params_size:
            raise RuntimeError(f'the kernel takes a struct of {self._params_size} bytes, not {len(params)}')
        block = (block,) if isinstance(block, int) else block
        sizes = [(ctypes.c_uint * 3)(*size, *(1,) * (3 - len(size))) for size in (grid, block)]
        failure = self._launch(*sizes, ctypes.c_size_t(shared_bytes), params, ctypes.c_bool(reverse))
        if failure:
            raise RuntimeError(failure.decode())


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix='vmzoo-emulated-')


@functools.cache
def _build(source_file: Path, defines: tuple[tuple[str, int | str], ...]) -> ctypes.CDLL:
    library = Path(tempfile.mkdtemp(dir=_folder().name)) / 'kernels.so'
    names = re.findall(r'(\w+)\(const __grid_constant__', source_file.read_text(encoding='utf-8'))
    macros = dict(defines) | {
        'EMULATED_SOURCE': f'"{source_file.resolve()}"',
        'EMULATED_KERNELS': ' '.join(f'EMULATE({name})' for name in names),
    }
    command = ['g++', *_FLAGS, *(f'-D{name}={value}' for name, value in macros.items())]
    command += ['-include', _EMULATOR / 'emulator.h', '-I', _SOURCES, _EMULATOR / 'launch.cpp', '-o', library]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f'{source_file} does not compile with g++:\n{result.stderr}')
    return ctypes.CDLL(str(library))


@functools.cache
def load(
    source_file: Path, defines: tuple[tuple[str, int | str], ...], kernel: str, device: torch.device | None = None
) -> EmulatedKernel:
    """A kernel of a CUDA source, with macros as template constants; the source is built once a process."""
    return EmulatedKernel(_build(source_file, defines), kernel)
