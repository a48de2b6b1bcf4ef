"""Are the mm libraries installed, once and whole? If not: what to do about it."""

import importlib
from importlib import metadata
from importlib.util import find_spec

INSTALL = 'pip install "vmzoo[mm]"'
# Import name -> distributions that provide it: OneDL's, which is maintained, and OpenMMLab's.
DISTRIBUTIONS = {
    'mmengine': ('onedl-mmengine', 'mmengine', 'mmengine-lite'),
    'mmcv': ('onedl-mmcv', 'mmcv', 'mmcv-lite', 'mmcv-full'),
    'mmseg': ('onedl-mmsegmentation', 'mmsegmentation'),
    'mmdet': ('onedl-mmdetection', 'mmdet'),
    'mmpretrain': ('onedl-mmpretrain', 'mmpretrain'),
}
TRAINING = ('cv2', 'matplotlib', 'mmengine', 'sklearn', 'tensorboard')


def installed(distribution: str) -> bool:
    """Whether pip knows a distribution."""
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def check_training() -> None:
    """Look for what a training needs, some of it only at its end, which is late to say so.

    Raises:
        ImportError: Something is missing, broken or there twice; the message has the command that puts it right.
    """
    for module, names in DISTRIBUTIONS.items():
        found = [name for name in names if installed(name)]
        if len(found) > 1:
            raise ImportError(
                f'{" and ".join(found)} are both installed and overwrite each other, because both provide {module}; '
                f'run: pip uninstall --yes {" ".join(found)} && {INSTALL}'
            )
    for module in TRAINING:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ImportError(
                f'training needs {error.name}, which is not installed; run: pip install "vmzoo[train]"'
            ) from error
        except ImportError as error:
            if module != 'cv2':
                raise
            raise ImportError(
                f'OpenCV cannot be loaded ({error}). The mm libraries bring a build that needs the system libraries '
                'of a desktop; run: pip install --force-reinstall --no-deps opencv-python-headless'
            ) from error


def require(module: str) -> None:
    """Import a part of an mm library: `mmdet`, or `mmcv.ops` for its compiled operators.

    Raises:
        ImportError: The library is missing or cannot be imported; the message has the command that puts it right.
    """
    library = module.partition('.')[0]
    if find_spec(library) is None:
        raise ImportError(f'this needs {library}, which is not installed; run: {INSTALL}')
    try:
        importlib.import_module(module)
    except Exception as error:  # the libraries assert versions, and a compiled module can fail in any way
        version = next((metadata.version(name) for name in DISTRIBUTIONS.get(library, ()) if installed(name)), '')
        remedy = f'The libraries do not fit together; run: {INSTALL} --upgrade'
        if 'mmcv' in f'{module} {error}' and not isinstance(error, AssertionError):
            remedy = "mmcv's compiled operators must be built for the installed torch: see 'Installation' in docs/mm.md"
        raise ImportError(
            f'{library} {version} is installed, but {module} cannot be imported: {type(error).__name__}: {error}. '
            f'{remedy}'
        ) from error
