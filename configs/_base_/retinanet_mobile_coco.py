"""RetinaNet for backbones of stride 16 to 64 (EfficientViM, MobileMamba), 12 epochs on COCO.

Published: AdamW with 2e-4 and a weight decay of 0.05, batch norms of the backbone fixed, 16 images, a pyramid whose
level of stride 8 is made from the one of stride 16. The rest is as usual, `retinanet_1x_coco.py`.
"""

_base_ = 'retinanet_1x_coco.py'

model = dict(
    backbone=dict(out_indices=None, norm_eval=True),
    neck=dict(_delete_=True, type='UpsamplingFPN', num_finer=1),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=0.05))
