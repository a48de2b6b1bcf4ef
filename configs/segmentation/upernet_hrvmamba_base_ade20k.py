"""UPerNet with HRVMamba-B on ADE20K, published with 51.4 mIoU, 52.2 with several scales."""

_base_ = '../_base_/upernet_ade20k.py'

model = dict(
    backbone=dict(
        model_name='hrvmamba_base_seg',
        drop_path_rate=0.15,
        init_cfg=dict(checkpoint='hrvmamba_base.in1k'),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 2048]),
    auxiliary_head=dict(in_channels=512),
)
