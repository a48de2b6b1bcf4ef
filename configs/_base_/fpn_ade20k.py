"""What Semantic FPN on ADE20K with a light backbone shares: 512x512, 160,000 iterations of 16 images, AdamW.

Batch norms of the backbone are fixed; its coarsest map gives the fourth level of the pyramid, by taking every other
pixel. A backbone starts from its published classifier, `init_cfg`.
"""

_base_ = 'mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py'
custom_imports = dict(imports=['vmzoo.mm'], allow_failed_imports=False)

model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, type='VMZooBackbone', norm_eval=True, init_cfg=dict(type='Pretrained')),
)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    constructor='VMZooOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1.2e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
param_scheduler = [dict(type='PolyLR', eta_min=0.0, power=0.9, by_epoch=False, begin=0, end=160_000)]
