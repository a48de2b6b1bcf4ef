"""UPerNet with ShuffleMamba-B on ADE20K: the published recipe.

The authors' weights are on the Hugging Face hub (see the model card): model.backbone.init_cfg.checkpoint=FILE.
"""

_base_ = '../_base_/upernet_slide_ade20k.py'

model = dict(
    backbone=dict(
        model_name='shufflemamba_base_seg',
        drop_path_rate=0.2,
        init_cfg=None,
    ),
    decode_head=dict(in_channels=[768, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768, in_index=3),
)
