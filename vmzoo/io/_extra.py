"""Packages of the extra `medical`, imported when they are needed."""

from importlib import import_module
from types import ModuleType


def require(name: str, purpose: str) -> ModuleType:
    """Imports a package.

    Raises:
        ImportError: It is not installed; the message has the command that installs it.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(f'{purpose} needs {error.name}; run: pip install "vmzoo[medical]"') from error
