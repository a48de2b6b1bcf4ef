"""Published files are read as data: everything useful comes out, nothing in them runs."""

import argparse
import collections
import io
import logging
import pickle
import random
import sys
import tracemalloc
import types
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from vmzoo.weights import CheckpointError, read_checkpoint

FORMATS = {
    'zip': {},
    'zip-protocol-4': {'pickle_protocol': 4},
    'legacy': {'_use_new_zipfile_serialization': False},
}


@pytest.fixture
def config():
    """A config object as yacs makes them, of a class that cannot be imported when the file is read."""
    module = types.ModuleType('yacs_config')
    exec('class CfgNode(dict):\n    pass', module.__dict__)
    sys.modules['yacs_config'] = module
    node = module.CfgNode(MODEL=module.CfgNode(TYPE='vssm', DEPTHS=[2, 2, 5, 2]))
    node.frozen = True
    yield node
    sys.modules.pop('yacs_config', None)


def tensors():
    base = torch.arange(20.0).reshape(4, 5)
    return collections.OrderedDict(
        plain=base,
        transposed=base.t(),
        sliced=base[1:3, ::2],
        parameter=torch.nn.Parameter(torch.ones(3)),
        half=torch.randn(3).half(),
        bfloat=torch.randn(3).bfloat16(),
        counter=torch.tensor(7),
        mask=torch.tensor([True, False]),
        empty=torch.zeros(0, 4),
    )


@pytest.mark.parametrize('options', FORMATS.values(), ids=FORMATS)
def test_keeps_tensors_and_containers_and_drops_the_rest(tmp_path, config, caplog, options):
    state = tensors()
    path = tmp_path / 'published.pth'
    content = {
        'model': state,
        'epoch': 292,
        'max_accuracy': 82.2,
        'config': config,
        'args': argparse.Namespace(lr=1e-3),
        'history': [1, (2, 'three'), {'four', None}],
        'optimizer': {'state': {0: {'exp_avg': torch.ones(3)}}},
    }
    torch.save(content, path, **options)
    del sys.modules['yacs_config']

    with caplog.at_level(logging.INFO, 'vmzoo'):
        read = read_checkpoint(path)

    assert read.keys() == {'model', 'epoch', 'max_accuracy', 'history'}
    assert read['epoch'] == 292
    assert read['history'] == [1, (2, 'three'), {'four', None}]
    assert read['model'].keys() == state.keys()
    for name, value in state.items():
        assert read['model'][name].dtype == value.dtype
        assert torch.equal(read['model'][name], value)
    assert read['model']['plain'].untyped_storage().data_ptr() == read['model']['sliced'].untyped_storage().data_ptr()
    assert 'yacs_config.CfgNode' in caplog.text
    assert 'argparse.Namespace' in caplog.text
    assert 'yacs_config' not in sys.modules


def test_reads_safetensors_by_content(tmp_path):
    path = tmp_path / 'weights.bin'
    save_file({'a': torch.arange(3)}, path)
    assert torch.equal(read_checkpoint(path)['a'], torch.arange(3))


def write_zip(path, data_pkl, storage=b'\0' * 16, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, 'w', compression) as archive:
        archive.writestr('archive/data.pkl', data_pkl)
        archive.writestr('archive/byteorder', sys.byteorder)
        archive.writestr('archive/data/0', storage)
        archive.writestr('archive/version', '3\n')


class Call:
    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def text(value):
    return pickle.BINUNICODE + len(value).to_bytes(4, 'little') + value.encode()


def hostile_pickles(marker):
    """Ways to run `open(marker, 'w')` or a command that creates the file, or to change the process."""
    import os

    command = f'touch {marker}'
    wrap = {'model': {'w': 1}}

    def by_reduce(function, *args, protocol=2):
        return pickle.dumps(wrap | {'x': Call(function, *args)}, protocol)

    def raw(body):
        return b'\x80\x04}' + text('x') + body + b's.'

    write = f'open({str(marker)!r}, "w")'
    subclasses = pickle.GLOBAL + b'builtins\ngetattr\n('
    return {
        'os.system': by_reduce(os.system, command),
        'os.system, stack global': by_reduce(os.system, command, protocol=4),
        'eval': by_reduce(eval, write),
        'exec': by_reduce(exec, write),
        'nested call': by_reduce(Call, Call(eval, write)),
        'call of a call': raw(b'cbuiltins\ngetattr\n(cmath\nfloor\n' + text('__call__') + b'tR(I1\ntR'),
        'getattr chain': raw(
            subclasses + b'cbuiltins\n__dict__\n' + text('get') + b'tR(' + text('eval') + b'tR(' + text(write) + b'tR'
        ),
        'dotted name': raw(b'cpathlib\nos.system\n(' + text(command) + b'tR'),
        'inst': b'(S' + repr(command).encode() + b'\nios\nsystem\n.',
        'obj': raw(b'(cposix\nsystem\n' + text(command) + b'o'),
        'newobj': raw(b'csubprocess\nPopen\n(' + text('touch') + text(str(marker)) + b't\x81'),
        'extension': raw(b'\x82\x01'),
        'import with effects': raw(b'cthis\nd\n'),
        'build on an unknown object': raw(
            b'cyacs.config\nCfgNode\n)\x81}' + text('__setstate__') + b'cbuiltins\neval\nsb'
        ),
        'build on a torch function': raw(
            b'ctorch._utils\n_rebuild_tensor_v2\nN}' + text('__defaults__') + b'(I1\nts\x86b'
        ),
        'torch.load of another file': raw(b'ctorch\nload\n(' + text(str(marker)) + b'tR'),
        'persistent id': raw(b'cos\nsystem\nQ'),
    }


@pytest.mark.parametrize('name', hostile_pickles('marker'))
def test_hostile_pickle_has_no_effect(tmp_path, name):
    marker = tmp_path / 'marker'
    path = tmp_path / 'hostile.pth'
    write_zip(path, hostile_pickles(marker)[name])
    defaults = torch._utils._rebuild_tensor_v2.__defaults__

    try:
        read = read_checkpoint(path)
    except CheckpointError as error:
        assert str(path) in str(error)
    else:  # dropped: what the call would have returned is not there
        assert 'x' not in read
    assert not marker.exists()
    assert 'this' not in sys.modules
    assert torch._utils._rebuild_tensor_v2.__defaults__ == defaults


def test_hostile_pickle_is_named(tmp_path):
    path = tmp_path / 'hostile.pth'
    write_zip(path, hostile_pickles(tmp_path / 'marker')['os.system'])
    with pytest.raises(CheckpointError, match=r'refused, it asks for (posix|nt)\.system, .* Nothing in it was run'):
        read_checkpoint(path)


def test_the_tests_attack_is_real(tmp_path):
    marker = tmp_path / 'marker'
    pickle.loads(hostile_pickles(marker)['os.system'])
    assert marker.exists()


def storage_pickle(numel=4, size=(2, 2), stride=(2, 1), offset=0):
    def integers(values):
        return b'(' + b''.join(b'I%d\n' % value for value in values) + b't'

    pid = b'(' + text('storage') + b'ctorch\nFloatStorage\n' + text('0') + text('cpu') + b'I%d\ntQ' % numel
    tensor = b'ctorch._utils\n_rebuild_tensor_v2\n(' + pid + b'I%d\n' % offset + integers(size) + integers(stride)
    return b'\x80\x02}' + text('w') + tensor + b'\x89}tRs.'


def test_hand_written_pickle_is_read(tmp_path):
    write_zip(tmp_path / 'good.pth', storage_pickle())
    assert read_checkpoint(tmp_path / 'good.pth')['w'].tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    'change',
    [
        {'numel': 5},
        {'numel': 2},
        {'size': (4, 2)},
        {'offset': 1},
        {'stride': (20, 1)},
        {'size': (-1, 2)},
        {'numel': -4},
    ],
    ids=str,
)
def test_tensor_outside_its_storage_is_refused(tmp_path, change):
    write_zip(tmp_path / 'bad.pth', storage_pickle(**change))
    with pytest.raises(CheckpointError, match='not a readable checkpoint'):
        read_checkpoint(tmp_path / 'bad.pth')


def test_compressed_records_are_refused(tmp_path):
    write_zip(tmp_path / 'bomb.pth', storage_pickle(), storage=b'\0' * 100_000, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match='compressed'):
        read_checkpoint(tmp_path / 'bomb.pth')


def repeated_calls(function, argument, count):
    """A list of what `count` calls of one function with one shared argument return."""
    call = b'h\x01h\x00\x85R'
    return b'\x80\x02' + argument + b'q\x000' + function + b'q\x010}' + text('x') + b'](' + call * count + b'es.'


@pytest.mark.parametrize(
    'bomb',
    [
        b'\x80\x02}' + text('x') + b'cbuiltins\nbytearray\n(I200000000\ntRs.',
        repeated_calls(b'cbuiltins\nlist\n', b'](' + b'K\x01' * 5000 + b'e', 5000),
        repeated_calls(b'ccollections\nOrderedDict\n', b'](' + b'K\x01K\x01\x86' * 5000 + b'e', 5000),
        repeated_calls(b'c_codecs\nencode\n', text('x' * 20000), 5000),
        storage_pickle(size=(10**9, 4), stride=(0, 1)),
    ],
    ids=['number', 'lists', 'dicts', 'bytes', 'expanded'],
)
def test_small_file_cannot_fill_the_memory(tmp_path, bomb):
    write_zip(tmp_path / 'bomb.pth', bomb)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match='not a readable checkpoint'):
            read_checkpoint(tmp_path / 'bomb.pth')
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_expanded_tensor_is_read(tmp_path):
    torch.save({'w': torch.arange(3.0).expand(4, 3)}, tmp_path / 'expanded.pth')
    assert read_checkpoint(tmp_path / 'expanded.pth')['w'].tolist() == [[0, 1, 2]] * 4


def test_shared_and_cyclic_containers_end(tmp_path):
    doubled = []
    for _ in range(60):
        doubled = [doubled, doubled]
    cycle = {}
    cycle['self'] = cycle
    write_zip(tmp_path / 'deep.pth', pickle.dumps({'laughs': doubled, 'cycle': cycle}, 2))
    read = read_checkpoint(tmp_path / 'deep.pth')
    assert read['cycle']['self'] is read['cycle']


def checkpoint_bytes(kind):
    buffer = io.BytesIO()
    if kind == 'safetensors':
        from safetensors.torch import save

        return save({'a': torch.ones(30, 3), 'b': torch.zeros(5)})
    torch.save({'model': {'a': torch.ones(30, 3), 'b': torch.zeros(5)}, 'epoch': 1}, buffer, **FORMATS[kind])
    return buffer.getvalue()


@pytest.mark.parametrize('kind', [*FORMATS, 'safetensors'])
def test_truncated_file_is_named(tmp_path, kind):
    path = tmp_path / 'cut.pth'
    content = checkpoint_bytes(kind)
    for length in (len(content) - 1, len(content) // 2, 70, 12):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r'cut\.pth: not a readable checkpoint'):
            read_checkpoint(path)


@pytest.mark.parametrize('kind', [*FORMATS, 'safetensors'])
def test_damaged_files_raise_only_checkpoint_errors(tmp_path, kind):
    rng = random.Random(0)
    content = checkpoint_bytes(kind)
    path = tmp_path / 'damaged.pth'
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(min(len(damaged), 600))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read_checkpoint(path)
        except CheckpointError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ('content', 'cause'),
    [
        (b'', 'empty'),
        (b'<!DOCTYPE html><html>Sign in</html>', 'web page'),
        (b'version https://git-lfs.github.com/spec/v1\n', 'git lfs pull'),
        (b'\x89PNG\r\n\x1a\n' + b'\0' * 80, 'neither safetensors nor'),
        (pickle.dumps({'a': [1.0]}, 2), 'torch.save did not write'),
    ],
    ids=['empty', 'html', 'lfs', 'png', 'pickle'],
)
def test_other_files_are_told_apart(tmp_path, content, cause):
    path = tmp_path / 'weights.pth'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=cause):
        read_checkpoint(path)


def test_other_zip_archives_are_told_apart(tmp_path):
    with zipfile.ZipFile(tmp_path / 'photos.zip', 'w') as archive:
        archive.writestr('photos/1.jpg', b'')
    with pytest.raises(CheckpointError, match=r'no data\.pkl'):
        read_checkpoint(tmp_path / 'photos.zip')

    torch.jit.script(torch.nn.ReLU()).save(tmp_path / 'script.pt')
    with pytest.raises(CheckpointError, match='TorchScript'):
        read_checkpoint(tmp_path / 'script.pt')


def test_missing_file_and_whole_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'none\.pth'):
        read_checkpoint(tmp_path / 'none.pth')
    torch.save(torch.nn.Linear(2, 2), tmp_path / 'module.pth')
    with pytest.raises(CheckpointError, match=r'torch\.nn\.modules\.linear\.Linear, not a dict of weights'):
        read_checkpoint(tmp_path / 'module.pth')
