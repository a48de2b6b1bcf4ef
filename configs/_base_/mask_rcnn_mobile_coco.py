"""Mask R-CNN for backbones of stride 16 to 64 (EfficientViM, MobileMamba), 12 epochs on COCO.

Published: AdamW with 2e-4 and a weight decay of 0.05, batch norms of the backbone fixed, 16 images, a pyramid whose
levels of stride 4 and 8 are made from the one of stride 16. The rest is as usual, `mask_rcnn_1x_coco.py`.
"""

_base_ = 'mask_rcnn_1x_coco.py'

model = dict(
    backbone=dict(norm_eval=True),
    neck=dict(_delete_=True, type='UpsamplingFPN', num_finer=2),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
