"""Telling a user what a name that is not known might have been."""

import difflib
from collections.abc import Iterable

import timm


def suggestion(name: str, known: Iterable[str], otherwise: str) -> str:
    """`did you mean A or B?` if names like it are known, else `otherwise`."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f'did you mean {" or ".join(close)}?' if close else otherwise


def check_model_name(name: str) -> None:
    """Refuse a name that `timm.create_model` does not know.

    Raises:
        ValueError: There is no such model; the message names similar ones.
    """
    if not timm.is_model(name):
        raise ValueError(f'unknown model {name}; {suggestion(name, timm.list_models(), "vmzoo list shows the names")}')
