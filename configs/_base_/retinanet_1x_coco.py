"""What RetinaNet on COCO for 12 epochs shares: 16 images (8 GPUs with 2 each), AdamW with 1e-4 as PVT's.

The pyramid begins at stride 8; the backbone's map of stride 4 is not built. Scans' parameters, norms and biases are not
decayed. A backbone starts from its published classifier, `init_cfg`.
"""

_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    'mmdet::_base_/datasets/coco_detection.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['vmzoo.mm'], allow_failed_imports=False)

model = dict(
    backbone=dict(_delete_=True, type='VMZooBackbone', out_indices=(1, 2, 3), init_cfg=dict(type='Pretrained')),
    neck=dict(start_level=0),
)
optim_wrapper = dict(
    constructor='VMZooOptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-4),
)
