"""SSDLite with MobileMamba-B1 on COCO at 512x512, published with 29.5 AP; anchors grow with the image."""

_base_ = '../_base_/ssdlite_mobilemamba_coco.py'

input_size = 512
model = dict(
    bbox_head=dict(
        anchor_generator=dict(
            strides=[16, 32, 64, 128, 256, 512],
            min_sizes=[77, 160, 240, 323, 405, 486],
            max_sizes=[160, 240, 323, 405, 486, 512],
        )
    )
)
train_pipeline = _base_.train_pipeline
train_pipeline[4].scale = (input_size, input_size)
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = (input_size, input_size)
train_dataloader = dict(dataset=dict(dataset=dict(pipeline=train_pipeline)))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
