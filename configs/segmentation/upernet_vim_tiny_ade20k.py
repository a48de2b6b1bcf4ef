"""UPerNet with Vim-Ti on ADE20K, published with 41.0 mIoU."""

_base_ = '../_base_/upernet_vim_ade20k.py'

model = dict(
    backbone=dict(
        model_name='vim_tiny_seg',
        init_cfg=dict(checkpoint='vim_tiny_patch16_224.in1k'),
    ),
    decode_head=dict(in_channels=[192, 192, 192, 192], channels=192),
    auxiliary_head=dict(in_channels=192),
)
optim_wrapper = dict(
    optimizer=dict(lr=2e-4, weight_decay=0.1),
    paramwise_cfg=dict(layer_decay_rate=0.92),
)
