"""UPerNet with LBVim-300 on ADE20K: the published recipe.

The authors' weights are in a release (see the model card): model.backbone.init_cfg.checkpoint=FILE.
"""

_base_ = '../_base_/upernet_slide_ade20k.py'

model = dict(
    backbone=dict(
        model_name='lbvim_300_backbone',
        init_cfg=None,
    ),
    decode_head=dict(in_channels=[192, 192, 192, 192]),
    auxiliary_head=dict(in_channels=192),
)
