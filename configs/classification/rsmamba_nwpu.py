"""rsmamba_base.nwpu, _large.nwpu and _huge.nwpu on NWPU-RESISC45, published with 94.84, 95.02 and 95.18 F1."""

_base_ = '../_base_/rsmamba.py'

root = 'data/nwpu'
model = dict(model_name='rsmamba_base.nwpu', num_classes=45)
train_dataloader = dict(dataset=dict(root=root))
val_dataloader = dict(dataset=dict(root=root))
test_dataloader = val_dataloader
