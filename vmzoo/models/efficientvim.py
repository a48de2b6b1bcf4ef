"""EfficientViM.

Paper: `EfficientViM: Efficient Vision Mamba with Hidden State Mixer based State Space Duality` -
    https://arxiv.org/abs/2411.15241 (CVPR 2025)
Weights: https://github.com/mlvlab/EfficientViM (MIT)

Three stages from stride 16 on, whose mixer averages the tokens into a few hidden states, mixes channels there, and
hands them back: no recurrence, so no scan. timm has the family (`timm/models/efficientvim.py`) and the authors'
weights. So nothing is registered here: this file lists timm's models as the zoo's, with what timm's cfgs do not say,
and converts the authors' files, strictly: what timm's conversion leaves out (the second head of a distilled model), it
leaves in for the comparison of keys.
"""

import re
from typing import Any

from timm.models.efficientvim import EfficientViM
from torch import Tensor

__all__ = ['checkpoint_filter_fn', 'timm_cfgs']

# The files hold both; the stated accuracies are those of the averaged weights.
PREFERRED_WRAPPER = 'model_ema'

# What the classifier alone uses, but timm keeps when a model is pruned to its features.
CLASSIFIER_PARAMETERS = ('weights', 'weights_dist')


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: EfficientViM) -> dict[str, Tensor]:
    """Map a published checkpoint, of a classifier or of a dense backbone, to timm's model.

    Norms lose the dimensions that the authors broadcast over. A model without classifier takes what it has of a
    classifier's checkpoint, and keeps its fusion weights, which it does not use, where a backbone's has none.

    Args:
        state_dict: Unwrapped weights.
        model: The model they are for.
    """
    affine = re.compile(r'\bnorm\.(\d\.)?(weight|bias)$')
    out = {key: value.flatten() if affine.search(key) else value for key, value in state_dict.items()}
    if model.num_classes == 0:
        target = model.state_dict()
        out = {k: v for k, v in out.items() if k in target or not re.match(r'norm\.|heads_dist\.|weights_dist$', k)}
        out = {key: target[key] for key in CLASSIFIER_PARAMETERS if key in target} | out
    return out


def _cfg(file: str) -> dict[str, Any]:
    return {
        'url': f'https://drive.google.com/file/d/{file}/view',
        'origin_url': 'https://github.com/mlvlab/EfficientViM',
        'paper_name': 'EfficientViM: Efficient Vision Mamba with Hidden State Mixer based State Space Duality',
        'paper_ids': 'arXiv:2411.15241',
    }


timm_cfgs = {
    'efficientvim_m1.e300_in1k': _cfg('1zat4-1npC-kvVkDsCDp--c5Sou7gn5Uj'),
    'efficientvim_m1.e450_in1k': _cfg('1ztpSVnWccoGEEobpmk107US3MjX4LEgz'),
    'efficientvim_m1_dist.in1k': _cfg('1S0HSauwj-d-2_tqf20fBlNAdQbUxhypD'),
    'efficientvim_m2.e300_in1k': _cfg('1Mm7Ems4KHFCunNJ8iI0FFQOC3hav7sEj'),
    'efficientvim_m2.e450_in1k': _cfg('1_YbrVx06cLtAaCgLG-jKH5tx1mLmnfO2'),
    'efficientvim_m2_dist.in1k': _cfg('1HrzY3hI1F0FwXXy8ejO6kXUi-QGK4I74'),
    'efficientvim_m3.e300_in1k': _cfg('1zmqmSwl0FHSQHaqjHHGR1XRalPibi_sf'),
    'efficientvim_m3.e450_in1k': _cfg('1z8dxkVLPbZdHaran9pDeuMmILsz5xUlf'),
    'efficientvim_m3_dist.in1k': _cfg('13u_UgyOC2sH1ThcQO4GhnW572SggfsTq'),
    'efficientvim_m4.e300_in1k': _cfg('1cfRSlvtPaGxMf1N1N_m3e1_IDh7b_OEq'),
    'efficientvim_m4.e450_in1k': _cfg('1rVnX2FT9AVJdU6xSPhEUllXZlhUYv28z'),
    'efficientvim_m4_dist.in1k': _cfg('1gvINJ-oszWj7_Gb9wAYuIGV15xWDAQxQ'),
}
