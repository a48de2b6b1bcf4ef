"""UPerNet with GroupMamba-T on ADE20K; the authors published no recipe: this is the usual one."""

_base_ = '../_base_/upernet_ade20k.py'

model = dict(
    backbone=dict(
        model_name='groupmamba_tiny',
        drop_path_rate=0.05,
        init_cfg=dict(checkpoint='groupmamba_tiny.dist_in1k'),
    ),
    decode_head=dict(in_channels=[64, 128, 348, 448]),
    auxiliary_head=dict(in_channels=348),
)
