"""Mamba-YOLO-B on COCO, published with 49.1 AP (not reproduced here)."""

_base_ = ['../_base_/mambayolo_coco.py']

model = dict(
    backbone=dict(model_name='mambayolo_base'),
    neck=dict(in_channels=(128, 256, 512)),
    bbox_head=dict(in_channels=(128, 256, 512)),
)
