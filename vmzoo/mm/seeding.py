"""Random augmentation that depends on a sample's place in the training alone.

Neither the number of loader workers nor an interruption changes it, so that a resumed training sees what an
uninterrupted one would have seen. `VMZooRunner` wraps every training loader's dataset and sampler in these two.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.registry import DATA_SAMPLERS, DATASETS
from torch.utils.data import Dataset, Sampler


class SeededIndex(int):
    """An index that carries the seed of its sample to the loader's worker."""

    seed: tuple[int, ...]


class _Wrapper:
    """Looks like what it wraps."""

    def __getattr__(self, name):
        if name.startswith('__') or 'wrapped' not in self.__dict__:  # a copy under construction
            raise AttributeError(name)
        return getattr(self.wrapped, name)

    def __len__(self) -> int:
        return len(self.wrapped)


@DATA_SAMPLERS.register_module()
class SeededSampler(_Wrapper, Sampler):
    """Number the samples of any sampler.

    Args:
        sampler: Config of the sampler.
        dataset: The dataset.
        seed: Seed of the training.
    """

    def __init__(self, sampler: dict, dataset: Dataset, seed: int | None = None) -> None:
        self.wrapped = DATA_SAMPLERS.build(sampler, default_args=dict(dataset=dataset, seed=seed))
        self.seed = seed or 0
        self.first = 0

    def __iter__(self) -> Iterator[SeededIndex]:
        epoch = getattr(self.wrapped, 'epoch', 0)
        for number, index in enumerate(self.wrapped, self.first):
            seeded = SeededIndex(index)
            seeded.seed = (self.seed, get_rank(), epoch, number)
            yield seeded

    def __getattr__(self, name):
        value = super().__getattr__(name)
        return self._counted(value) if name == 'skip' else value

    def _counted(self, skip):
        """mmengine's loops skip what was trained on before the interruption, if the sampler can."""

        def wrapper(num_samples: int) -> None:
            skip(num_samples)
            self.first = num_samples

        return wrapper


@DATASETS.register_module()
class SeededDataset(_Wrapper, Dataset):
    """Seed the generators that transforms draw from, for each sample, and restore them.

    Args:
        dataset: Config of the dataset.
    """

    def __init__(self, dataset: dict) -> None:
        self.wrapped = DATASETS.build(dataset)

    def __getitem__(self, index: int):
        if not isinstance(index, SeededIndex):
            return self.wrapped[index]
        with seeded(index.seed):
            return self.wrapped[int(index)]


@contextmanager
def seeded(seed: tuple[int, ...]):
    """Python's, NumPy's and torch's generators of the CPU, seeded; after the block as they were before it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence(seed).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
