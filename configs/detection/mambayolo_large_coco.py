"""Mamba-YOLO-L on COCO, published with 52.1 AP (not reproduced here)."""

_base_ = ['../_base_/mambayolo_coco.py']

model = dict(
    backbone=dict(model_name='mambayolo_large'),
    neck=dict(in_channels=(192, 384, 576), num_scans=2),
    bbox_head=dict(in_channels=(192, 384, 576)),
)
