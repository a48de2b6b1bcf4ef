"""NVRTC compiles for GPUs that need not be there; what launches needs one."""

import struct
import threading
from pathlib import Path

import pytest
import torch

from vmzoo_kernels import nvrtc

CHECKS = Path(__file__).parent / 'emulator/checks.cu'


def missing():
    try:
        nvrtc._nvrtc()
    except RuntimeError as error:
        return str(error)


needs_nvrtc = pytest.mark.skipif(missing() is not None, reason=str(missing()))
needs_gpu = pytest.mark.skipif(nvrtc.why_not() is not None, reason=str(nvrtc.why_not()))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('VMZOO_CACHE_DIR', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


@pytest.fixture
def compilations(monkeypatch):
    """The options of each compilation."""
    seen, compile = [], nvrtc._compile
    monkeypatch.setattr(nvrtc, '_compile', lambda *args: seen.append(args[-1]) or compile(*args))
    return seen


def compiled(defines=(), kernel='shuffles', arch='sm_90', **kwargs):
    return nvrtc.compile_only(CHECKS, defines, kernel, arch, **kwargs)


@needs_nvrtc
@pytest.mark.parametrize('arch', ['sm_80', 'sm_90', 'sm_100'])
def test_machine_code_without_headers_or_gpu(arch):
    assert compiled(arch=arch)[:4] == b'\x7fELF'


@needs_nvrtc
def test_newer_gpus_get_portable_code():
    newest = max(nvrtc._supported())
    assert f'.target sm_{newest}\n'.encode() in compiled(arch=f'sm_{newest + 10}')


@needs_nvrtc
def test_cached_until_anything_changes(cache, compilations, tmp_path, monkeypatch):
    assert compiled() == compiled()
    assert len(compilations) == 1
    assert [path.suffix for path in cache.iterdir()] == ['.cubin']  # and no temporary file
    compiled(defines=(('SIZE', 3),))
    compiled(arch='sm_80')
    compiled(options=('--use_fast_math',))
    assert [set(options) - set(compilations[0]) for options in compilations[1:]] == [
        {'-DSIZE=3'},
        {'--gpu-architecture=sm_80'},
        {'--use_fast_math'},
    ]
    for path in nvrtc._HEADERS.glob('*.cuh'):
        (tmp_path / path.name).write_bytes(path.read_bytes() + b'\n')
    monkeypatch.setattr(nvrtc, '_HEADERS', tmp_path)
    compiled()
    assert len(compilations) == 5


@needs_nvrtc
@pytest.mark.parametrize('damage', [b'', b'garbage', None])
def test_damaged_files_are_made_again(cache, compilations, damage):
    binary = compiled()
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] if damage is None else damage)
    assert compiled() == binary
    assert path.read_bytes() == whole
    assert len(compilations) == 2


@needs_nvrtc
def test_a_cache_that_cannot_be_written_is_done_without(cache, compilations):
    cache.write_text('not a folder')
    assert compiled() == compiled()
    assert len(compilations) == 2


def test_cache_folder(monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', '/xdg')
    monkeypatch.setenv('HOME', '/home')
    assert nvrtc._cache_folder().name == 'cache'
    monkeypatch.delenv('VMZOO_CACHE_DIR')
    assert nvrtc._cache_folder() == Path('/xdg/vmzoo')
    monkeypatch.delenv('XDG_CACHE_HOME')
    assert nvrtc._cache_folder() == Path('/home/.cache/vmzoo')


@needs_nvrtc
def test_errors_show_the_compilers_messages(cache):
    with pytest.raises(RuntimeError, match=r'(?s)checks.cu does not compile.*-DSIZE=3.*checks.cu\(\d+\): error: '):
        compiled(defines=(('SIZE', 3), ('sums', 1)))
    assert not cache.exists()
    with pytest.raises(RuntimeError, match=r'checks.cu has no extern "C" kernel .nothing'):
        compiled(kernel='nothing')


def test_reasons(monkeypatch):
    why_not = nvrtc.why_not.__wrapped__
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.version, 'hip', None)
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    assert why_not() == 'torch sees no CUDA device'
    monkeypatch.setattr(torch.version, 'cuda', None)
    assert why_not() == 'torch is built without CUDA'
    monkeypatch.setattr(torch.version, 'hip', '6.4')
    assert 'ROCm' in why_not()


def test_a_missing_library_is_named_with_its_package(monkeypatch):
    monkeypatch.setattr(torch.version, 'hip', None)
    monkeypatch.setattr(torch.version, 'cuda', '99.0')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(nvrtc, '_nvrtc', nvrtc._nvrtc.__wrapped__)
    assert 'NVRTC of CUDA 99 is missing (pip install nvidia-cuda-nvrtc)' in nvrtc.why_not.__wrapped__()


def sum_blocks(x, output, shared_bytes=1024):
    """Start the sum of each row of x, [rows, 256]."""
    kernel = nvrtc.load(CHECKS, (), 'sum_blocks', x.device)
    params = struct.pack('PPi4x', x.data_ptr(), output.data_ptr(), 0)
    kernel.launch((len(x),), 256, shared_bytes, params)


@pytest.fixture
def rows():
    x = torch.randn(300, 256, device='cuda:0')
    return x, torch.full((300,), torch.nan, device='cuda:0'), x.sum(1)


@pytest.mark.gpu
@needs_gpu
def test_launch(rows):
    x, output, expected = rows
    sum_blocks(x, output)
    torch.testing.assert_close(output, expected)


@pytest.mark.gpu
@needs_gpu
def test_launch_in_another_thread_and_stream(rows):
    x, output, expected = rows
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def work():
        with torch.cuda.stream(stream):
            sum_blocks(x, output)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    stream.synchronize()
    torch.testing.assert_close(output, expected)


@pytest.mark.gpu
@needs_gpu
def test_loaded_and_launched_in_a_graph(rows):
    x, output, expected = rows
    nvrtc.load.cache_clear()
    nvrtc._module.cache_clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sum_blocks(x, output)
    assert output.isnan().all()
    graph.replay()
    torch.testing.assert_close(output, expected)


@pytest.mark.gpu
@needs_gpu
def test_attributes_and_limits(rows):
    x, output, expected = rows
    kernel = nvrtc.load(CHECKS, (), 'sum_blocks', x.device)
    assert 0 < kernel.registers <= 255
    assert (kernel.local_bytes, kernel.shared_bytes) == (0, 0)
    assert nvrtc.load(CHECKS, (), 'named_barriers', x.device).shared_bytes == 512
    sum_blocks(x, output, kernel.max_shared_bytes)
    torch.testing.assert_close(output, expected)
    with pytest.raises(RuntimeError, match=r'\(300,\) blocks of 256 threads'):
        sum_blocks(x, output, kernel.max_shared_bytes + 1)
