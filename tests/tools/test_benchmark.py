"""tools/benchmark.py on tiny shapes: what it compares computes the same, and its table, CSV and plot are complete."""

import importlib.util
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch

import vmzoo  # noqa: F401  registers the models
from vmzoo.models._registry import family_of, list_architectures
from vmzoo_kernels import available_backends, get_routes, route_scan, selective_scan

ROOT = Path(__file__).parents[2]
TIMES = ('first fwd ms', 'first fwd+bwd ms', 'fwd ms', 'fwd+bwd ms')
OPS = ('ops', '--device', 'cpu', '--seconds', '0', '--shapes', '1,4,2,1', '--scan-shapes', '1,4,3,2')
SWEEP = ('ops', '--device', 'cpu', '--seconds', '0', '--sweep', '--sides', '2', '8', '--batches', '1', '2')
MODELS = ('models', '--device', 'cpu', '--seconds', '0', '--img-size', '32', '--models', 'test_convnext', 'vmamba_nano')
ZOO = ('zoo', '--device', 'cpu', '--seconds', '0', '--sizes', '32', '--batch-size', '1', '--baselines', 'test_convnext')


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


@pytest.mark.parametrize('name', ['cross', 'cascade_cols', 'atrous'])
@pytest.mark.parametrize('shared', [True, False])
def test_unfused_scan_equals_the_fused(benchmark, name, shared):
    from benchmarks.unfused import unfused_route_scan

    routes = get_routes(name, 3, 5)
    k, dim, d_state, rank = routes.num_routes, 6, 3, 2
    x = torch.randn(2, 15, dim) if shared else torch.randn(2, 15, k, dim)
    x_dbl = torch.randn(2, 15, k, rank + 2 * d_state)
    parameters = (-torch.rand(k, dim, d_state), torch.randn(k, dim), torch.randn(k, dim, rank), torch.randn(k, dim))
    inputs = [v.requires_grad_() for v in (x, x_dbl, *parameters)]
    for options in ({}, {'merge': False}, {'segment': 4}):
        got, want = (scan(*inputs, routes, **options) for scan in (unfused_route_scan, route_scan))
        torch.testing.assert_close(got, want)
        dy = torch.randn_like(want)
        torch.testing.assert_close(*(torch.autograd.grad(y, inputs, dy) for y in (got, want)))
    inputs = [v.bfloat16() if i in (0, 1, 4) else v for i, v in enumerate(inputs)]
    for out_dtype in (None, torch.float32):
        got, want = (scan(*inputs, routes, out_dtype=out_dtype) for scan in (unfused_route_scan, route_scan))
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


def test_models_are_switched_and_switched_back(benchmark):
    from benchmarks.unfused import unfused_operators

    model = timm.create_model('vmamba_nano').eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        want = model(x)
        with pytest.raises(KeyError), unfused_operators() as replaced:
            torch.testing.assert_close(model(x), want)
            assert replaced.calls == 5  # one a block
            raise KeyError
        assert torch.equal(model(x), want)
    assert replaced.calls == 5


def test_zoo(run, benchmark, tmp_path):
    names = ('vmamba_nano', 'no_such_model', 'vim_tiny_patch16_224')
    code, out, _ = run(*ZOO, '--models', *names, '--csv', tmp_path / 'zoo.csv')
    assert code == 0
    rows = {row['model']: row for row in read(benchmark, tmp_path / 'zoo.csv')}
    assert list(rows) == ['test_convnext', *names]
    assert all(line.count('|') == out.splitlines()[2].count('|') for line in out.splitlines()[2:])  # one table
    for phase in ('infer', 'train'):
        rate = rows['test_convnext'][f'{phase} img/s']
        assert rows['test_convnext'][f'{phase} speed / test_convnext'] == 1
        for name in ('vmamba_nano', 'vim_tiny_patch16_224'):
            row = rows[name]
            assert row[f'{phase} speed / test_convnext'] == pytest.approx(row[f'{phase} img/s'] / rate)
            assert row[f'{phase} speed / unfused'] > 0
    assert 'Unknown model (no_such_model)' in rows['no_such_model']['problems']
    assert 'infer img/s' not in rows['no_such_model']
    assert (
        not {'infer speed / unfused', 'problems'} & rows['test_convnext'].keys()
    )  # it has no scan, which is no problem


def test_zoo_goes_on_when_something_fails(run, benchmark, monkeypatch, tmp_path):
    def unfused(*args, **kwargs):
        raise torch.OutOfMemoryError if torch.is_inference_mode_enabled() else RuntimeError('no kernel\nof that size')

    monkeypatch.setattr('benchmarks.unfused.unfused_route_scan', unfused)
    code, _, _ = run(*ZOO, '--models', 'vmamba_nano', 'test_vit', '--csv', tmp_path / 'zoo.csv')
    assert code == 0
    row, after = read(benchmark, tmp_path / 'zoo.csv')[1:]
    assert row['problems'] == 'infer unfused: out of memory; train unfused: RuntimeError: no kernel'
    assert row['infer img/s'] > 0 and row['train img/s'] > 0
    assert after['train img/s'] > 0


def test_zoo_keeps_to_its_time(run, benchmark, tmp_path):
    argv = (*ZOO, '--batch-size', 5, '--sizes', 224, 448, '--models', 'vmamba_nano', '--budget', 0)
    code, _, _ = run(*argv, '--csv', tmp_path / 'zoo.csv')
    assert code == 0
    rows = read(benchmark, tmp_path / 'zoo.csv')
    assert [(row['size'], row['batch']) for row in rows] == [(224, 5), (224, 5), (448, 1), (448, 1)]
    row = rows[1]
    assert row['problems'] == '; '.join(
        f'{figure}: no time left' for figure in ('infer', 'train', 'infer unfused', 'train unfused')
    )


def test_measuring_ends_at_the_deadline(benchmark):
    setting = benchmark.Setting(torch.device('cpu'), torch.float32, 60)
    calls = []
    setting.measure(lambda: calls.append(None), deadline=0.0)
    assert len(calls) == 2  # the first, and one to measure


def test_zoo_takes_one_standard_model_a_family(benchmark):
    from benchmarks.zoo import standard_models

    names = standard_models()
    assert [family_of(name) for name in names] == sorted({family_of(name) for name in list_architectures()})
    assert {'vmamba_tiny_s1l8', 'vim_tiny_patch16_224', 'mambaout_femto', 'efficientvim_m1'} <= {*names}
    assert standard_models(['vim', 'vmamba']) == ['vim_tiny_patch16_224', 'vmamba_tiny_s1l8']


def test_a_run_that_is_cut_short_has_written_its_rows(run, benchmark, monkeypatch, tmp_path):
    def figures(*args):
        yield {'model': 'a', 'infer img/s': 1.0}
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, 'figures', figures)
    with pytest.raises(KeyboardInterrupt):
        run(*ZOO, '--csv', tmp_path / 'zoo.csv')
    assert [row['model'] for row in read(benchmark, tmp_path / 'zoo.csv')] == ['a']


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


@pytest.mark.parametrize(
    ('configs', 'size'), [(['tiny_mni152', 'vmamba_nano_digits'], 32), (['tiny_coins', '--torchvision-ops'], 64)]
)
def test_configs(run, benchmark, tmp_path, configs, size):
    pytest.importorskip('mmdet')
    options = ('--device', 'cpu', '--seconds', '0', '--train', '--batch-size', '2', '--img-size', size, size)
    backbones = ('--backbones', 'test_convnext', 'vmamba_nano')
    code, out, err = run('configs', *configs, *options, *backbones, '--csv', tmp_path / 'configs.csv')
    assert code == 0, err
    rows = read(benchmark, tmp_path / 'configs.csv')
    assert [row['backbone'] for row in rows[:2]] == ['test_convnext', 'vmamba_nano']
    assert rows[0]['train time / first'] == 1 and rows[1]['infer time / first'] > 0
    assert rows[1]['params M'] > 0.6 and rows[1]['GMACs'] > 0 and 'test_convnext' in out


def test_detectors_need_no_operator_of_mmcv():
    pytest.importorskip('mmdet')
    code = """
import importlib.util, sys
import vmzoo.mm.operators as operators
find_spec = operators.find_spec
operators.find_spec = lambda name: None if name == 'mmcv._ext' else find_spec(name)
sys.path.insert(0, sys.argv[1])
import torch
from benchmarks.configs import benchmark_configs
from benchmarks.timing import Setting
setting = Setting(torch.device('cpu'), torch.bfloat16, 0)
row, = benchmark_configs(setting, ['tiny_coins'], ['vmamba_nano'], (64, 64), 1, True)
assert row['train ms'] > 0 and not getattr(sys.modules['mmcv._ext'], '__file__', None)
try:
    sys.modules['mmcv._ext'].softnms()
except RuntimeError as error:
    print(error)
"""
    command = [sys.executable, '-c', code, str(ROOT / 'tools')]
    assert 'needs softnms' in subprocess.run(command, check=True, capture_output=True, text=True).stdout


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
        ((*ZOO, '--families', 'vmamba', 'resnet'), 'no family resnet: choose from '),
        ((*ZOO, '--families', 'vmamba', '--models', 'resnet18'), 'not allowed with argument'),
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
