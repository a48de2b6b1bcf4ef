"""Mamba-YOLO-T on COCO, published with 44.5 AP (not reproduced here)."""

_base_ = ['../_base_/mambayolo_coco.py']
