"""Data-parallel training over two processes: no parameter goes unused, and gradients are those of the whole batch."""

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import vmzoo  # noqa: F401 (registers the models)

MODELS = {
    'vmamba_nano': {'num_classes': 10},
    'vmamba_v0_tiny': {'num_classes': 10, 'depths': (1, 1, 1, 1), 'embed_dim': 16},
    'vim_tiny_patch16_224': {'num_classes': 10, 'depth': 2, 'embed_dim': 32, 'img_size': 32},
}


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **MODELS[name]).double()


def batch() -> Tensor:
    return torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def worker(rank: int, store: str, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    grads = {}
    for name in MODELS:
        model = DistributedDataParallel(build(name))
        for _ in range(2):  # the second forward fails if the first backward left a parameter without gradient
            model.zero_grad()
            model(batch()[rank::2]).square().mean().backward()
        grads[name] = [p.grad for p in model.module.parameters()]
    if rank == 0:
        torch.save(grads, path)
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def gradients(tmp_path_factory) -> dict[str, list[Tensor]]:
    from models.test_ddp import worker  # spawned processes cannot import `tests`, of which others install one

    folder = tmp_path_factory.mktemp('ddp')
    mp.spawn(worker, args=(str(folder / 'store'), str(folder / 'gradients.pt')), nprocs=2)
    return torch.load(folder / 'gradients.pt', weights_only=True)


@pytest.mark.parametrize('name', MODELS)
def test_two_processes(name, gradients):
    model = build(name)
    model(batch()).square().mean().backward()
    for got, want in zip(gradients[name], (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(got, want)
