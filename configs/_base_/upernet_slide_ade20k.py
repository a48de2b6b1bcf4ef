"""UPerNet on ADE20K for backbones of one resolution, which are tested in overlapping windows of the training size."""

_base_ = 'upernet_ade20k.py'

model = dict(test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)))
