"""UPerNet with Vim-S on ADE20K, published with 44.9 mIoU."""

_base_ = '../_base_/upernet_vim_ade20k.py'

model = dict(
    backbone=dict(
        model_name='vim_small_seg',
        init_cfg=dict(checkpoint='vim_small_patch16_224.in1k'),
    ),
    decode_head=dict(in_channels=[384, 384, 384, 384], channels=384),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(layer_decay_rate=0.95),
)
