"""Reads a checkpoint as data: safetensors, or a PyTorch file of any age, without running anything that it holds."""

import io
import logging
import math
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ._pickle import DTYPES, Global, HostilePickle, Opaque, StorageSpec, TensorSpec, interpret
from .errors import CheckpointError

_logger = logging.getLogger(__name__)

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# Training state beside the weights: up to three times their size, and never needed to use them.
TRAINING_STATE = ('optimizer', 'optimizer_state_dict', 'lr_scheduler', 'scheduler', 'scaler', 'param_schedulers')
# Elements of a tensor that shows the same stored ones several times, as `expand` makes them.
MAX_EXPANDED = 1 << 24
MALFORMED = (
    *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError, RuntimeError, OSError),
    *(zipfile.BadZipFile, MemoryError),
)

LoadStorage = Callable[[StorageSpec], torch.Tensor]


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads tensors and plain containers from a checkpoint; everything else in it is dropped.

    Objects of other classes (configs, argument namespaces, schedulers) and the optimizer's state are left out. No code
    is imported or called on the file's behalf, and there is no fallback to an unsafe load.

    Args:
        path: A safetensors file, or one that `torch.save` wrote (zip, or the format before torch 1.6).

    Returns:
        What the file holds, still wrapped as it was published: `{'model': {...}, 'epoch': 300}` or a bare state dict.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is truncated, no checkpoint, or asks for a function that runs code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such checkpoint file')
    try:
        with path.open('rb') as file:
            head = file.read(64)
            file.seek(0)
            if head.startswith(b'PK\x03\x04'):
                checkpoint = _read_zip(file)
            elif head.startswith(b'\x80'):
                checkpoint = _read_legacy(file)
            elif head[8:9] == b'{':
                checkpoint = _read_safetensors(path)
            else:
                raise ValueError(_what_instead(head))
    except HostilePickle as error:
        raise CheckpointError(f'{path}: refused, {error}. Nothing in it was run. Do not use this file.') from error
    except MALFORMED as error:
        raise CheckpointError(f'{path}: not a readable checkpoint: {_reason(error)}') from error
    if not isinstance(checkpoint, dict):
        kind = getattr(checkpoint, 'name', type(checkpoint).__name__)
        raise CheckpointError(f'{path}: holds an object of {kind}, not a dict of weights. Save a state_dict instead.')
    return checkpoint


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f'damaged safetensors file ({error})') from error


def _read_zip(file: BinaryIO) -> Any:
    length = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        records = {info.filename.partition('/')[2]: info for info in archive.infolist()}
        if 'constants.pkl' in records:
            raise ValueError('a TorchScript archive, which is a program; save the state_dict of the model instead')
        if 'data.pkl' not in records:
            raise ValueError('a zip archive that torch.save did not write (it has no data.pkl)')
        # torch.save stores records as they are; compression or records that overlap would be a zip bomb.
        if any(info.compress_type != zipfile.ZIP_STORED for info in records.values()):
            raise ValueError('its records are compressed, which torch.save never does')
        if sum(info.file_size for info in records.values()) > length:
            raise ValueError('its records claim more bytes than the file has')

        def read(name: str) -> bytearray:
            info = records[name]
            buffer = bytearray(info.file_size)
            with archive.open(info) as record:
                if record.readinto(buffer) != info.file_size or record.read(1):
                    raise ValueError(f'record {name} is cut short')
            return buffer

        if 'byteorder' in records and read('byteorder') != sys.byteorder.encode():
            raise ValueError('it was written on a machine of the other byte order')
        tree = interpret(io.BytesIO(read('data.pkl')))
        return _build(tree, lambda storage: _from_bytes(read(f'data/{storage.key}'), storage))


def _read_legacy(file: BinaryIO) -> Any:
    try:
        magic = interpret(file)
    except MALFORMED as error:
        raise ValueError(f'a pickle that torch.save did not write ({_reason(error)})') from error
    if magic != LEGACY_MAGIC:
        raise ValueError('a pickle that torch.save did not write')
    interpret(file)  # protocol version
    if not interpret(file)['little_endian']:
        raise ValueError('it was written on a machine of the other byte order')
    tree = interpret(file)

    # The storages follow in the order of a key list: element count, then the elements.
    specs = {storage.key: storage for storage in _storages(tree)}
    storages = {}
    for key in interpret(file):
        spec = specs[str(key)]
        count = int.from_bytes(file.read(8), 'little')
        if count != spec.numel:
            raise ValueError(f'storage {key} has {count} elements, its tensors expect {spec.numel}')
        storages[spec.key] = _from_bytes(bytearray(file.read(count * spec.dtype.itemsize)), spec)
    return _build(tree, lambda storage: storages[storage.key])


def _from_bytes(data: bytearray, spec: StorageSpec) -> torch.Tensor:
    """Returns the storage as a flat tensor, (numel,), in the storage's dtype."""
    wanted = spec.numel * spec.dtype.itemsize
    if len(data) != wanted:
        raise ValueError(f'storage {spec.key} has {len(data)} bytes instead of {wanted}: the file is cut short')
    return torch.frombuffer(data, dtype=spec.dtype) if data else torch.empty(0, dtype=spec.dtype)


def _storages(tree: Any) -> list[StorageSpec]:
    found, seen, pending = [], set(), [tree]
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, TensorSpec):
            found.append(node.storage)
        elif isinstance(node, dict):
            pending.extend(node.values())
        elif isinstance(node, (list, tuple)):
            pending.extend(node)
    return found


def _build(tree: Any, load_storage: LoadStorage) -> Any:
    """Turns specs into tensors and drops what has no place in a checkpoint."""
    if not isinstance(tree, dict):
        return tree
    tree = {key: value for key, value in tree.items() if key not in TRAINING_STATE}
    storages: dict[str, torch.Tensor] = {}
    built: dict[int, Any] = {}
    dropped: set[str] = set()

    def keep(node: Any) -> bool:
        if isinstance(node, Opaque) or (isinstance(node, Global) and node.name not in DTYPES):
            dropped.add(node.name)
            return False
        return not isinstance(node, StorageSpec)

    def build(node: Any) -> Any:
        if id(node) in built:  # a shared or cyclic container is built once
            return built[id(node)]
        if isinstance(node, TensorSpec):
            key = node.storage.key
            if key not in storages:
                storages[key] = load_storage(node.storage)
            flat = storages[key].view(node.dtype)
            if math.prod(node.size) > max(flat.numel(), MAX_EXPANDED):
                raise ValueError(f'a tensor of size {node.size} repeats {flat.numel()} stored elements')
            result = flat.as_strided(node.size, node.stride, node.offset)
        elif isinstance(node, dict):
            result = built[id(node)] = {}
            result.update((key, build(value)) for key, value in node.items() if keep(value))
        elif isinstance(node, list):
            result = built[id(node)] = []
            result.extend(build(item) for item in node if keep(item))
        elif isinstance(node, tuple):
            result = tuple(build(item) for item in node if keep(item))
        elif isinstance(node, Global):
            result = DTYPES[node.name]
        else:
            result = node
        built[id(node)] = result
        return result

    result = build(tree)
    if dropped:
        _logger.info('Dropped objects of %s: only tensors and plain containers are read.', ', '.join(sorted(dropped)))
    return result


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return 'its containers are nested too deeply'
    if isinstance(error, zipfile.BadZipFile):
        return f'the file is cut short or damaged ({error})'
    return str(error) or type(error).__name__


def _what_instead(head: bytes) -> str:
    text = head.lstrip().lower()
    if not head:
        return 'the file is empty'
    if text.startswith(b'<'):
        return 'it is a web page (of a login or an error?); download the file itself'
    if text.startswith(b'version https://git-lfs'):
        return 'it is a Git LFS pointer; fetch the file itself with `git lfs pull`'
    return f'it starts with {head[:8]!r}, which is neither safetensors nor a file of torch.save'
