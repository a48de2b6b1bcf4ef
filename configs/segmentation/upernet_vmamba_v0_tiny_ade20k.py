"""UPerNet with VMamba-T of the first release on ADE20K, published with 47.3 mIoU, 48.3 with several scales."""

_base_ = '../_base_/upernet_ade20k.py'

model = dict(
    backbone=dict(
        model_name='vmamba_v0_tiny',
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint='vmamba_v0_tiny.in1k'),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
