"""What every Mamba-YOLO on COCO shares: the published recipe, in mmdet's parts.

300 epochs from random weights with SGD, 8 GPUs with 64 images each, mosaics but for the last ten epochs, averaged
weights. Where mmdet differs from the published trainer: pictures for mosaics come from a cache of 40; mosaics are
cropped at random places; colours change by half a chance each; images are filled up at the bottom and right only; the
learning rate of biases warms up like that of weights.
"""

_base_ = ['mmdet::_base_/default_runtime.py', 'mmdet::_base_/datasets/coco_detection.py']
custom_imports = dict(imports=['vmzoo.mm.mambayolo'], allow_failed_imports=False)

image_size = (640, 640)
max_epochs = 300
last_epochs = 10
batch_size = 64  # a GPU
num_gpus = 8

model = dict(
    type='MambaYOLODetector',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[0.0, 0.0, 0.0],
        std=[255.0, 255.0, 255.0],
        bgr_to_rgb=True,
        pad_size_divisor=32,
        pad_value=114 / 255,
    ),
    backbone=dict(type='VMZooBackbone', model_name='mambayolo_tiny', out_indices=(1, 2, 3)),
    neck=dict(type='MambaYOLOPAFPN', in_channels=(64, 128, 256), num_scans=1),
    bbox_head=dict(
        type='MambaYOLOHead',
        num_classes=80,
        in_channels=(64, 128, 256),
        strides=(8, 16, 32),
        reg_max=16,
        image_size=image_size[0],
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=0.5),
        loss_bbox=dict(type='CIoULoss', loss_weight=7.5),
        loss_dfl=dict(type='DistributionFocalLoss', loss_weight=1.5),
    ),
    train_cfg=dict(assigner=dict(type='CenterFirstAssigner', topk=10, alpha=0.5, beta=6.0)),
    test_cfg=dict(score_thr=0.001, nms_pre=30000, nms=dict(type='nms', iou_threshold=0.7), max_per_img=300),
)

load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
augment = [
    dict(type='RandomCrop', crop_size=image_size, allow_negative_crop=True),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(2, 2), keep_empty=False),
    # gains of hue 0.015, saturation 0.7 and value 0.4
    dict(
        type='PhotoMetricDistortion',
        brightness_delta=0,
        contrast_range=(0.6, 1.4),
        saturation_range=(0.3, 1.7),
        hue_delta=0.015 * 360,
        swap_channels=False,
    ),
    dict(type='RandomFlip', prob=0.5),
    dict(type='Pad', size=image_size, pad_val=dict(img=(114, 114, 114))),
    dict(type='PackDetInputs'),
]
train_pipeline = [
    *load,
    dict(type='CachedMosaic', img_scale=image_size, pad_val=114.0, max_cached_images=40),
    dict(
        type='RandomResize',
        scale=(2 * image_size[0], 2 * image_size[1]),
        ratio_range=(0.5, 1.5),
        keep_ratio=True,
    ),
    *augment,
]
last_pipeline = [
    *load,
    dict(type='RandomResize', scale=image_size, ratio_range=(0.5, 1.5), keep_ratio=True),
    *augment,
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]

train_dataloader = dict(
    batch_size=batch_size,
    num_workers=8,
    batch_sampler=None,
    dataset=dict(filter_cfg=dict(filter_empty_gt=False, min_size=0), pipeline=train_pipeline),
)
val_dataloader = dict(batch_size=8, num_workers=8, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

train_cfg = dict(
    type='EpochBasedTrainLoop',
    max_epochs=max_epochs,
    val_interval=10,
    dynamic_intervals=[(max_epochs - last_epochs, 1)],
)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    constructor='VMZooOptimWrapperConstructor',
    # the decay of 5e-4 is meant for 64 images
    optimizer=dict(type='SGD', lr=0.01, momentum=0.937, nesterov=True, weight_decay=5e-4 * num_gpus * batch_size / 64),
    paramwise_cfg=dict(custom_keys={'.A_logs': dict(decay_mult=0.0), '.dt_projs_bias': dict(decay_mult=0.0)}),
    clip_grad=dict(max_norm=10.0),
)
auto_scale_lr = dict(enable=False, base_batch_size=num_gpus * batch_size)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-4, begin=0, end=3, convert_to_iter_based=True),
    dict(type='LinearMomentum', start_factor=0.8 / 0.937, begin=0, end=3, convert_to_iter_based=True),
    dict(type='LinearLR', start_factor=1.0, end_factor=0.01, begin=0, end=max_epochs),
]

default_hooks = dict(checkpoint=dict(interval=10, max_keep_ckpts=3, save_best='coco/bbox_mAP'))
custom_hooks = [
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=1e-4, gamma=2000, update_buffers=True, priority=49),
    dict(type='PipelineSwitchHook', switch_epoch=max_epochs - last_epochs, switch_pipeline=last_pipeline),
]
