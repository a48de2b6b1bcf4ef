"""What Mask R-CNN on COCO for 36 epochs shares: the recipe of Swin, which VMamba and most others follow.

Published and usual: 16 images (8 GPUs with 2 each), AdamW with 1e-4 and a weight decay of 0.05, 1,000 iterations of
warm-up, a tenth of the learning rate after 27 and 33 epochs, images of 480 to 800 pixels, half of
them random crops, as DETR's. Where the published optimisers leave out norms only, this one decays no biases and nothing
that a scan is sensitive to either. A backbone starts from its published classifier, `init_cfg`.
"""

_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py'
custom_imports = dict(imports=['vmzoo.mm'], allow_failed_imports=False)

model = dict(backbone=dict(_delete_=True, type='VMZooBackbone', init_cfg=dict(type='Pretrained')))
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    constructor='VMZooOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
