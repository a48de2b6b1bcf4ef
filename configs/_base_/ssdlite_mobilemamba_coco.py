"""What SSDLite with MobileMamba on COCO shares: mmdet's SSDLite, 120 epochs, on the maps of stride 16 and 32.

Published: the maps, the number of epochs, the image sizes; AdamW with 2e-4 and a weight decay of 0.05, gradients
clipped at 0.1, as for its other detectors. Usual, of mmdet: 192 images (8 GPUs with 24 each), pictures five times an
epoch, augmentation, cosine.
"""

_base_ = 'mmdet::ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py'
custom_imports = dict(imports=['vmzoo.mm'], allow_failed_imports=False)

channels = (200, 376)
model = dict(
    backbone=dict(
        _delete_=True,
        type='VMZooBackbone',
        model_name='mobilemamba_b1',
        out_indices=(1, 2),
        drop_path_rate=0.03,
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='mobilemamba_b1.in1k'),
    ),
    neck=dict(in_channels=channels, out_channels=(*channels, 512, 256, 256, 128)),
    bbox_head=dict(in_channels=(*channels, 512, 256, 256, 128)),
)
optim_wrapper = dict(
    constructor='VMZooOptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='AdamW', lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05),
    clip_grad=dict(max_norm=0.1),
)
