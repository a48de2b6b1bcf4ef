"""UPerNet with VMamba-B of the first release on ADE20K, published with 50.0 mIoU, 51.3 with several scales."""

_base_ = '../_base_/upernet_ade20k.py'

model = dict(
    backbone=dict(
        model_name='vmamba_v0_base',
        drop_path_rate=0.6,
        init_cfg=dict(checkpoint='vmamba_v0_base.dp05_in1k'),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
