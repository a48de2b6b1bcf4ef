"""UPerNet with ShuffleMamba-L on ADE20K: the published recipe; stochastic depth is that of the base model.

The authors' weights are on the Hugging Face hub (see the model card): model.backbone.init_cfg.checkpoint=FILE.
"""

_base_ = '../_base_/upernet_slide_ade20k.py'

model = dict(
    backbone=dict(
        model_name='shufflemamba_large_seg',
        drop_path_rate=0.2,
        init_cfg=None,
    ),
    decode_head=dict(in_channels=[1024, 1024, 1024, 1024]),
    auxiliary_head=dict(in_channels=1024, in_index=3),
)
optim_wrapper = dict(optimizer=dict(lr=3e-5), clip_grad=dict(max_norm=5.0))
