"""DeepLabv3 with MobileMamba-B4 on ADE20K, published with 36.6 mIoU.

Published: AdamW with 1.2e-4 and a weight decay of 0.05, 80,000 iterations. Usual, of mmseg: 16 images, a decay of power
0.9, the head's width, an auxiliary head on the map before the last.
"""

_base_ = 'mmseg::deeplabv3/deeplabv3_r50-d8_4xb4-80k_ade20k-512x512.py'
custom_imports = dict(imports=['vmzoo.mm'], allow_failed_imports=False)

model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='VMZooBackbone',
        model_name='mobilemamba_b4',
        out_indices=(2, 3),
        drop_path_rate=0.03,
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='mobilemamba_b4.in1k'),
    ),
    decode_head=dict(in_channels=448, in_index=1),
    auxiliary_head=dict(in_channels=376, in_index=0),
)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    constructor='VMZooOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1.2e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
param_scheduler = [dict(type='PolyLR', eta_min=0.0, power=0.9, by_epoch=False, begin=0, end=80_000)]
