"""What `import vmzoo` may cost and touch, what a wheel holds, and the rules that source files keep."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
# timm itself imports torch's compiler, and that Triton; what counts is what vmzoo adds.
HEAVY = (
    'triton',
    'vmzoo_kernels.triton_scan',
    'mmengine',
    'mmcv',
    'mmseg',
    'mmdet',
    'mmpretrain',
    'matplotlib',
    'sklearn',
    'skimage',
    'cv2',
    'nibabel',
    'pydicom',
    'h5py',
)


def python(code, *options):
    return subprocess.run([sys.executable, *options, '-c', code], capture_output=True, text=True)


def output(code, *options):
    result = python(code, *options)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return result.stdout


def test_import_takes_under_two_seconds_beyond_torch_and_timm():
    code = 'import time, torch, timm; start = time.perf_counter(); import vmzoo; print(time.perf_counter() - start)'
    assert min(float(output(code)) for _ in range(3)) < 2


def test_import_is_silent_and_light():
    code = f"""
import sys, warnings
import torch, timm
before = set(sys.modules)
warnings.simplefilter('error')
import vmzoo
sys.stdout.write(','.join(name for name in {HEAVY} if name in set(sys.modules) - before))
"""
    assert output(code) == ''


def test_import_opens_no_connection_and_writes_no_file():
    code = """
import os, sys
import torch, timm
seen = []
def watch(event, args):
    if event.startswith('socket.') or event in ('subprocess.Popen', 'os.system', 'os.mkdir'):
        seen.append((event, args))
    if event == 'open' and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        seen.append((event, args[0]))
sys.addaudithook(watch)
import vmzoo
assert not seen, seen
open(os.devnull, 'w').close()
assert seen, 'the hook sees nothing'
"""
    output(code, '-B')


def test_kernels_need_torch_alone():
    code = """
import sys, vmzoo_kernels
print([name for name in ('timm', 'vmzoo', 'vmzoo_kernels.triton_scan') if name in sys.modules])
"""
    assert output(code).strip() == '[]'


def test_models_are_registered_by_the_import():
    assert output("import vmzoo, timm; print(timm.is_model('vmamba_nano'))").strip() == 'True'


def test_convert_state_dict_is_public():
    assert output('import vmzoo; print(vmzoo.convert_state_dict.__module__)').strip() == 'vmzoo.weights.convert'


@pytest.mark.parametrize('command', ['vmzoo', 'python -m vmzoo'])
def test_commands_are_installed(command):
    script = [str(Path(sys.executable).with_name('vmzoo'))] if command == 'vmzoo' else [sys.executable, '-m', 'vmzoo']
    result = subprocess.run([*script, '--version'], capture_output=True, text=True)
    assert result.returncode == 0
    assert re.fullmatch(r'vmzoo \d+\.\d+\.\d+\n', result.stdout)


@pytest.fixture(scope='module')
def wheel_contents(tmp_path_factory):
    """Builds a wheel from a copy of the sources and unpacks it."""
    source, target = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('target')
    ignore = shutil.ignore_patterns('__pycache__', '*.egg-info')
    for name in ('vmzoo', 'kernels', 'configs'):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', '--no-index', '--no-deps']
    subprocess.run([*pip, '--no-build-isolation', '--target', target, source], check=True, capture_output=True)
    return target


def test_wheel_holds_everything(wheel_contents):
    for folder, package in ((ROOT, 'vmzoo'), (ROOT / 'kernels', 'vmzoo_kernels')):
        for path in (folder / package).rglob('*'):
            if path.suffix in ('.py', '.json', '.cu', '.cuh'):
                assert (wheel_contents / path.relative_to(folder)).is_file(), path
    for path in (ROOT / 'configs').rglob('*.py'):
        assert (wheel_contents / 'vmzoo/.mim' / path.relative_to(ROOT)).is_file(), path
    assert not (wheel_contents / 'tests').exists()


def test_wheel_works(wheel_contents):
    code = f"""
import sys
sys.path.insert(0, {str(wheel_contents)!r})
import vmzoo, vmzoo_kernels, timm, torch
from vmzoo.models._registry import summary_of
assert vmzoo.__file__.startswith({str(wheel_contents)!r}) and vmzoo_kernels.__file__.startswith({str(wheel_contents)!r})
summary_of('vmamba_nano')
print(tuple(timm.create_model('vmamba_nano', num_classes=10)(torch.zeros(1, 3, 32, 32)).shape))
"""
    assert output(code).strip() == '(1, 10)'


LAYERS = {
    # package: what it may not import
    'kernels/vmzoo_kernels': ('vmzoo', 'timm'),
    'vmzoo/layers': ('vmzoo.models', 'vmzoo.weights', 'vmzoo.mm', 'vmzoo.cli', 'mmengine'),
    'vmzoo/models': ('vmzoo.mm', 'vmzoo.cli', 'mmengine'),
    'vmzoo/weights': ('vmzoo.mm', 'vmzoo.cli', 'mmengine'),
    'vmzoo/io': ('vmzoo.models', 'vmzoo.weights', 'vmzoo.mm', 'vmzoo.cli', 'mmengine'),
    'vmzoo/mm': ('vmzoo.cli',),
}


def imported_modules(path):
    package = path.relative_to(ROOT).with_suffix('').parts
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = '.'.join(package[: len(package) - node.level]) if node.level else ''
            module = '.'.join(filter(None, (parent, node.module)))
            yield module
            yield from (f'{module}.{alias.name}' for alias in node.names)


@pytest.mark.parametrize('package', LAYERS)
def test_imports_point_one_way(package):
    for path in (ROOT / package).rglob('*.py'):
        for module in imported_modules(path):
            wrong = [name for name in LAYERS[package] if module == name or module.startswith(f'{name}.')]
            assert not wrong, f'{path.relative_to(ROOT)} imports {module}'


def source_rules():
    config = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text(encoding='utf-8'))
    hooks = [hook for repo in config['repos'] for hook in repo['hooks']]
    return {hook['id']: hook for hook in hooks if hook.get('language') == 'pygrep'}


@pytest.mark.parametrize('rule', source_rules())
def test_sources_keep_the_pre_commit_rules(rule):
    hook = source_rules()[rule]
    found = []
    for folder in ('vmzoo', 'kernels', 'tools', 'configs', 'tests'):
        for path in (ROOT / folder).rglob('*.py'):
            name = path.relative_to(ROOT).as_posix()
            if not re.search(hook.get('files', ''), name) or re.search(hook.get('exclude', '^$'), name):
                continue
            lines = path.read_text(encoding='utf-8').splitlines()
            found += [f'{name}:{i}: {line}' for i, line in enumerate(lines, 1) if re.search(hook['entry'], line)]
    assert not found, f'{hook["name"]}:\n' + '\n'.join(found)
