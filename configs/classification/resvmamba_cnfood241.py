"""resvmamba_small on the 241 dishes of CNFOOD-241, published with 79.54 top-1, in the journal with 81.70.

Published: VMamba's recipe from random weights; 128 images on one GPU, for which the learning rate is scaled. The data:
data/cnfood241/{train,val,test}/<class>/*.jpg.
"""

_base_ = '../_base_/imagenet.py'

model = dict(model_name='resvmamba_small', num_classes=241, drop_path_rate=0.3)
train_dataloader = dict(dataset=dict(root='data/cnfood241'))
val_dataloader = dict(dataset=dict(root='data/cnfood241'))
test_dataloader = dict(dataset=dict(root='data/cnfood241', split='test'))
optim_wrapper = dict(optimizer=dict(lr=5e-4 * 128 / 512))
