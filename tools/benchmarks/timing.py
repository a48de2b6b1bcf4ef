"""How long a call takes, and what it ran on."""

import gc
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

import torch

Row = dict[str, object]
NAN = float('nan')


class Setting(NamedTuple):
    """Where, in which dtype and for how long each figure is measured."""

    device: torch.device
    dtype: torch.dtype
    seconds: float

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU's speed and memory."""
        return self.device.type == 'cuda'

    def describe(self, *packages: str) -> dict[str, str]:
        """The device, versions of torch, Triton and those of the other packages that are installed, and the dtype."""
        versions = []
        for package in ('torch', 'triton', *packages):
            try:
                versions.append(f'{package} {torch.__version__ if package == "torch" else metadata.version(package)}')
            except metadata.PackageNotFoundError:
                continue
        device = torch.cuda.get_device_name(self.device) if self.on_gpu else f'CPU, {torch.get_num_threads()} threads'
        return {'device': device, 'versions': ', '.join(versions), 'dtype': str(self.dtype).removeprefix('torch.')}

    def release_memory(self) -> None:
        """Gives back what the last measurement held."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def measure(self, function: Callable[[], object], deadline: float = float('inf')) -> tuple[float, float]:
        """Milliseconds of the first call, which compiles, and the median of those that follow; NaN if memory ends.

        Of those that follow there are at least five, or from the deadline (as of `time.perf_counter`) on at least one.

        On a GPU calls are timed by events and a few at a time: queued together they keep it busy, as in a model, so
        the time is the GPU's unless the host is the slower one.
        """

        def timed(calls: int) -> float:
            if not self.on_gpu:
                start = time.perf_counter()
                for _ in range(calls):
                    function()
                return 1e3 * (time.perf_counter() - start) / calls
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                function()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / calls

        if self.on_gpu:
            torch.cuda.synchronize()
        try:
            first = timed(1)
            calls = max(1, int(20 / timed(3))) if self.on_gpu else 1
            times, stop = [timed(calls)], min(time.perf_counter() + self.seconds, deadline)
            while len(times) < 1000 and time.perf_counter() < (deadline if len(times) < 5 else stop):
                times.append(timed(calls))
        except torch.OutOfMemoryError:
            return NAN, NAN
        return first, statistics.median(times)

    def measure_graph(self, function: Callable[[], object]) -> float:
        """Median milliseconds of the call replayed as a CUDA graph, for which the host does next to nothing.

        NaN on a CPU, and where the call cannot be captured or memory ends.
        """
        if not self.on_gpu:
            return NAN
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(stream):
                for _ in range(3):
                    function()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                function()
        except RuntimeError as error:  # OutOfMemoryError is one too
            print(f'no graph: {error}'.splitlines()[0])
            torch.cuda.synchronize()
            return NAN
        return self.measure(graph.replay)[1]
