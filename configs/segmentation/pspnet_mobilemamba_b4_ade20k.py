"""PSPNet with MobileMamba-B4 on ADE20K, published with 36.9 mIoU; all but the head is that of DeepLabv3's config."""

_base_ = 'deeplabv3_mobilemamba_b4_ade20k.py'

model = dict(
    decode_head=dict(
        _delete_=True,
        type='PSPHead',
        in_channels=448,
        in_index=1,
        channels=512,
        pool_scales=(1, 2, 3, 6),
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    )
)
