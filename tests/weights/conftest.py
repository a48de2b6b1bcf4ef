"""Shared by the tests of downloads: a cache of their own, no proxy, no waiting."""

import pytest

from vmzoo.weights import download


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    for name in (*download.OFFLINE, 'VMZOO_HOME', 'HF_ENDPOINT'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setenv('no_proxy', '*')
    monkeypatch.setattr(download, 'FIRST_WAIT', 0.0)
    return tmp_path / 'torch'


@pytest.fixture
def cache(torch_home):
    """Where downloads go; it does not exist yet."""
    return torch_home / 'hub/checkpoints'
