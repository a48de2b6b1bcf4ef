"""Metafiles and configs name each other; the page of results is what the metafiles say."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from vmzoo.models._registry import family_of, list_architectures

ROOT = Path(__file__).parents[2]
TASKS = ('classification', 'segmentation', 'detection')
# Configs without a published result: for own data, and for tiny data.
UNLISTED = ('image_folder', 'vmamba_nano_digits', 'tiny_coins', 'tiny_mni152')


def load(task: str) -> dict:
    return yaml.safe_load((ROOT / f'configs/{task}/metafile.yml').read_text(encoding='utf-8'))


SUMMARIES = json.loads((ROOT / 'vmzoo/models/summaries.json').read_text(encoding='utf-8'))
MODELS = [(task, model) for task in TASKS for model in load(task)['Models']]


@pytest.mark.parametrize('task', TASKS)
def test_every_config_is_listed(task):
    meta = load(task)
    shipped = {f'configs/{task}/{p.name}' for p in (ROOT / 'configs' / task).glob('*.py') if p.stem not in UNLISTED}
    assert {model['Config'] for model in meta['Models']} == shipped
    names = [model['Name'] for model in meta['Models']]
    assert len(set(names)) == len(names)
    collections = {collection['Name']: collection for collection in meta['Collections']}
    assert {model['In Collection'] for model in meta['Models']} == collections.keys()
    for collection in collections.values():
        assert (ROOT / collection['README']).is_file()


def config_text(path: Path) -> str:
    """A config with its bases in this folder before it."""
    text = path.read_text(encoding='utf-8')
    base = re.search(r"^_base_ = '([\w./]+)'$", text, re.MULTILINE)
    return (config_text(path.parent / base[1]) if base else '') + text


@pytest.mark.parametrize(('task', 'model'), MODELS, ids=[f'{task}-{model["Name"]}' for task, model in MODELS])
def test_entry(task, model):
    backbone = model['Metadata']['Backbone']
    assert backbone in list_architectures()
    text = config_text(ROOT / model['Config'])
    if task == 'classification' and 'mmpretrain' not in model['Name']:
        trained = re.findall(r"model_name='([\w.]+)'", text)[-1].partition('.')[0]
        assert family_of(trained) == family_of(backbone)
        assert model['Metadata']['Parameters'] == SUMMARIES[backbone]['params']
    elif 'mambayolo' not in backbone:
        assert re.findall(r"model_name='(\w+)'", text)[-1] == backbone
        assert model['Name'] == Path(model['Config']).stem
    summary = text.rpartition('"""\n\n_base_')[0].rpartition('"""')[2].partition('\n')[0]
    for result in model.get('Results', ()):
        for metric, value in result['Metrics'].items():
            assert 0 < value < 100
            if metric in ('mIoU', 'mF1', 'box AP', 'mask AP', 'Top 1 Accuracy', 'F1'):
                assert re.search(rf'\b{re.escape(str(value))}', summary), (
                    f'{value} {metric} is not in the docstring: {summary}'
                )
    assert model.get('Weights', 'https://').startswith('https://')


def test_page_is_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'tools')
    monkeypatch.delitem(sys.modules, 'make_config_table', raising=False)
    import make_config_table

    assert (ROOT / 'docs/configs.md').read_text(encoding='utf-8') == make_config_table.render()
