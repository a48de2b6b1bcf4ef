"""UPerNet with MambaOut-B on ADE20K.

The authors' hints: Swin's recipe, a norm on every map, a learning rate of 1e-4, stochastic depth of 0.6.
"""

_base_ = '../_base_/upernet_ade20k.py'

model = dict(
    backbone=dict(
        model_name='mambaout_base',
        drop_path_rate=0.6,
        out_norms=True,
        init_cfg=dict(checkpoint='mambaout_base.in1k'),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 768]),
    auxiliary_head=dict(in_channels=512),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
