"""SSDLite with MobileMamba-B1 on COCO at 320x320, published with 24.0 AP."""

_base_ = '../_base_/ssdlite_mobilemamba_coco.py'
