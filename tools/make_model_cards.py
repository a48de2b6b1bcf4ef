"""Writes model_cards/<family>.md, vmzoo/models/summaries.json and README.md's table of models from the registry.

    python tools/make_model_cards.py

Run it after registering or changing a model; a test fails while the committed files differ from what this writes.
"""

import inspect
import json
import sys
from pathlib import Path

from timm.models import get_pretrained_cfg, model_entrypoint

from vmzoo.models._registry import ModelSummary, as_record, default_cfgs_of, list_architectures, summarize
from vmzoo.weights import published_weights

ROOT = Path(__file__).resolve().parents[1]
SUMMARIES = 'vmzoo/models/summaries.json'
TABLE = '<!-- models: written by tools/make_model_cards.py -->\n', '<!-- /models -->'

NOTES = {
    'vmamba': """
Three generations share the architecture. `vmamba_*_s<ratio>l<depth>` are the current ones (SS2D without a gate, MLP
after it, d_state 1); `vmamba_v0_*` are the first release, the form that many early downstream projects copied (gated,
d_state 16, no MLP); `vmamba_*_m2` use a Mamba-2 mixer and were never trained by the authors. Their VMamba-T is
`vmamba_tiny_s1l8`, VMamba-S and -B are `vmamba_small_s2l15` and `vmamba_base_s2l15`. `vmamba_nano` is ours, for tests
and small images; it has no weights.""",
    'vim': """
A plain stack of bidirectional Mamba blocks over 16x16 patches, with the class token in the middle of the sequence.
`stride8` models take the same patches at stride 8 (730 tokens), `gap` models average all tokens instead of using a
class token, `seg` models return feature pyramids. Position embeddings are resized when `img_size` differs from the
checkpoint's.

**Licence of the weights: unclear.** Their model cards are tagged apache-2.0, but the text says "Non-commercial
license". Ask the authors before commercial use. The code here is Apache-2.0.""",
}


def build() -> dict[str, str]:
    """Returns the text of every generated file, by its path from the repository's root."""
    summaries = [summarize(name) for name in list_architectures()]
    records = {summary.name: as_record(summary) for summary in summaries}
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    files = {
        SUMMARIES: json.dumps(records, indent=1) + '\n',
        'README.md': _with_table(readme, _readme_table(summaries)),
    }
    for family in dict.fromkeys(summary.family for summary in summaries):
        own = [summary for summary in summaries if summary.family == family]
        files[f'model_cards/{family}.md'] = _card(family, own)
    return files


def _card(family: str, summaries: list[ModelSummary]) -> str:
    cfg = get_pretrained_cfg(summaries[0].name)
    weights = [weight for weight in published_weights() if weight.name.partition('.')[0] in {s.name for s in summaries}]
    source = inspect.getmodule(model_entrypoint(summaries[0].name))
    lines = [
        f'# {family}',
        '',
        f'**{cfg.paper_name}**, [{cfg.paper_ids}](https://arxiv.org/abs/{cfg.paper_ids.removeprefix("arXiv:")}). '
        f'Published code and weights: <{cfg.origin_url}>. Model file: `{source.__name__.replace(".", "/")}.py`.',
        '',
        NOTES.get(family, '').strip(),
        '',
        '## Architectures',
        '',
        '| model | task | params (M) | GMACs | input | feature channels | feature scales |',
        '| --- | --- | ---: | ---: | --- | --- | --- |',
        *(
            f'| `{s.name}` | {s.task} | {s.params / 1e6:.2f} | {s.gmacs:.3g} | {"x".join(map(str, s.input_size))} '
            f'| {_list(s.channels)} | {_list(f"1/{r}" for r in s.reductions)} |'
            for s in summaries
        ),
        '',
        'GMACs: billions of multiply-accumulates for one image of that size, as papers count them (a scan: 9 for each '
        'step, channel and state).',
        '',
        '## Published weights',
        '',
        '| model.tag | top-1 | top-5 | licence | file | SHA-256 |',
        '| --- | ---: | ---: | --- | --- | --- |',
        *(
            f'| `{w.name}` | {w.metrics.get("imagenet1k_top1", "-")} | {w.metrics.get("imagenet1k_top5", "-")} '
            f'| {w.license} | [{w.url.rpartition("/")[2]}]({w.url}) | {w.sha256 or "not recorded"} |'
            for w in weights
        ),
        '',
        'Accuracies are those that the authors state, on ImageNet-1k, in percent. The weights are downloaded from the '
        'authors, not re-hosted here. "Not recorded": the download is not compared with a digest.',
        '',
        '## Preprocessing',
        '',
        *(f'- {line}' for line in dict.fromkeys(_preprocessing(s.name) for s in summaries)),
        '',
        '*Written by `tools/make_model_cards.py`; edit that, not this page.*',
        '',
    ]
    return '\n'.join(lines)


def _preprocessing(name: str) -> str:
    cfg = get_pretrained_cfg(name)
    size = 'x'.join(map(str, cfg.input_size))
    return f'{size}, {cfg.interpolation} resize, centre crop {cfg.crop_pct}, mean {cfg.mean}, std {cfg.std}'


def _readme_table(summaries: list[ModelSummary]) -> str:
    metrics = {weight.name: weight.metrics for weight in published_weights()}
    lines = ['| model | params (M) | GMACs | input | top-1 | card |', '| --- | ---: | ---: | --- | ---: | --- |']
    for s in summaries:
        tag = next(iter(default_cfgs_of(s.name)))
        top1 = metrics.get(f'{s.name}.{tag}', {}).get('imagenet1k_top1', '-')
        size = 'x'.join(map(str, s.input_size[1:]))
        card = f'[{s.family}](model_cards/{s.family}.md)'
        lines.append(f'| `{s.name}` | {s.params / 1e6:.1f} | {s.gmacs:.3g} | {size} | {top1} | {card} |')
    return '\n'.join(lines) + '\n'


def _with_table(readme: str, table: str) -> str:
    before, start, rest = readme.partition(TABLE[0])
    _, end, after = rest.partition(TABLE[1])
    if not start or not end:
        raise ValueError(f'README.md has no {TABLE[0].strip()} ... {TABLE[1]} to put the table of models in')
    return before + start + table + end + after


def _list(items) -> str:
    return ', '.join(map(str, items)) or '-'


def main() -> int:
    for path, text in build().items():
        target = ROOT / path
        target.parent.mkdir(exist_ok=True)
        target.write_text(text, encoding='utf-8')
        print(f'wrote {path}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
