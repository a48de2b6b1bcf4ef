"""tools/benchmark.py on tiny shapes: what it compares computes the same, and its table, CSV and plot are complete."""

import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vmzoo_kernels import available_backends, selective_scan

ROOT = Path(__file__).parents[2]
TIMES = ('first fwd ms', 'first fwd+bwd ms', 'fwd ms', 'fwd+bwd ms')
OPS = ('ops', '--device', 'cpu', '--seconds', '0', '--shapes', '1,4,2,1', '--scan-shapes', '1,4,3,2')
SWEEP = ('ops', '--device', 'cpu', '--seconds', '0', '--sweep', '--sides', '2', '8', '--batches', '1', '2')
MODELS = ('models', '--device', 'cpu', '--seconds', '0', '--img-size', '32', '--models', 'test_convnext', 'vmamba_nano')


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    spec = importlib.util.spec_from_file_location('benchmark_tool', ROOT / 'tools/benchmark.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(benchmark, capsys):
    def run(*argv):
        try:
            code = benchmark.main([str(arg) for arg in argv])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def mamba_ssm(monkeypatch):
    """Stands for the package."""
    module = ModuleType('mamba_ssm.ops.selective_scan_interface')
    module.selective_scan_fn = partial(selective_scan, backend='torch')
    for name in ('mamba_ssm', 'mamba_ssm.ops'):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def read(benchmark, path):
    rows = benchmark.read_csv(path)
    assert rows and all(row['device'].startswith('CPU, ') and row['dtype'] == 'float32' for row in rows)
    assert all(f'torch {torch.__version__}' in row['versions'] for row in rows)
    return rows


def test_both_sides_of_the_comparison_compute_the_same(benchmark):
    from benchmarks import ops

    setting = benchmark.Setting(torch.device('cpu'), torch.float32, 0)
    inputs = ops.ss2d_inputs(setting, 2, 6, 5, 3)
    torch.testing.assert_close(ops.fused(**inputs), ops.unfused(**inputs))


def test_ops(run, benchmark, mamba_ssm, tmp_path):
    """Every backend that runs here, each with the times of its baseline."""
    backends = [name for name, reason in available_backends('cpu').items() if reason is None]
    code, out, _ = run(*OPS, '--backend', *backends, '--csv', tmp_path / 'new/ops.csv')
    assert code == 0
    assert out.startswith(f'CPU, {torch.get_num_threads()} threads, torch {torch.__version__}')
    rows = read(benchmark, tmp_path / 'new/ops.csv')
    assert [(row['op'], row['backend']) for row in rows] == [
        (op, backend) for op in ('SS2D core', 'selective_scan') for backend in backends
    ]
    for row in rows:
        name = 'unfused' if row['op'] == 'SS2D core' else 'mamba-ssm'
        assert all(row[column] > 0 for column in TIMES)
        assert row['fwd ratio'] == pytest.approx(row[f'{name} fwd ms'] / row['fwd ms'])
        assert row['fwd+bwd ratio'] == pytest.approx(row[f'{name} fwd+bwd ms'] / row['fwd+bwd ms'])
    printed = [line for line in out.splitlines() if line.startswith('|')]
    assert len(printed) == len(rows) + 4  # two tables with a heading and a rule
    assert all(f' {column} ' in printed[0] for column in (*TIMES, 'unfused fwd ms', 'fwd ratio'))


def test_without_mamba_ssm_its_column_is_left_out(run, benchmark, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'mamba_ssm', None)
    code, out, _ = run(*OPS, '--csv', tmp_path / 'ops.csv')
    assert code == 0
    assert 'no column for mamba-ssm' in out
    row = read(benchmark, tmp_path / 'ops.csv')[-1]
    assert row['op'] == 'selective_scan' and not any('mamba' in column for column in row)


def test_sweep_is_drawn_and_drawn_again(run, benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules['benchmarks.ops'], 'SWEEP_PIXELS', 16 * 64)
    monkeypatch.setattr(sys.modules['benchmarks.ops'], 'SWEEP_SIDE', 5)
    code, out, _ = run(*SWEEP, '--csv', tmp_path / 'sweep.csv', '--plot', tmp_path / 'sweep.png')
    assert code == 0
    rows = read(benchmark, tmp_path / 'sweep.csv')
    assert [(row['sweep'], row['side'], row['batch']) for row in rows] == [
        ('equal work', 2, 4),
        ('equal work', 8, 1),
        ('one image', 2, 1),
        ('one image', 8, 1),
        ('batch', 5, 1),
        ('batch', 5, 2),
    ]
    for row in rows:
        assert row['fwd ns/pixel'] == pytest.approx(1e6 * row['fwd ms'] / (row['batch'] * row['side'] ** 2))
    small, large = rows[2:4]
    ratio = large['fwd ns/pixel'] / small['fwd ns/pixel']
    assert f'time per pixel of one image of 8x8 over that of one of 2x2: {ratio:.2f} forward' in out

    assert run('plot', tmp_path / 'sweep.csv', tmp_path / 'again.png')[0] == 0
    drawn, again = ((tmp_path / name).read_bytes() for name in ('sweep.png', 'again.png'))
    assert drawn.startswith(b'\x89PNG') and drawn == again
    assert sorted(path.name for path in tmp_path.iterdir()) == ['again.png', 'sweep.csv', 'sweep.png']


def test_curves(benchmark):
    from benchmarks.report import _curves

    rows = [
        {'backend': backend, 'batch': 1, 'side': 2, 'fwd ms': ms, 'unfused fwd ms': 9.0}
        for backend, ms in (('torch', 3.0), ('triton', 1.0))
    ]
    assert [(label, points[0][1], len(points)) for label, _, points in _curves(rows)] == [
        ('torch fwd', 3.0, 1),
        ('triton fwd', 1.0, 1),
        ('unfused fwd', 9.0, 1),
    ]


def test_models(run, benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend='aot_eager'))
    code, _, _ = run(*MODELS, '--train', '--compile', '--csv', tmp_path / 'models.csv')
    assert code == 0
    rows = read(benchmark, tmp_path / 'models.csv')
    assert [(row['mode'], row['model']) for row in rows] == [
        (mode, model) for mode in ('eager', 'compile') for model in ('test_convnext', 'vmamba_nano')
    ]
    for i, row in enumerate(rows):
        baseline = rows[i // 2 * 2]
        for phase in ('infer', 'train'):
            assert row[f'{phase} img/s'] == pytest.approx(1e3 / row[f'{phase} ms'])
            assert row[f'{phase} time / test_convnext'] == pytest.approx(row[f'{phase} ms'] / baseline[f'{phase} ms'])
    compiled = rows[3]
    assert compiled['infer first ms'] > 5 * compiled['infer ms']  # compilation is not in the median
    assert compiled['train first ms'] > 5 * compiled['train ms']


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_peak_memory_holds_the_weights_and_no_warm_up(benchmark):
    from benchmarks.models import peak_memory

    setting = benchmark.Setting(torch.device('cuda'), torch.float32, 0)
    before = torch.cuda.memory_allocated()
    weights = torch.zeros(2**26, device='cuda')
    warm_up = torch.zeros(2**28, device='cuda')
    del warm_up
    peak = peak_memory(setting, lambda: torch.zeros(2**24, device='cuda'))
    assert peak - before == 4 * (weights.numel() + 2**24)


def test_what_does_not_fit_the_memory_is_an_empty_cell(run, benchmark, monkeypatch, tmp_path):
    def unfused(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(sys.modules['benchmarks.ops'], 'unfused', unfused)
    code, out, _ = run(*OPS, '--csv', tmp_path / 'ops.csv')
    assert code == 0
    row = read(benchmark, tmp_path / 'ops.csv')[0]
    assert row['fwd ms'] > 0
    assert not {'unfused fwd ms', 'fwd ratio'} & row.keys()
    assert ' - |' in out


def test_a_scan_that_a_backend_does_not_take_is_left_out(run, benchmark, monkeypatch, tmp_path):
    def refuse(*args, backend='auto', **kwargs):
        if backend == 'torch':
            raise RuntimeError("scan backend 'torch' cannot run here: it takes maps")
        return selective_scan(*args, backend=backend, **kwargs)

    monkeypatch.setattr(sys.modules['benchmarks.ops'], 'selective_scan', refuse)
    code, out, _ = run(*OPS, '--backend', 'torch', 'auto', '--csv', tmp_path / 'ops.csv')
    assert code == 0
    assert "selective_scan: scan backend 'torch' cannot run here: it takes maps" in out
    rows = read(benchmark, tmp_path / 'ops.csv')
    assert [row['backend'] for row in rows if row['op'] == 'selective_scan'] == ['auto']


def test_a_csv_is_written_whole_or_not_at_all(benchmark, tmp_path):
    path = tmp_path / 'rows.csv'
    benchmark.write_csv([{'a': 1}], path)

    class Unprintable:
        def __str__(self):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        benchmark.write_csv([{'a': 2}, {'a': Unprintable()}], path)
    assert benchmark.read_csv(path) == [{'a': 1}]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (('plot', 'no.csv', 'no.png'), 'No such file'),
        (('plot', 'tables.csv', 'no.png'), 'there is no sweep to draw; make one: tools/benchmark.py ops --sweep'),
        ((*OPS, '--plot', 'no.png'), '--plot draws the sweeps: add --sweep'),
        ((*OPS, '--backend', 'fortran'), "no scan backend 'fortran': choose from auto, torch, "),
        (('ops', '--shapes', '1,2,3'), 'argument --shapes: invalid shape value'),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, tuple) else '',
)
def test_wrong_usage_is_named(run, benchmark, monkeypatch, tmp_path, argv, message):
    monkeypatch.chdir(tmp_path)
    benchmark.write_csv([{'op': 'SS2D core', 'fwd ms': 1.0}], tmp_path / 'tables.csv')
    code, _, err = run(*argv)
    assert code == 2
    assert message in err
    assert not (tmp_path / 'no.png').exists()
