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
from vmzoo.weights import PublishedWeight, published_weights

ROOT = Path(__file__).resolve().parents[1]
SUMMARIES = 'vmzoo/models/summaries.json'
TABLE = '<!-- models: written by tools/make_model_cards.py -->\n', '<!-- /models -->'

NOTES = {
    'hymamba': """
A U-Net for volumes [B, C, D, H, W]: MedNeXt blocks down to stride 16, Mamba over the tokens there, UNETR's decoder.
Sides are multiples of 16; the position table is computed for sizes other than `img_size`. Published recipe: crops of
96x96x96 at 1.5 mm, CT clipped to -175..250 HU and scaled to 0..1, Dice and cross-entropy.

`vmzoo.models.MambaMIM` pretrains the encoder: it hides three quarters of the cells of 16x16x16 voxels and reconstructs
them, with state-space token interpolation in the hidden places.

    model = MambaMIM(timm.create_model('hymamba'), mask_ratio=0.75)
    loss, reconstruction, visible = model(volume, generator=torch.Generator().manual_seed(0))
    network = timm.create_model('hymamba', num_classes=14)
    network.load_state_dict(vmzoo.convert_state_dict(model.state_dict(), network))

`model.restore(volume, out)` shows the reconstruction in the volume's values. `as_released=True` computes what the
published code does where it departs from the paper: it counts the visible tokens of the whole batch instead of each
sample's, and reads the interpolated tokens as an array of channels. The order of the visible tokens there is that of an
unstable sort, which differs from machine to machine; here it is the order of the scan.

Checkpoints with the published names load, of network and pre-training. What no result depends on is left out: the
backward half of the Mamba layers (0.3 M of the network's 41.8 M parameters), and of the pre-training (114 M) the first
fusion, the projection of stride 1 and two tokens. The authors released no weights.""",
    'mhsvm': """
VM-UNet with multi-head scans (MHS-UNet): the channels of a block are split over three or four heads, each of which
scans along its own routes, forward and back. `serpentine` takes rows and columns in turns of direction, `diagonal` the
anti-diagonals in turns, `spiral` the outline and then what is inside, and `raster`, the fourth, rows and columns. All
are computed for any map, and are also routes of `vmzoo.layers.SS2D` and `ScanBlock2d`; the published code reads tables
made for one size. Scan route attention weighs the sum of a head's four scans by how much they differ, less `threshold`.

The output has the size of the image, whose sides must be multiples of 32. It is logits, also of a model of one class
(the published one returns their sigmoid). Images of one channel are repeated for a model of three; with `in_chans=1` it
takes them as they are. Feature maps are those of the encoder. Scan route attention divides a spread by a mean and so
amplifies rounding: compare results in float64.

The authors' weights were trained from scratch. `mhsvm_4h.isic18`, as stated: 80.85 % mIoU and 89.41 % Dice on ISIC18,
and 82.02 % and 90.12 % on ISIC17's test images. They were trained with a threshold of 0.5 and are tested with the 0.4
that is the model's. Of `mhsvm_3h` no figure is stated. Pixels are those of 8 bits, 0 to 255: images were normalised and
then stretched to that range one by one.""",
    'msvmunet': """
A U-Net for medical images with VMamba as its encoder. In the decoder, maps grow by large-kernel patch expanding, and
the MLPs of the blocks see their neighbourhood at three scales. The output has the size of the image, whose sides must
be multiples of 32. Images of one channel are repeated for a model of three; with `in_chans=1` it takes them as they
are. Feature maps are those of the encoder.

The authors published no trained segmentation network. What `pretrained=True` downloads is where their trainings start:
the VMamba that is the encoder (`vmamba_tiny_s1l8`, `vmamba_small_s1l20`); a warning names what stays as initialised.
Their README names another file (`vssm_tiny_0230`), which does not fit, and their code trains from scratch without a
word if it finds none. A file of the encoder's model loads in the same way (`vmzoo.weights.load_checkpoint`), and so do
files saved by the published trainings, which kept the encoder frozen for the first ten epochs.

`msvmunet_synapse`: 85.00 % Dice, 14.75 mm HD95, as stated; 15.53 G operations, which are two for a multiply-accumulate.
`msvmunet_acdc`: 92.58 % Dice. Both were selected on the test volumes. No licence is stated for the published code; the
code here is Apache-2.0.""",
    'lightmunet': """
A light U-Net for pictures (`2d`) and volumes (`3d`) whose encoder runs Mamba over all positions in raster order, one
scan a layer. The output has the size of the image, which may be any. The authors released no weights; files that their
trainings save (nnU-Net's) load through `vmzoo.weights.load_checkpoint`. Memory grows with the number of positions at
full resolution: `model.set_grad_checkpointing()` recomputes each stage.

The stated 1.09 M (2D) and 1.87 M (3D) parameters cannot be reproduced: the published code has 5.01 M and 5.02 M, as
here. Read off the authors' figure: a Dice of about 84.6 % on LiTS, and of about 96.2 % on the X-rays of Montgomery and
Shenzhen. Trained with Adam (1e-4, weight decay 1e-5) in float32, without deep supervision, on images normalised one by
one. The network amplifies rounding: compare it in float64.""",
    'xlstmunet': """
nnU-Net's residual U-Net with Vision-LSTM blocks: one behind the last stage of the encoder (`bot`), or several within
it (`enc`). The names' plans are those of nnU-Net for the authors' data: `2d` has 7 stages, `2d_s8` 8, `3d` 6; other
plans are `embed_dim`, `strides`, `kernel_size` and, of an `enc` model, `img_size` (the patch size, to which its blocks
over channels belong: predict in windows of that size). `bot` models take images of any size. The matrix LSTM is exact,
but computed in chunks: time and memory grow with the number of positions and not with its square.

`deep_supervision=True` returns a list of logits while training, at the image's size first. Trained as nnU-Net: SGD
(momentum 0.99, weight decay 3e-5, polynomial schedule), Dice and cross-entropy, images normalised one by one. The
encoder alone is a backbone: `features_only=True`.

The authors' files (nnU-Net checkpoints) are in a [folder of Google
Drive](https://drive.google.com/drive/folders/1N3qQQ-TJ_qddYjgAS3gSm9zm8fDeTmud): download one and pass
`pretrained_cfg_overlay=dict(file=...)`, with the options of its plan. No licence of the weights is stated.""",
    'vmunet': """
A U-Net of VMamba's first blocks for medical images. The output has the size of the image, whose sides must be multiples
of 32. It is logits, also of a model of one class (the published one returns their sigmoid). Images of one channel are
repeated for a model of three; with `in_chans=1` it takes them as they are. Feature maps are those of the encoder.

The authors published no trained segmentation network. What `pretrained=True` downloads is where their trainings start:
VMamba-S of the first generation (`vmamba_v0_small`). As published, its blocks go to the encoder and, mirrored, to the
decoder; a warning names what stays as initialised. A file of that model loads in the same way
(`vmzoo.weights.load_checkpoint`), and so do files saved by the published trainings. Weights of later VMamba generations
do not fit, which is an error here and was silent in the published code.

`vmunet_isic`: 80.23 % mIoU and 89.03 % Dice on ISIC17, 81.35 % and 89.71 % on ISIC18, as stated. Pixels are those of
8 bits, 0 to 255: images were normalised and then stretched to that range one by one. `vmunet_synapse`: 81.08 % Dice,
19.21 mm HD95; pixels in [0, 1]. The stated 4.11 G operations of `vmunet_isic` leave out the scans.""",
    'mambayolo': """
The backbone of a YOLOv8-shaped detector whose blocks scan, with a classifier for pretraining. Its feature maps are P2
to P5; the last is pooled over three windows. Pixels are RGB in [0, 1], without mean and standard deviation.

The whole detector is made of `vmzoo.mm.mambayolo` (neck, head, assigner) on mmdet, with the published recipe in
`configs/detection/mambayolo_{tiny,base,large}_coco.py`. Its images have sides of multiples of 32. Checkpoints with the
published names load into it as they are (`load_from`), and their backbone into these models with `num_classes=0`.
`detector.deploy()` is the network from image to boxes and probabilities with batch norms folded, for `torch.export`.

Stated for the detectors, on COCO val2017 at 640x640: 44.5 AP (tiny), 49.1 (base, in places called M) and 52.1 (large).
The paper's 5.8 M and 19.1 M parameters for tiny and base belong to an earlier version: the published code has 6.1 M and
21.8 M. The authors never released weights.""",
    'mobilemamba': """
Three stages at strides 16, 32 and 64. Their token mixer scans some of its channels in both directions beside a
convolution of their wavelet bands, convolves some, and leaves the rest. B1, B2 and B4 are one network at three image
sizes. `kd` weights were trained for 1,000 epochs with a teacher. Feature maps: the stem's, and those of the stages;
`features_only=True` returns the stages'.

`model.eval().fuse()` folds batch norms, residual depthwise convolutions and scales into the layers beside them, for
inference: the same outputs from fewer layers, with other parameter names, so load the weights first.
`timm.models.reparameterize_model(model.eval())` does it to a copy. Training checkpoints hold the averaged weights as
`net_E`, which are those that are loaded.""",
    'a2mamba': """
Neighbourhood attention in two windows, whose maps gather values, and then the states of a row-major scan. It runs in
plain torch; `attn_backend='natten'` uses NATTEN 0.17 where that is installed (later versions have neither a relative
bias nor attention in two steps). The windows of the last stage need 7x7 positions: images are at least 193 pixels a
side. The last stage's full attention has a bias for `img_size`, which is resized for other sizes.

For `a2mamba_base` the authors state 10.7 G multiply-accumulates: what an MLP ratio of 3 in the last two stages would
cost. Their code has 3.75, with which the parameters are the 51 M that they state.

**Licence of the weights: unknown.** The authors state none for code or weights. Ask them before use. The code here is
Apache-2.0.""",
    'groupmamba': """
Four stages whose token mixer scans a quarter of the channels in each of four directions, and multiplies the result with
its input and with a gate that sees all channels. Every published model has two classifiers (`classifier.head`,
`classifier.head_dist`), the second of which learned from RegNetY-16GF: evaluation averages them, training returns both
after `model.set_distilled_training()`; `distillation=False` leaves the second one out, of a checkpoint too. The
published accuracies are of averaged weights. Feature maps of all stages but the last are normed; the final norm is part
of the head.""",
    'efficientvmamba': """
The first two stages pair a gated scan with a depthwise convolution; the last two are inverted residuals. The scan is
atrous: each of four routes visits one pixel of every 2x2 cell, so that a position is scanned once instead of four times
(maps of odd sides are padded). That the small model starts with 64 channels is what its checkpoint and its stated size
say; a published config that says 96 does not fit them. The accuracies belong to the recipe of the published logs
(drop path 0.1, averaged weights); users of the published configs report less.

The licence is stated in the authors' README only; their repository has no licence file.""",
    'resvmamba': """
The first VMamba (`vmamba_v0_*`) with the max-pooled, projected input of each of the first three stages added to the
stage's output. In the published code these projections are drawn at random at every call and never trained, so that its
results differ from call to call and no checkpoint has them. `residual` chooses between `'proj'` (default: trained, as
the paper describes it), `'random'` (as published) and `'none'` (the mean of the random draws, with which published
weights give the same result every time). In `'proj'`, weights without projections load with a warning that names them:
`resvmamba_small.cnfood241` and those of `vmamba_v0_tiny` and `vmamba_v0_small`, from which fine-tuning can start.

The paper states a top-1 accuracy of 79.5 % on CNFOOD-241 (81.7 % in its journal version), not which of the two the
published file gives. Its head is expected to have 1000 rows, of which the first 241 are food classes; pass
`num_classes=241` if the file says otherwise. The published base variant cannot be built by the published code.

**Licence of the weights: none stated.** Ask the authors before use. The code here is Apache-2.0.""",
    'hrvmamba': """
HRNet's four parallel resolutions with state-space blocks. `hrvmamba_{nano,tiny,small,base}` classify, `*_pose` return a
score map of every keypoint (top-down), `*_crowdpose` the four branches (bottom-up, for a DEKR head), `*_seg` the neck's
four normed maps (for UPerNet). Dense heads beside the backbone are not part of these models. The feature maps of a
classifier are its branches, before the neck; a pose model has one, at 1/4. Weights of a classifier load into a dense
model: what that does not have is left out, what the file does not have is named and stays as initialised.

Stated by the authors: 69.5, 74.6 and 76.5 AP on COCO keypoints for `tiny`, `small` and `base` at 256x192, 76.4 and 77.7
for `small` and `base` at 384x288; 68.8 and 69.6 AP on CrowdPose; 51.4 mIoU (single scale) on ADE20K. By its name, the
published file of `hrvmamba_tiny_pose` has blocks with `pos_conv` and `se`, by its configuration without: if loading
asks for other options, create the model with them.

The deformable convolution counts as 36 multiply-accumulates (9 points of 4 pixels) for each of its outputs.

**Licence of the weights: none stated.** Ask the authors before you use them. The code here is Apache-2.0.""",
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
    'mambaout': """
Mamba blocks without the scan: gated CNN blocks, the baseline that shows what a scan adds. The models are timm's own,
listed here and not registered again; `mambaout_*_rw` are variants that timm trained, not the paper's.
`features_only=True` returns maps [B, H, W, C]; `forward_intermediates(x, output_fmt='NCHW')` gives [B, C, H, W].

`mambaout_femto` is stated with 1.2 G multiply-accumulates, where products and convolutions are 1.148 G. With the 5 that
some counters add for every value of a norm they are 1.156 G, which is 1.2 G in two digits.""",
    'efficientvim': """
Fast models of few tokens (the stem reduces 16 times): a mixer averages the tokens into a few hidden states, mixes
channels there, and hands them back. It is the dual of a scan without order, so nothing is scanned. The classifier fuses
the hidden states of three stages with the last map; `efficientvim_*_dist` have a second one, trained by distillation,
and return the mean of both. The models are timm's own, listed here and not registered again. They amplify rounding:
compare them in float64.

The authors' files hold two sets of weights. The averaged ones (`model_ema`) are loaded: theirs are the stated
accuracies. A dense backbone's checkpoint, as in a detector's file, fits the model inside `features_only=True`:
`vmzoo.convert_state_dict(state_dict, features.model)`.""",
    'lbmamba': """
Vim without class token and with one scan a block instead of two: within the scan every segment of a few tokens is also
scanned backwards with the same parameters, and every second block runs over the tokens in reverse. Published names
differ: `lbvim_tiny` is `lbvim_tiny_patch16_224`, `lbvim_528_atthead` is `lbvim_528_patch16_224_atthead`. The `backbone`
models return the outputs of four blocks' mixers, all at 1/16, of images of any size.

`segment` is the length of the segments. By default it follows the number of tokens, as in the published kernel: 4 up to
128, 8 up to 256 (so at 224x224), 16 above. A model trained at one size therefore runs with other segments at another;
`segment=8` keeps them. The same option of `vim_*` models scans segments within the forward direction; so does that of
`vmzoo.layers.MambaMixer`, `vmzoo_kernels.selective_scan` and `route_scan`. On GPUs such scans run on Triton. They are
counted with 12 operations for each step, channel and state instead of 9.

The authors' weights are in [one release](https://github.com/cvlab-stonybrook/LBMamba/releases/tag/v1.0): download a
file and pass `pretrained_cfg_overlay=dict(file=...)`. They were trained in float32, without mixed precision. No licence
is stated.""",
    'shufflemamba': """
Isotropic models trained with a stochastic layer-wise shuffle: while training, a layer sees its tokens in random order
with a chance that grows with its depth up to `shuffle_rate`, and the order is restored after it. In evaluation the
models are what they were: `shufflemamba_*` Vim with the class token in front, `shufflemamba_reg_*` Mamba-Reg with
registers among the patches, `mambamlp_*` blocks of a four-way mixer and an MLP; `seg` models return four maps at 1/16,
of which the first three are mixers' outputs without the residual stream. `shuffle_rate` is an option of every isotropic
model here (`vim_*`, `roma_*`), 0 unless given; published trainings used 0.5 (base), 0.1 (registers) and 0.4 to 0.6
(pretraining of MambaMLP). `model.shuffle.generator` takes a `torch.Generator`.

Files of weights trained with the shuffle are on <https://huggingface.co/zizzzz/SLWS_Mamba>: download one and pass
`pretrained_cfg_overlay=dict(file=...)`. What downloads by itself are Mamba-Reg's own weights, to which the published
code points. No licence of the weights is stated.""",
    'rsmamba': """
Scene classification in remote sensing. A block runs one mixer over the tokens forward, in reverse and in random order,
and a gate weighs the three results for each image. The random order is drawn anew while training
(`model.path_order.generator` takes a `torch.Generator`); in evaluation each block has a fixed one, so that an image
always has the same result. `paths` and `gate` choose the ablations. Every data set has its tag, with its classes in the
order of the published head as `pretrained_cfg['label_names']`: `nwpu` (NWPU-RESISC45, 45 classes), `aid` (30) and `uc`
(UC Merced, 21).

Published F1 in percent, on UC Merced, AID and NWPU-RESISC45: base 93.88, 91.66 and 94.84; large 94.74, 91.90 and 95.02;
huge 95.25, 92.63 and 95.18.""",
    'roma': """
Foundation models of remote sensing, pretrained to predict the next cluster of patches. The encoders classify the class
token; `dense` models return a pyramid of the last map, at strides 4, 8, 16 and 32. The authors' tiny and small widths
are those of the fine-tuning code (384 and 512).

Files of weights are on <https://huggingface.co/initiacms/RoMA>: download one and pass
`pretrained_cfg_overlay=dict(file=...)`. Those of the pretraining, which have one direction and no classifier, are
converted: all directions start equal, and a warning names what stays as initialised. No licence of the weights is
stated. Base, published: 87.36 on AID and 59.45 on UC Merced (overall accuracy, linear probe), 55.63 on OSCD (F1), 79.50
on SpaceNetV1 (mean F1).""",
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
    cfg = next(iter(default_cfgs_of(summaries[0].name).values()))
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
            f'| {w.license} | [{_file_name(w.url)}]({w.url}) | {w.sha256 or "not recorded"} |'
            for w in weights
        ),
        '',
        f'Accuracies are those that the authors state, on ImageNet-1k, in percent. {_origin(weights)} "Not recorded": '
        'the download is not compared with a digest.',
        '',
        '## Preprocessing',
        '',
        *(f'- {line}' for line in dict.fromkeys(_preprocessing(s.name) for s in summaries)),
        '',
        '*Written by `tools/make_model_cards.py`; edit that, not this page.*',
        '',
    ]
    return '\n'.join(lines)


def _origin(weights: list[PublishedWeight]) -> str:
    if any(weight.hub_id for weight in weights):
        return (
            '`pretrained=True` takes converted copies of the weights from the Hugging Face hub (`timm/<model.tag>`); '
            "the authors' own files load through `vmzoo.weights.load_checkpoint`."
        )
    return 'The weights are downloaded from the authors, not re-hosted here.'


def _file_name(url: str) -> str:
    return 'Google Drive' if url.startswith('https://drive.google.com/') else url.rpartition('/')[2]


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
