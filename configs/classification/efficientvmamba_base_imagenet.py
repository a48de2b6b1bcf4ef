"""efficientvmamba_base on ImageNet-1k, published with 81.8 top-1; 1,024 images, the rest as in the smaller ones."""

_base_ = 'efficientvmamba_imagenet.py'

model = dict(model_name='efficientvmamba_base')
train_dataloader = dict(batch_size=128)
