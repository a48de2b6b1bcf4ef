"""UPerNet with VMamba-T (s2l5) on ADE20K, published with 48.3 mIoU, 48.6 with several scales."""

_base_ = '../_base_/upernet_ade20k.py'

model = dict(
    backbone=dict(
        model_name='vmamba_tiny_s2l5',
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint='vmamba_tiny_s2l5.in1k'),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
