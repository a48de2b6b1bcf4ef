"""Routes: published index tables, and what must hold for every map size."""

import pytest
import torch
from golden import golden
from torch._dynamo.testing import CompileCounter

from vmzoo_kernels import (
    gather_routes,
    get_routes,
    join_map,
    merge_routes,
    route_names,
    routes_from_table,
    split_map,
)

MODES = {'cross2d': 'cross', 'unidi': 'unidi', 'bidi': 'bidi', 'rot': 'rotate'}
SHARED_OUT = ['atrous']  # each position belongs to one route
WHOLE = [name for name in route_names() if name not in SHARED_OUT]
SIZES = [(1, 1), (1, 9), (9, 1), (2, 3), (7, 7), (8, 31), (33, 56)]
FIXTURES = sorted(f'ops/{path.stem}' for path in (golden.DIR / 'ops').glob('cross_scan*.npz'))


@pytest.mark.parametrize('name', FIXTURES)
def test_matches_published_scan_and_merge(name):
    meta, want = golden.load(name)
    inputs = {k: torch.from_numpy(golden.make_input(**v)).double() for k, v in meta['inputs'].items()}
    x, ys, x4 = inputs['x'], inputs['ys'], inputs['x4']
    routes = get_routes(MODES[meta['config']['mode']], *x.shape[-2:])
    assert (routes.gather.flatten().numpy() == want['index']).all()

    def lanes(v):  # [B, 4, C, H, W] -> [B, K, 1, L, C]
        return v.flatten(3).transpose(2, 3).unsqueeze(2).requires_grad_()

    def published(v):  # [B, K, 1, L, C] -> [B, K, C, L]
        return v[:, :, 0].transpose(2, 3)

    x = x.flatten(2).mT.requires_grad_()  # [B, L, C]
    scan = published(gather_routes(x, routes))
    (scan * inputs['dscan']).sum().backward()
    ys = lanes(ys)
    merged = merge_routes(ys, routes).mT
    (merged * inputs['dmerge']).sum().backward()
    got = {
        'scan': scan,
        'scan_dx': x.grad.mT,
        'merge': merged,
        'merge_dy': published(ys.grad),
        'scan_1b1': published(gather_routes(x4.flatten(3).permute(0, 3, 1, 2), routes)),
        'merge_1b1': merge_routes(ys, routes, reduce=False).permute(0, 2, 3, 1),
    }
    for key, value in got.items():
        assert golden.error(value.numpy(force=True), want[key]) < 1e-6, key


@pytest.mark.parametrize('name', WHOLE)
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_every_route_visits_every_position_once(name, size):
    routes = get_routes(name, *size)
    length = size[0] * size[1]
    for table in (routes.gather, routes.merge):
        assert table.dtype == torch.int32
        assert (table.flatten(1).sort().values == torch.arange(length)).all()
    assert routes.complete and routes.num_positions == length


@pytest.mark.parametrize('name', [n for n in WHOLE if not n.startswith('cascade')])
def test_merge_undoes_gather(name):
    routes = get_routes(name, 5, 7)
    x = torch.randn(2, 35, 3)
    each = merge_routes(gather_routes(x, routes), routes, reduce=False)
    assert torch.equal(each, x.unsqueeze(2).expand_as(each))
    torch.testing.assert_close(merge_routes(gather_routes(x, routes), routes), routes.num_routes * x)


@pytest.mark.parametrize('name', SHARED_OUT)
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_routes_that_share_a_map_out(name, size):
    routes = get_routes(name, *size)
    length = size[0] * size[1]
    for table in (routes.gather, routes.merge):
        assert table.dtype == torch.int32
        assert torch.equal(table[table >= 0].sort().values, torch.arange(length, dtype=torch.int32))
    assert not routes.complete and routes.num_positions == length
    checked = routes_from_table(routes.gather, length, routes.merge)
    assert torch.equal(checked.parts.writer, routes.parts.writer)
    assert torch.equal(checked.parts.routes.gather, routes.parts.routes.gather)
    x = torch.randn(2, length, 3)
    parts = split_map(x, routes)
    assert torch.equal(parts.transpose(1, 2), gather_routes(x, routes).flatten(2, 3))
    assert torch.equal(join_map(parts, routes), x)


def test_atrous_visits_a_phase_of_the_map_along_each_route():
    even = get_routes('atrous', 4, 4)  # rows 0 1 2 3 / 4 5 6 7 / 8 9 10 11 / 12 13 14 15
    assert even.gather[:, 0].tolist() == [[0, 2, 8, 10], [4, 12, 6, 14], [1, 3, 9, 11], [5, 13, 7, 15]]
    odd = get_routes('atrous', 3, 3)  # rows 0 1 2 / 3 4 5 / 6 7 8, padded to 4x4
    assert odd.gather[:, 0].tolist() == [[0, 2, 6, 8], [3, -1, 5, -1], [1, -1, 7, -1], [4, -1, -1, -1]]


def test_parts_of_a_table_that_writes_elsewhere_than_it_reads():
    gather = torch.tensor([[[3, 1], [0, -1]], [[2, 4], [-1, -1]]])
    merge = torch.tensor([[[1, 3], [-1, 4]], [[0, -1], [2, -1]]])
    routes = routes_from_table(gather, 5, merge)
    assert routes.parts.routes.complete
    y = torch.randn(2, 2, 2, 2, 3)  # [B, K, S, T, D]
    assert torch.equal(join_map(y.flatten(2, 3).transpose(1, 2), routes), merge_routes(y, routes))
    assert routes_from_table(gather[:, :1], 5, merge[:, :1]).parts is None
    assert routes_from_table(torch.tensor([[0, 1], [1, 0]]), 2).parts is None


@pytest.mark.parametrize('name', [name for name in golden.names('mhsvm') if name.startswith('routes_')])
def test_matches_published_routes_of_heads(name):
    meta, want = golden.load(f'mhsvm/{name}')
    size = meta['config']['h'], meta['config']['w']
    tables = []
    for scan, letter in (('serpentine', 'C'), ('diagonal', 'X'), ('spiral', 'S'), ('raster', 'Z')):
        routes = get_routes(scan, *size)
        tables.append(routes.gather)
        for i, order in enumerate(routes.gather[::2, 0].numpy()):
            assert (order == want[f'{letter}{i}_order']).all(), scan
            assert (order.argsort() == want[f'{letter}{i}_inverse']).all(), scan
        assert torch.equal(routes.gather[1::2], routes.gather[::2].flip(2))
    for number in (3, 4):
        assert torch.equal(get_routes(f'heads_{number}', *size).gather, torch.cat(tables[:number]))


def test_cascade_leaves_the_second_direction_flipped():
    routes = get_routes('cascade_rows', 2, 3)
    assert routes.gather.tolist() == [[[0, 1, 2], [3, 4, 5]], [[2, 1, 0], [5, 4, 3]]]
    assert torch.equal(routes.merge[0], routes.merge[1])
    assert get_routes('cascade_cols', 2, 3).gather[1].tolist() == [[3, 0], [4, 1], [5, 2]]


def test_tables_are_shared_and_safe_to_train_with():
    with torch.inference_mode():
        routes = get_routes('cross', 3, 11)
    assert routes.gather is get_routes('cross', 3, 11).gather
    assert not routes.gather.is_inference()


@pytest.mark.parametrize('name', ['diagonal', 'spiral', 'heads_3', 'heads_4'])
def test_compilers_see_sorted_routes_as_one_operation(name):
    torch.library.opcheck(torch.ops.vmzoo.route_table, (name, 5, 7, torch.device('cpu')))
    graphs = CompileCounter()
    torch.compiler.reset()
    compiled = torch.compile(lambda x: get_routes(name, *x.shape).gather + 0, fullgraph=True, backend=graphs)
    assert torch.equal(compiled(torch.zeros(4, 6)), get_routes(name, 4, 6).gather)
    assert graphs.op_count == 2


def test_meta_device():
    assert get_routes('cross', 4, 5, device='meta').gather.device.type == 'meta'


def test_custom_table_with_padding():
    table = torch.full((2, 1, 6), -1)
    table[0, 0, :3] = torch.tensor([4, 0, 2])
    table[1, 0, 1:6] = torch.arange(5)
    routes = routes_from_table(table, 5)
    assert not routes.complete
    x = torch.randn(1, 5, 2)
    routed = gather_routes(x, routes)
    assert torch.equal(routed[0, 0, 0, :3], x[0, [4, 0, 2]])
    assert (routed[0, 0, 0, 3:] == 0).all() and (routed[0, 1, 0, 0] == 0).all()
    merged = merge_routes(routed, routes, reduce=False)
    assert (merged[0, 1, 0] == 0).all() and torch.equal(merged[0, :, 1], x[0])


@pytest.mark.parametrize(
    'table, message',
    [
        (torch.tensor([[0, 1, 1]]), 'reads position 1 2 times'),
        (torch.tensor([[0, 1, 3]]), 'allowed are 0 to 2'),
        (torch.tensor([[-2, 1, 2]]), 'positions from -2'),
        (torch.tensor([[0.0, 1.0, 2.0]]), 'integers'),
        (torch.tensor([0, 1, 2]), r'\[K, S, T\]'),
    ],
)
def test_bad_tables_are_refused(table, message):
    with pytest.raises(ValueError, match=message):
        routes_from_table(table, 3)


def test_bad_merge_tables_are_refused():
    gather = torch.tensor([[0, 1, 2]])
    with pytest.raises(ValueError, match='route 0 writes position 1 2 times'):
        routes_from_table(gather, 3, torch.tensor([[0, 1, 1]]))
    with pytest.raises(ValueError, match='same for gather and merge'):
        routes_from_table(gather, 3, torch.tensor([[0, 1]]))


def test_complete_means_that_all_is_read_and_written():
    every, part = torch.tensor([[2, 0, 1]]), torch.tensor([[-1, 0, 1]])
    tables = [(every, every), (every, part), (part, every), (part, part)]
    assert [routes_from_table(g, 3, m).complete for g, m in tables] == [True, False, False, False]


def test_unknown_name_and_empty_map():
    with pytest.raises(ValueError, match='cross'):
        get_routes('zigzag', 2, 2)
    with pytest.raises(ValueError, match='0x4'):
        get_routes('cross', 0, 4)
