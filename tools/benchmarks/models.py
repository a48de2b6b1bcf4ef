"""Whole models: inference, training steps and their memory, eager and compiled."""

from collections.abc import Callable, Iterator, Sequence

import timm
import torch

import vmzoo  # noqa: F401  registers the models

from .timing import NAN, Row, Setting


def benchmark_models(
    setting: Setting, names: Sequence[str], modes: Sequence[str], batch_size: int, img_size: int, train: bool
) -> Iterator[Row]:
    """One row a mode ('eager', 'compile') and model, with times over those of the first model in the same mode; on a
    GPU also of the same calls as CUDA graphs."""
    for mode in modes:
        baseline = None
        for name in names:
            figures = time_model(setting, name, mode, batch_size, img_size, train)
            baseline = baseline or figures
            row = {'model': name, 'mode': mode, 'batch': batch_size, 'size': img_size}
            for phase in ('infer', 'train')[: 1 + train]:
                ms = figures[f'{phase} ms']
                row[f'{phase} first ms'] = figures[f'{phase} first ms']
                row[f'{phase} ms'] = ms
                row[f'{phase} img/s'] = 1e3 * batch_size / ms
                row[f'{phase} time / {names[0]}'] = ms / baseline[f'{phase} ms']
                if f'{phase} graph ms' in figures:
                    ms = figures[f'{phase} graph ms']
                    row[f'{phase} graph img/s'] = 1e3 * batch_size / ms
                    row[f'{phase} graph time / {names[0]}'] = ms / baseline[f'{phase} graph ms']
            if 'train peak GiB' in figures:
                row['train peak GiB'] = figures['train peak GiB']
            yield row


def time_model(setting: Setting, name: str, mode: str, batch_size: int, img_size: int, train: bool) -> dict[str, float]:
    """Times of inference and, with `train`, of forward and backward pass (no optimizer), under autocast; on a GPU also
    of CUDA graphs of them, for which the host does next to nothing."""
    torch.compiler.reset()
    setting.release_memory()
    device = setting.device
    model = timm.create_model(name).to(device).eval()
    call = torch.compile(model) if mode == 'compile' else model
    x = torch.randn(batch_size, 3, img_size, img_size, device=device)
    infer, step = make_passes(setting, model, call, x)
    figures = dict(zip(('infer first ms', 'infer ms'), setting.measure(infer)))
    if setting.on_gpu:
        figures['infer graph ms'] = setting.measure_graph(infer)
    if train:
        model.train()
        figures |= zip(('train first ms', 'train ms'), setting.measure(step))
        if setting.on_gpu:
            figures['train peak GiB'] = peak_memory(setting, step) / 2**30
            figures['train graph ms'] = setting.measure_graph(step)
    return figures


def make_passes(
    setting: Setting, model: torch.nn.Module, call: Callable[[torch.Tensor], object], x: torch.Tensor
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Inference, and forward and backward pass (no optimizer), of `call`, the model or what it was compiled to."""
    autocast = torch.autocast(setting.device.type, setting.dtype, enabled=setting.dtype != torch.float32)

    def infer():
        with torch.inference_mode(), autocast:
            return call(x)

    parameters = list(model.parameters())  # as an optimizer keeps them; to look for them takes longer than some steps

    def step():
        with autocast:
            loss = _loss(call(x))
        loss.backward()
        for parameter in parameters:
            parameter.grad = None

    return infer, step


def _loss(out: torch.Tensor | Sequence) -> torch.Tensor:
    if isinstance(out, torch.Tensor):
        return out.float().square().mean()
    return sum(map(_loss, out))  # of maps


def peak_memory(setting: Setting, step: Callable[[], object]) -> float:
    """Most bytes allocated during a step that was run before: weights and all that was there, and what it adds."""
    setting.release_memory()
    torch.cuda.reset_peak_memory_stats(setting.device)  # to what is allocated now
    try:
        step()
    except torch.OutOfMemoryError:
        return NAN
    return torch.cuda.max_memory_allocated(setting.device)
