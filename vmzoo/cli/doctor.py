"""`vmzoo doctor`: is this machine set up, and which scan backend will run?"""

import argparse
import platform
import sys
from importlib import metadata

import torch
from packaging.requirements import Requirement

from vmzoo_kernels import get_routes, route_scan
from vmzoo_kernels.backends import available_backends, resolve_backend

from .output import print_fields

VERSIONS = ('vmzoo', 'torch', 'torchvision', 'timm', 'triton', 'numpy', 'onedl-mmengine', 'onedl-mmcv')
EXTRAS = {'train': 'vmzoo train', 'mm': 'segmentation, detection'}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--selftest', action='store_true', help='also check every scan backend, in several shapes and dtypes'
    )
    parser.epilog = 'exit code: 0 if everything that vmzoo needs is here and the scan computes correctly, else 1'


def run(args: argparse.Namespace) -> int:
    """Prints the report; 1 if a requirement is not met or the scan's result is wrong."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    unmet = unmet_requirements()
    deviation = scan_deviation(device)
    works = deviation < 1e-4

    print_fields('Versions', [('python', f'{platform.python_version()} on {platform.platform()}'), *_versions()])
    print_fields('Device', _device())
    chosen = resolve_backend('auto', device)
    reasons = available_backends(device)
    print_fields(
        'Scan backend',
        [
            ('chosen', f'{chosen}, for {device.type} tensors'),
            *(
                (name, f'not used: {reason}' if reason else ('in use' if name == chosen else 'available'))
                for name, reason in reasons.items()
            ),
            (
                'check',
                f'{"correct" if works else "WRONG"}: largest deviation from the float64 reference {deviation:.1e}',
            ),
        ],
    )
    print_fields('Extras', [(extra, _extra_state(extra)) for extra in EXTRAS])
    for requirement in unmet:
        print(f'vmzoo doctor: error: {requirement}', file=sys.stderr)
    if not works:
        print(
            f'vmzoo doctor: error: the {chosen} backend computes wrong results here; please report it', file=sys.stderr
        )
    if args.selftest:
        from .selftest import run_selftest

        if not run_selftest(device):
            works = False
            print(
                'vmzoo doctor: error: the selftest found wrong results; VMZOO_SCAN_BACKEND=<another backend> avoids '
                'them. Please report the table.',
                file=sys.stderr,
            )
    return 1 if unmet or not works else 0


def unmet_requirements(extra: str = '') -> list[str]:
    """Compares what is installed with what the package declares, for its core or for one extra."""
    problems = []
    for line in metadata.requires('vmzoo') or ():
        requirement = Requirement(line)
        marker = requirement.marker
        if marker and not marker.evaluate({'extra': extra}):
            continue
        if extra and (marker is None or 'extra' not in str(marker)):
            continue
        wanted = f'{requirement.name}{requirement.specifier}'
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            problems.append(f'{wanted} is not installed')
        else:
            if not requirement.specifier.contains(installed, prereleases=True):
                problems.append(f'{wanted} is needed, {installed} is installed')
    return problems


def scan_deviation(device: torch.device) -> float:
    """Runs a small scan over four routes; returns its largest relative error against float64 on the CPU."""
    height, width, dim, rank, states = 5, 7, 16, 2, 4
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = draw(2, height * width, dim)
    x_dbl = draw(2, height * width, 4, rank + 2 * states)
    parameters = (-draw(4, dim, states).exp(), draw(4, dim), draw(4, dim, rank), draw(4, dim))
    exact = route_scan(x, x_dbl, *parameters, get_routes('cross', height, width), backend='torch')
    inputs = (tensor.to(device, torch.float32) for tensor in (x, x_dbl, *parameters))
    got = route_scan(*inputs, get_routes('cross', height, width, device=device)).cpu().double()
    return ((got - exact).abs().max() / exact.abs().max()).item()


def _versions() -> list[tuple[str, str]]:
    versions = []
    for name in VERSIONS:
        try:
            versions.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            versions.append((name, 'not installed'))
    return versions


def _device() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        build = 'built without CUDA' if torch.version.cuda is None and torch.version.hip is None else 'sees no GPU'
        return [('CPU', f'{torch.get_num_threads()} threads; torch {build}')]
    runtime = f'ROCm {torch.version.hip}' if torch.version.hip else f'CUDA {torch.version.cuda}'
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f'compute capability {properties.major}.{properties.minor}'
        memory = f'{properties.total_memory / 2**30:.0f} GiB'
        devices.append((f'GPU {index}', f'{properties.name}, {memory}, {capability}, {runtime}'))
    return devices


def _extra_state(extra: str) -> str:
    problems = unmet_requirements(extra)
    if not problems:
        return f'complete ({EXTRAS[extra]})'
    return f"{'; '.join(problems)}; for {EXTRAS[extra]}: pip install 'vmzoo[{extra}]'"
