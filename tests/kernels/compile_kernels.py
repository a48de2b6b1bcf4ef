"""Compile the Triton kernels for a GPU that need not be there: `python compile_kernels.py cuda 90`.

A script of its own, because the tests around it use Triton's interpreter, in which nothing compiles.
"""

import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vmzoo_kernels import triton_scan

POINTERS = {
    **dict.fromkeys(('x', 'dt', 'B', 'C', 'dy', 'dx'), 'flowing'),
    **dict.fromkeys(('gather', 'merge'), 'i32'),
    **dict.fromkeys(('A', 'D', 'weight', 'bias', 'y', 'states', 'last', 'segment_states', 'segment_deltas'), 'fp32'),
    **dict.fromkeys(('d_dt', 'd_B', 'd_C', 'd_A', 'd_D', 'd_weight', 'd_bias'), 'fp32'),
}
# One of each kind: VMamba's (d_state 1, half precision), Vim's (d_state 16, float32), the 1-D scan (whole step sizes),
# and with segments that are also scanned backwards, which fill a tile (LBVim's) or do not
VARIANTS = {
    'vmamba': ('fp16', {'N': 1, 'RANK': 6, 'BLOCK_N': 1, 'BLOCK_R': 16, 'PRECISION': 'tf32'}),
    'vim': ('fp32', {'N': 16, 'RANK': 12, 'BLOCK_N': 16, 'BLOCK_R': 16, 'PRECISION': 'ieee'}),
    'sequence': ('bf16', {'N': 4, 'RANK': 0, 'BLOCK_N': 4, 'BLOCK_R': 16, 'PRECISION': 'tf32', 'WIDE': True}),
    'lbvim': ('fp32', {'N': 16, 'RANK': 12, 'BLOCK_N': 16, 'BLOCK_R': 16, 'PRECISION': 'ieee', 'SEGMENT': 8}),
    'segments of five': ('fp16', {'N': 1, 'RANK': 6, 'BLOCK_N': 1, 'BLOCK_R': 16, 'PRECISION': 'tf32', 'SEGMENT': 5}),
}
COMMON = {'BLOCK_T': 32, 'BLOCK_D': 32, 'VEC': 1, 'WIDE': False, 'ACC': tl.float32, 'SPLIT': True, 'SUMMARY': False}
COMMON |= {'HAS_D': True, 'HAS_BIAS': True, 'SOFTPLUS': True, 'SEGMENT': 0, 'SAVE_STATES': True, 'REVERSE': True}


def compile_kernel(kernel, target: GPUTarget, flowing: str, constants: dict) -> None:
    """Compile one kernel down to machine code."""
    signature, values = {}, {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name], values[name] = 'constexpr', constants[name]
        elif name in POINTERS:
            signature[name] = '*' + (flowing if POINTERS[name] == 'flowing' else POINTERS[name])
        elif name != 'dim' and name.endswith(('_d', '_n')):  # the stride between channels
            signature[name], values[name] = 'constexpr', 1
        else:
            signature[name] = 'i32'
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    assert triton.compile(source, target=target, options={'num_warps': 1}).kernel


def main(backend: str, arch: str, *names: str) -> None:
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, 64 if backend == 'hip' else 32)
    for name in names or VARIANTS:
        flowing, constants = VARIANTS[name]
        for kernel in (triton_scan._forward_kernel, triton_scan._carry_kernel, triton_scan._backward_kernel):
            compile_kernel(kernel, target, flowing, COMMON | constants)
            sys.stdout.write(f'{backend} {arch}: {name} {kernel.__name__}\n')


if __name__ == '__main__':
    main(*sys.argv[1:])
