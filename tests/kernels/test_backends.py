"""The choice of a backend: automatic, by name, by environment, and what is said when one cannot run."""

import pytest
import torch

from vmzoo_kernels import available_backends, backends
from vmzoo_kernels.backends import resolve_backend

CPU, CUDA = torch.device('cpu'), torch.device('cuda', 0)


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    monkeypatch.delenv('VMZOO_SCAN_BACKEND', raising=False)
    backends._warn_slow.cache_clear()


def test_cpu_tensors_take_torch(no_interpreter):
    assert resolve_backend('auto', CPU) == 'torch'
    assert available_backends('cpu')['torch'] is None


def test_a_backend_asked_for_by_name_raises_with_the_reason(no_interpreter):
    with pytest.raises(RuntimeError, match='needs a CUDA or ROCm device, not cpu'):
        resolve_backend('triton', CPU)
    with pytest.raises(RuntimeError, match='needs a CUDA device, not cpu'):
        resolve_backend('cuda', CPU)


def test_unknown_backend():
    with pytest.raises(ValueError, match="unknown scan backend 'opencl'"):
        resolve_backend('opencl', CPU)


def test_slow_path_on_a_gpu_warns_once(no_interpreter, monkeypatch, recwarn):
    monkeypatch.setattr(backends, 'why_not_triton', lambda device: 'no Triton for this test')
    monkeypatch.setattr(backends, 'why_not_cuda', lambda device: 'no NVRTC for this test')
    assert resolve_backend('auto', CUDA) == resolve_backend('auto', CUDA) == 'torch'
    assert [str(w.message) for w in recwarn] == [
        'the selective scan runs on the slow torch backend on this GPU: no Triton for this test'
    ]


def test_gpu_tensors_take_cuda_then_triton(no_interpreter, monkeypatch):
    monkeypatch.setattr(backends, 'why_not_triton', lambda device: None)
    monkeypatch.setattr(backends, 'why_not_cuda', lambda device: None)
    assert resolve_backend('auto', CUDA) == 'cuda'
    assert resolve_backend('auto', CUDA, unfit='it takes other scans') == 'triton'
    with pytest.raises(RuntimeError, match='cannot run here: it takes other scans'):
        resolve_backend('cuda', CUDA, unfit='it takes other scans')
    with pytest.warns(UserWarning, match='slow torch backend on this GPU: it takes small squares'):
        assert resolve_backend('auto', CUDA, unfit='it takes circles', unfit_triton='it takes small squares') == 'torch'
    monkeypatch.setattr(backends, 'why_not_cuda', lambda device: 'no NVRTC for this test')
    assert resolve_backend('auto', CUDA) == 'triton'


def test_float64_stays_exact(no_interpreter, monkeypatch, recwarn):
    monkeypatch.setattr(backends, 'why_not_triton', lambda device: None)
    assert resolve_backend('auto', CUDA, torch.float64) == 'torch'
    assert not recwarn.list
    with pytest.raises(RuntimeError, match='the tensors are float64'):
        resolve_backend('triton', CUDA, torch.float64)


def test_environment_overrides_auto(no_interpreter, monkeypatch):
    monkeypatch.setattr(backends, 'why_not_triton', lambda device: None)
    monkeypatch.setenv('VMZOO_SCAN_BACKEND', 'torch')
    assert resolve_backend('auto', CUDA) == 'torch'
    assert resolve_backend('triton', CUDA) == 'triton'


def test_missing_triton_is_a_reason(no_interpreter, monkeypatch):
    monkeypatch.setattr(backends.importlib.util, 'find_spec', lambda name: None)
    backends._triton_missing.cache_clear()
    assert 'pip install triton' in backends.why_not_triton(CUDA)
    backends._triton_missing.cache_clear()
