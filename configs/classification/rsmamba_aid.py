"""rsmamba_base.aid, _large.aid and _huge.aid on AID, published with 91.66, 91.90 and 92.63 F1."""

_base_ = '../_base_/rsmamba.py'

root = 'data/aid'
model = dict(model_name='rsmamba_base.aid', num_classes=30)
train_dataloader = dict(dataset=dict(root=root))
val_dataloader = dict(dataset=dict(root=root))
test_dataloader = val_dataloader
