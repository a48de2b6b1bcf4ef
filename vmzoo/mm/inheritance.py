"""Configs that build on those of an installed library: `_base_ = 'mmseg::_base_/datasets/ade20k.py'`.

mmengine finds a library's configs by the name of its distribution, from a fixed list: OneDL's mmsegmentation is not in
it, nor is vmzoo. From the import of `vmzoo.mm` on, they are found by the name of the module, which both lines share.
"""

from importlib.util import find_spec
from pathlib import Path

from mmengine.config import Config

from .environment import INSTALL
from .names import suggestion

_get_local_path = Config._get_cfg_path


def config_folder(library: str = 'vmzoo') -> Path:
    """The folder of a library's configs: inside an installed package, beside it in a checkout.

    Raises:
        ImportError: There is no such library.
    """
    spec = find_spec(library) if library.isidentifier() else None
    if spec is None or spec.origin is None:
        raise ImportError(f'configs of {library} are asked for, which is not installed; run: {INSTALL}')
    package = Path(spec.origin).parent
    installed = package / '.mim' / 'configs'
    return installed if installed.is_dir() else package.parent / 'configs'


def find_base(cfg_path: str, filename: str) -> tuple[str, str | None]:
    """The file that a config builds on, and the scope of its names.

    Args:
        cfg_path: `library::path` in that library's configs, or a path relative to the config.
        filename: The config.

    Returns:
        The file; and the library, whose registry resolves the names in it. Names in vmzoo's configs are those of the
        config's `default_scope`.

    Raises:
        ImportError: The library is not installed.
        FileNotFoundError: It has no such config; the message names similar ones.
    """
    library, sign, name = cfg_path.partition('::')
    if not sign:
        return _get_local_path(cfg_path, filename)
    folder = config_folder(library)
    if not (folder / name).is_file():
        names = [path.relative_to(folder).as_posix() for path in folder.rglob('*.py')]
        hint = suggestion(name, names, f'they are in {folder}')
        raise FileNotFoundError(f'{filename}: {library} has no config {name}; {hint}')
    return str(folder / name), None if library == 'vmzoo' else library


Config._get_cfg_path = staticmethod(find_base)
