"""Compile the norm's Triton kernels for a GPU that need not be there: `python compile_layer_norm.py cuda 90`.

A script of its own, because the tests around it use Triton's interpreter, in which nothing compiles.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vmzoo_kernels import triton_layer_norm

# dtypes of x, of what is added, of y and of the weights, channels, whether the mean is subtracted
VARIANTS = (
    ('fp32', None, 'fp16', 'fp32', 96, True),
    ('fp32', 'fp16', 'fp16', 'fp32', 96, True),
    ('bf16', None, 'bf16', 'bf16', 97, True),
    ('fp32', None, 'bf16', None, 3072, False),
)


def compile_kernel(kernel, target: GPUTarget, num_warps: int, arguments: dict) -> dict:
    """Compile one kernel down to machine code; strings are pointers' dtypes, other values constants."""
    signature, constants, aligned = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in ('rows', 'programs', 'eps'):
            signature[name] = 'fp32' if name == 'eps' else 'i32'
        elif isinstance(arguments[name], str):
            signature[name], aligned[(i,)] = f'*{arguments[name]}', [['tt.divisibility', 16]]
        else:
            signature[name], constants[name] = 'constexpr', arguments[name]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=target, options={'num_warps': num_warps})
    assert compiled.kernel
    return compiled.asm


def main(backend: str, arch: str) -> None:
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, 64 if backend == 'hip' else 32)
    for x, branch, y, weight, channels, center in VARIANTS:
        plan = triton_layer_norm._plan(channels)
        common = {'x': x, 'weight': weight, 'stats': 'fp32', 'C': channels, 'CENTER': center, 'BLOCK_C': plan.block_c}
        forward = {'bias': weight if center else None, 'y': y, 'BLOCK_M': plan.forward_rows}
        forward |= {'branch': branch, 'total': branch and x}
        backward = {'dy': y, 'dx': x, 'sums': 'fp32', 'NUM_SUMS': 2 if center else 0, 'BLOCK_M': plan.backward_rows}
        backward |= {'dtotal': branch and x, 'dbranch': branch}
        backward |= {'VEC': 4 if x == 'fp32' else 8, 'STAGES': plan.stages}
        for kernel, arguments in (
            (triton_layer_norm._forward_kernel, forward),
            (triton_layer_norm._backward_kernel, backward),
        ):
            code = compile_kernel(kernel, target, plan.num_warps, common | arguments).get('ptx', '')
            sys.stdout.write(f'{backend} {arch}: {x} + {branch} {channels} {kernel.__name__}')
            sys.stdout.write(f' wide loads: {"ld.global.v4" in code}, copies ahead: {"cp.async" in code}\n')
        if center:
            sums = {'sums': 'fp32', 'dweight': weight, 'dbias': weight, 'C': channels, 'NUM_SUMS': 2}
            sums |= {'BLOCK_P': triton_layer_norm._SUM_ROWS, 'BLOCK_C': triton_layer_norm._SUM_CHANNELS}
            compile_kernel(triton_layer_norm._sum_kernel, target, 4, sums)


if __name__ == '__main__':
    main(*sys.argv[1:])
