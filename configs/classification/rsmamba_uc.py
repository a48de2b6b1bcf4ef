"""rsmamba_base.uc, _large.uc and _huge.uc on UC Merced, published with 93.88, 94.74 and 95.25 F1."""

_base_ = '../_base_/rsmamba.py'

root = 'data/uc'
model = dict(model_name='rsmamba_base.uc', num_classes=21)
train_dataloader = dict(dataset=dict(root=root))
val_dataloader = dict(dataset=dict(root=root))
test_dataloader = val_dataloader
