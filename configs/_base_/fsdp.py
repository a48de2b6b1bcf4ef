"""Shards parameters, gradients and optimiser over all processes, for models that do not fit one GPU.

Add it to a config of any task, and start it with tools/dist_train.sh:

    _base_ = ['vmzoo::segmentation/tiny_mni152.py', 'vmzoo::_base_/fsdp.py']
"""

# use_orig_params lets parameters have their own weight decay and learning rate.
strategy = dict(type='VMZooFSDPStrategy', model_wrapper=dict(use_orig_params=True))
