"""Deterministic weights and inputs for comparing a model with its published reference.

A fixture is one file, FAMILY/NAME.npz: the outputs, and `meta` (JSON, as bytes): what was run. No weights are stored:
both sides fill every tensor of the state dict from its own key with `fill_tensor`, so equal keys and shapes mean equal
weights, and equal outputs mean the same function.
"""

import json
import zlib
from pathlib import Path

import numpy as np

DIR = Path(__file__).resolve().parent


def fill_tensor(key, shape):
    """Values for one state-dict entry: float32 array of `shape` (int64 zeros for step counters)."""
    name = key.rsplit('.', 1)[-1]
    if name in ('num_batches_tracked', 'relative_position_index'):
        return np.zeros(shape, dtype=np.int64)
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    noise = np.asarray(rng.standard_normal(tuple(shape)), dtype=np.float32)
    if len(shape) <= 1:
        if name == 'running_var':
            noise = np.abs(noise)
        return np.asarray(0.1 * noise + (name in ('weight', 'running_var')), dtype=np.float32)
    fan_in = shape[-1] if len(shape) <= 3 else int(np.prod(shape[1:]))
    return (noise / np.sqrt(max(fan_in, 1))).astype(np.float32)


def fill_state(keys):
    """State dict as numpy arrays for a list of [key, shape] pairs, as stored in a fixture's 'keys'."""
    return {key: fill_tensor(key, shape) for key, shape in keys}


def make_input(shape, seed=0):
    """Standard-normal float32 array of `shape`."""
    return np.random.default_rng(seed).standard_normal(tuple(shape)).astype(np.float32)


def summarize(array):
    """The flattened array in float32, or 512 evenly spaced values of one with more than 4,096."""
    flat = np.asarray(array, dtype=np.float32).reshape(-1)
    if flat.size <= 4096:
        return flat
    return flat[np.linspace(0, flat.size - 1, 4096).astype(np.int64)[::8]]


def save(path, meta, outputs):
    """Write PATH.npz. `meta` needs 'source', 'config', 'keys' and 'inputs'; `outputs` maps a name to an array of any
    size, stored as `summarize` gives them."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = dict(
        meta,
        outputs={
            k: dict(shape=list(np.shape(v)), mean=float(np.mean(v)), std=float(np.std(v))) for k, v in outputs.items()
        },
    )
    packed = np.frombuffer(json.dumps(meta, separators=(',', ':')).encode(), dtype=np.uint8)
    np.savez_compressed(path.parent / f'{path.name}.npz', meta=packed, **{k: summarize(v) for k, v in outputs.items()})


def load(name, root=DIR):
    """(meta, outputs) of a fixture, by its name relative to this folder, without suffix: 'vmamba/vmamba_tiny'."""
    with np.load(Path(root) / f'{name}.npz') as file:
        outputs = {key: file[key] for key in file.files if key != 'meta'}
        return json.loads(file['meta'].tobytes()), outputs


def names(family):
    """Names of a family's fixtures, sorted."""
    return sorted(path.stem for path in (DIR / family).glob('*.npz'))


def error(got, want):
    """Relative L2 error of an output array against a stored one: ||got - want|| / ||want||; inf on NaN or a shape
    mismatch."""
    got = summarize(got)
    if got.shape != want.shape or not np.isfinite(got).all():
        return float('inf')
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-12))
