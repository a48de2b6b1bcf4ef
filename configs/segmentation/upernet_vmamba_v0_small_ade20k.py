"""UPerNet with VMamba-S of the first release on ADE20K, published with 49.5 mIoU, 50.5 with several scales."""

_base_ = '../_base_/upernet_ade20k.py'

model = dict(
    backbone=dict(
        model_name='vmamba_v0_small',
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint='vmamba_v0_small.in1k'),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
