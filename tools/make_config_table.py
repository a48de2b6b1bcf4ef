"""Writes docs/configs.md, the table of configs and published results, from configs/*/metafile.yml.

    python tools/make_config_table.py

Run it after changing a metafile; a test fails while the committed page differs from what this writes.
"""

from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
TASKS = ('classification', 'segmentation', 'detection')

HEAD = """# Configs of published results

`vmzoo train NAME` trains each of these with its authors' recipe; `vmzoo test NAME FILE` measures a checkpoint. The
config says which of its settings are published, which are the usual ones, and what is left out. Results are those
that the authors state, not reproduced here; `-` is for models of which they state none, or only a difference to
another model. Weights are the authors' files, under their licence, which is often not stated: they are listed, not
redistributed. Those of a whole segmentor or detector load with `--load-from`.

ImageNet-1k belongs into `data/imagenet/{train,val}/<class>`, ADE20K into `data/ade/ADEChallengeData2016`, COCO into
`data/coco`; `--data DIR` says otherwise. A config that serves several models has a row for each: `--model NAME`
chooses.

A2Mamba's segmentors have a decoder of their own, and Vim's and LBMamba's detectors are ViTDet's in detectron2: they
have no config here. Nor has HRVMamba's pose estimation, whose data pipelines are mmpose's; its models are in `vmzoo
list`.
"""


def load(task: str) -> dict:
    return yaml.safe_load((ROOT / 'configs' / task / 'metafile.yml').read_text(encoding='utf-8'))


def metrics_of(model: dict) -> str:
    """`47.9 mIoU, 48.8 mIoU (ms+flip)`"""
    metrics = [(key, value) for result in model.get('Results', ()) for key, value in result['Metrics'].items()]
    return ', '.join(f'{value} {key}' for key, value in metrics) or '-'


def row(model: dict, collection: dict) -> str:
    config, metadata = Path(model['Config']), model['Metadata']
    datasets = {result['Dataset'] for result in model.get('Results', ())} or {collection['Training Data']}
    link = f'[file]({model["Weights"]}) ({collection["Weights Licence"]})' if 'Weights' in model else '-'
    cells = (
        f'[{config.stem}](../{config})',
        f'`{metadata["Backbone"]}`',
        f'{metadata["Parameters"] / 1e6:.1f}',
        metadata.get('FLOPs', '-'),
        ', '.join(datasets),
        metrics_of(model),
        link,
    )
    return f'| {" | ".join(cells)} |'


def render() -> str:
    """The page."""
    lines = [HEAD]
    for task in TASKS:
        meta = load(task)
        collections = {collection['Name']: collection['Metadata'] for collection in meta['Collections']}
        lines.append(f'## {task.capitalize()}\n')
        lines.append('| config | model | params (M) | stated FLOPs | data | published | weights |')
        lines.append('| --- | --- | ---: | ---: | --- | --- | --- |')
        lines += [row(model, collections[model['In Collection']]) for model in meta['Models']] + ['']
    lines.append('*Written by `tools/make_config_table.py` from the metafiles; edit those, not this page.*')
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    (ROOT / 'docs/configs.md').write_text(render(), encoding='utf-8')
