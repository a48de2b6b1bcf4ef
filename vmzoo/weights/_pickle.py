"""A pickle interpreter that calls nothing.

Python's unpickler runs whatever a file names. This one walks the opcodes (`pickletools` only parses them) and builds
plain containers, numbers, strings and `TensorSpec`s itself. A global stays a name: it is never imported, never called;
an object built from an unknown one is an `Opaque`, which the reader drops. So the config objects in published files
(yacs, argparse, mmengine) cost nothing, and a hostile file has nothing to act with.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

# Nothing here would be called either; but a file that names one of these is no checkpoint to go on with.
HOSTILE_MODULES = {'os', 'posix', 'nt', 'sys', 'subprocess', 'shutil', 'socket', 'pty', 'runpy', 'importlib', 'ctypes'}
HOSTILE_BUILTINS = {'eval', 'exec', 'compile', 'open', '__import__', 'input', 'breakpoint'}
BUILTINS = ('builtins', '__builtin__')

DTYPES = {f'torch.{name}': value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
STORAGE_DTYPES = {
    'torch.DoubleStorage': torch.float64,
    'torch.FloatStorage': torch.float32,
    'torch.HalfStorage': torch.float16,
    'torch.BFloat16Storage': torch.bfloat16,
    'torch.LongStorage': torch.int64,
    'torch.IntStorage': torch.int32,
    'torch.ShortStorage': torch.int16,
    'torch.CharStorage': torch.int8,
    'torch.ByteStorage': torch.uint8,
    'torch.BoolStorage': torch.bool,
    'torch.ComplexFloatStorage': torch.complex64,
    'torch.ComplexDoubleStorage': torch.complex128,
    'torch.storage.UntypedStorage': torch.uint8,
}
DICTS = {'collections.OrderedDict', 'collections.Counter', 'collections.defaultdict'}

LITERALS = {
    *('INT', 'BININT', 'BININT1', 'BININT2', 'LONG', 'LONG1', 'LONG4', 'FLOAT', 'BINFLOAT'),
    *('STRING', 'BINSTRING', 'SHORT_BINSTRING', 'UNICODE', 'SHORT_BINUNICODE', 'BINUNICODE', 'BINUNICODE8'),
    *('BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8', 'BYTEARRAY8'),
}
# Keys and set members: hashing a nested tuple of a crafted file could take for ever.
SCALARS = (str, bytes, int, float, type(None))
CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
NO_EFFECT = {'PROTO', 'FRAME'}
MARK = object()
# How many elements may be copied for each byte of the file. Few are; a crafted file copies a long list many times.
COPIES_PER_BYTE = 16
SIZED = (str, bytes, list, tuple, dict, set)
# Has the arguments (function, class, its arguments, state), of which what the function makes is enough.
REBUILD_FROM_TYPE = 'torch._tensor._rebuild_from_type_v2'


class HostilePickle(ValueError):
    """The file names a function that runs code or commands."""


@dataclass(frozen=True)
class Global:
    name: str


@dataclass(eq=False)
class Opaque:
    """Stands for an object that is not rebuilt; `name` is the global that would have made it."""

    name: str


@dataclass(frozen=True)
class StorageSpec:
    key: str
    dtype: torch.dtype
    numel: int


@dataclass(eq=False)
class TensorSpec:
    storage: StorageSpec
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def interpret(file: BinaryIO) -> Any:
    """Reads one pickle up to and including its STOP.

    Returns:
        The object, made of plain containers, literals, `Global`, `Opaque`, `StorageSpec` and `TensorSpec`.

    Raises:
        HostilePickle: It names a function that runs code.
        ValueError, IndexError, KeyError, TypeError: It is malformed.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    copied = 0

    def construct(target: Any, args: Any) -> None:
        nonlocal copied
        if not isinstance(args, tuple):
            raise TypeError('the arguments of a call are not a tuple')
        if isinstance(target, Global) and target.name == REBUILD_FROM_TYPE:
            return construct(args[0], args[2])
        copied += sum(len(arg) for arg in args if isinstance(arg, SIZED))
        if copied > COPIES_PER_BYTE * file.tell():
            raise ValueError('it multiplies what it holds')
        stack.append(_construct(target, args))

    def pop_to_mark() -> list[Any]:
        items = []
        while (item := stack.pop()) is not MARK:
            items.append(item)
        return items[::-1]

    def set_items(target: Any, items: list[Any]) -> None:
        if isinstance(target, dict):
            target.update((k, v) for k, v in zip(items[::2], items[1::2], strict=True) if isinstance(k, SCALARS))

    for opcode, arg, _ in pickletools.genops(file):
        name = opcode.name
        if name in LITERALS:
            stack.append(arg)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in NO_EFFECT:
            pass
        elif name == 'MARK':
            stack.append(MARK)
        elif name == 'STOP':
            return stack.pop()
        # Containers
        elif name == 'EMPTY_DICT':
            stack.append({})
        elif name == 'EMPTY_LIST':
            stack.append([])
        elif name == 'EMPTY_TUPLE':
            stack.append(())
        elif name == 'EMPTY_SET':
            stack.append(set())
        elif name in ('TUPLE1', 'TUPLE2', 'TUPLE3'):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == 'TUPLE':
            stack.append(tuple(pop_to_mark()))
        elif name == 'LIST':
            stack.append(pop_to_mark())
        elif name == 'DICT':
            target, items = {}, pop_to_mark()
            set_items(target, items)
            stack.append(target)
        elif name == 'FROZENSET':
            stack.append(_scalar_set(pop_to_mark()))
        elif name in ('APPEND', 'APPENDS'):
            items = [stack.pop()] if name == 'APPEND' else pop_to_mark()
            if isinstance(stack[-1], list):
                stack[-1].extend(items)
        elif name == 'ADDITEMS':
            items = pop_to_mark()
            if isinstance(stack[-1], set):
                stack[-1].update(_scalar_set(items))
        elif name in ('SETITEM', 'SETITEMS'):
            items = [stack.pop(), stack.pop()][::-1] if name == 'SETITEM' else pop_to_mark()
            set_items(stack[-1], items)
        # Stack and memo
        elif name == 'POP':
            stack.pop()
        elif name == 'POP_MARK':
            pop_to_mark()
        elif name == 'DUP':
            stack.append(stack[-1])
        elif name in ('PUT', 'BINPUT', 'LONG_BINPUT'):
            memo[arg] = stack[-1]
        elif name == 'MEMOIZE':
            memo[len(memo)] = stack[-1]
        elif name in ('GET', 'BINGET', 'LONG_BINGET'):
            stack.append(memo[arg])
        # Objects
        elif name == 'GLOBAL':
            stack.append(_global(*arg.split(' ', 1)))
        elif name == 'STACK_GLOBAL':
            attribute, module = stack.pop(), stack.pop()
            stack.append(_global(module, attribute))
        elif name in ('REDUCE', 'NEWOBJ'):
            args, target = stack.pop(), stack.pop()
            construct(target, args)
        elif name == 'NEWOBJ_EX':
            _, args, target = stack.pop(), stack.pop(), stack.pop()
            construct(target, args)
        elif name == 'INST':
            construct(_global(*arg.split(' ', 1)), tuple(pop_to_mark()))
        elif name == 'OBJ':
            target, *args = pop_to_mark()
            construct(target, tuple(args))
        elif name == 'BUILD':
            # The state of an object that is not rebuilt, or attributes of a container (OrderedDict's _metadata).
            stack.pop()
        elif name == 'BINPERSID':
            stack.append(_storage(stack.pop()))
        else:
            raise ValueError(f'pickle opcode {name} has no place in a checkpoint')
    raise EOFError('the pickle ends without STOP')


def _global(module: Any, name: Any) -> Global:
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError('a global is not named by two strings')
    hostile = module.split('.')[0] in HOSTILE_MODULES
    if hostile or (module in BUILTINS and name.split('.')[0] in HOSTILE_BUILTINS):
        raise HostilePickle(f'it asks for {module}.{name}, which can run commands or code')
    return Global(f'builtins.{name}' if module in BUILTINS else f'{module}.{name}')


def _storage(pid: Any) -> StorageSpec:
    # ('storage', class, key, device, numel), and in files older than torch 1.6 a view, which torch no longer writes
    kind, storage_class, key, _, numel, *view = pid
    if kind != 'storage' or any(view) or not isinstance(storage_class, Global):
        raise ValueError('a persistent id is not a tensor storage')
    return StorageSpec(str(key), STORAGE_DTYPES[storage_class.name], _index(numel))


def _index(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f'{value!r} is not a size')
    return value


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any, dtype: torch.dtype | None = None) -> Any:
    if not isinstance(storage, StorageSpec):
        return Opaque('a tensor without storage')
    return TensorSpec(
        storage, dtype or storage.dtype, _index(offset), tuple(map(_index, size)), tuple(map(_index, stride))
    )


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Any:
    return _tensor(storage, offset, size, stride, dtype=DTYPES[dtype.name])


def _first(value: Any, *rest: Any) -> Any:
    return value


def _bytes(data: str | bytes = b'', encoding: str = 'latin1') -> bytes:
    return data.encode('latin1') if isinstance(data, str) else memoryview(data).tobytes()


def _dict(items: Any = ()) -> dict[Any, Any]:
    pairs = items.items() if isinstance(items, dict) else items
    return {key: value for key, value in pairs if isinstance(key, SCALARS)}


def _scalar_set(items: Any = ()) -> set[Any]:
    return {item for item in items if isinstance(item, SCALARS)}


# What may be rebuilt, and how: our own functions under the names that torch and Python write.
CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    'torch._utils._rebuild_tensor': _tensor,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._utils._rebuild_tensor_v3': _tensor_v3,
    'torch._utils._rebuild_parameter': _first,
    'torch._utils._rebuild_parameter_with_state': _first,
    'torch.Size': tuple,
    'torch.device': _first,
    '_codecs.encode': _bytes,
    'builtins.bytearray': _bytes,
    'builtins.complex': complex,
    'builtins.dict': _dict,
    'builtins.frozenset': _scalar_set,
    'builtins.list': list,
    'builtins.set': _scalar_set,
    'builtins.tuple': tuple,
}


def _construct(target: Any, args: tuple[Any, ...]) -> Any:
    if not isinstance(target, Global):
        return Opaque(getattr(target, 'name', type(target).__name__))
    if target.name in DICTS:
        # An argument is either the items of an OrderedDict or the factory of a defaultdict.
        return _dict(args[-1]) if args and isinstance(args[-1], (list, dict)) else {}
    if target.name not in CONSTRUCTORS:
        return Opaque(target.name)
    if any(isinstance(arg, Opaque) for arg in args[:1]):
        return args[0]
    return CONSTRUCTORS[target.name](*args)
