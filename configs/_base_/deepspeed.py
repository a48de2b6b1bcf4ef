"""Shards gradients and optimiser over all processes with DeepSpeed (pip install deepspeed).

Add it to a config of any task, and start it with tools/dist_train.sh:

    _base_ = ['vmzoo::segmentation/tiny_mni152.py', 'vmzoo::_base_/deepspeed.py']

DeepSpeed clips gradients itself, to the norm in the config's `optim_wrapper`, and writes checkpoints as folders of its
own format, when mmengine's CheckpointHook asks for them.
"""

strategy = dict(
    type='DeepSpeedStrategy',
    bf16=dict(enabled=True),
    zero_optimization=dict(stage=2, overlap_comm=True, contiguous_gradients=True),
    inputs_to_half=['inputs'],
)
