"""What the tests of several families check."""

from collections.abc import Callable, Iterable

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn

import vmzoo


def loss_on_lines(model: nn.Module, steps: int, batch: int = 32, size: int = 32, lr: float = 2e-3) -> float:
    """The last loss of a short training of two classes, rows and columns: a task that needs the scan's directions."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        target = torch.randint(2, (batch,))
        lines = torch.randn(batch, 3, size, 1).expand(-1, -1, -1, size)
        x = torch.where(target.bool()[:, None, None, None], lines, lines.transpose(2, 3))
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@torch.no_grad()
def count_graphs(model: nn.Module, sizes: Iterable[tuple[int, int]]) -> int:
    """How many graphs one compiled model has for images of several sizes; its results are those of the model."""
    graphs = torch._dynamo.testing.CompileCounter()
    torch.compiler.reset()
    compiled = torch.compile(model.eval(), fullgraph=True, dynamic=True, backend=graphs)
    for height, width in sizes:
        x = torch.randn(2, 3, height, width)
        torch.testing.assert_close(compiled(x), model(x))
    return graphs.frame_count


@torch.inference_mode()
def assert_sizes_agree(make: Callable[..., nn.Module], height: int, width: int) -> None:
    """Models of 64x64 images that are set to another size or take any do as one that is built for that size."""
    source, dynamic, built = make().eval(), make(dynamic_img_size=True).eval(), make(img_size=(height, width)).eval()
    dynamic.load_state_dict(source.state_dict())
    built.load_state_dict(vmzoo.convert_state_dict(source.state_dict(), built))
    source.set_input_size((height, width))
    x = torch.randn(2, 3, height, width)
    want = built(x)
    assert torch.equal(source(x), want)
    assert torch.equal(dynamic(x), want)
    with pytest.raises(ValueError, match=f'built for images of {height}x{width}, got 64x64'):
        built(torch.randn(2, 3, 64, 64))
