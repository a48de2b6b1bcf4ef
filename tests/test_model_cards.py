"""The generated pages and tables are those that the registry gives."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def built():
    spec = importlib.util.spec_from_file_location('make_model_cards', ROOT / 'tools/make_model_cards.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build()


def test_committed_files_are_up_to_date(built):
    stale = [path for path, text in built.items() if (ROOT / path).read_text(encoding='utf-8') != text]
    assert not stale, 'run tools/make_model_cards.py and commit what it writes'


def test_every_card_belongs_to_a_family(built):
    assert {str(path.relative_to(ROOT)) for path in (ROOT / 'model_cards').iterdir()} == {
        path for path in built if path.startswith('model_cards/')
    }
