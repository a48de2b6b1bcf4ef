"""Random orders of tokens."""

import torch
from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn


def random_order(length: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """A random permutation, int64 [L]: of `generator`, or of the default generator of `device`."""
    if generator is None:
        return torch.randperm(length, device=device)
    return torch.randperm(length, generator=generator, device=generator.device).to(device)


def fixed_order(length: int, seed: int, device: torch.device) -> Tensor:
    """A permutation without pattern, int64 [L], which depends on `length` and `seed` alone, not on the device."""
    keys = torch.arange(length, device=device) + (seed << 16)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # a hash of 32 bits that maps no two numbers to one
        keys = ((keys ^ (keys >> shift)) * factor) & 0xFFFFFFFF
    return torch.argsort(keys ^ (keys >> 16))


class LayerwiseShuffle(nn.Module):
    """Stochastic layer-wise shuffle (https://arxiv.org/abs/2408.17081): the order in which a layer sees its tokens.

    A regulariser of training, off in eval mode. The chance that a layer's tokens are shuffled grows linearly from 0 at
    the first layer to `rate` at the last; all tokens take part, and all samples of a batch have the same order.

    One uniform number a layer is drawn on the CPU, and a permutation on the tokens' device if the layer is to be
    shuffled: `torch.manual_seed` makes both repeatable. A compiled model draws the permutation in every layer.

    Args:
        rate: Chance of a shuffle at the last layer.
        depth: Number of layers.

    Attributes:
        generator: Where the numbers come from, on the CPU; None for torch's default generators.

    Raises:
        ValueError: A rate outside [0, 1].
    """

    def __init__(self, rate: float, depth: int):
        super().__init__()
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f'shuffle_rate is a probability between 0 and 1, got {rate}.')
        self.rate = rate
        self.rates = calculate_drop_path_rates(rate, depth)
        self.generator: torch.Generator | None = None

    def forward(self, layer: int, length: int, device: torch.device) -> Tensor | None:
        """The order of the layer's tokens [L]; None to leave them as they are."""
        if not self.training or not self.rate:
            return None
        draw = torch.rand(1, generator=self.generator)
        if not torch.compiler.is_compiling():
            return random_order(length, device, self.generator) if draw.item() < self.rates[layer] else None
        shuffled = random_order(length, device, self.generator)
        return torch.where(draw.to(device) < self.rates[layer], shuffled, torch.arange(length, device=device))

    def extra_repr(self) -> str:
        return f'rate={self.rate}'
