"""UPerNet with VMamba-T (s1l8) on ADE20K, published with 47.9 mIoU, 48.8 with several scales."""

_base_ = '../_base_/upernet_ade20k.py'

model = dict(
    backbone=dict(
        model_name='vmamba_tiny_s1l8',
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint='vmamba_tiny_s1l8.in1k'),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
