import torch
import torch.nn.functional as F

from vmzoo.layers import HRModule


def test_a_size_that_does_not_divide_is_fused_through_two_resizes():
    module = HRModule([[], []], (8, 8)).double().eval()
    fine, coarse = torch.randn(1, 8, 5, 7, dtype=torch.float64), torch.randn(1, 8, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        got = module([fine, coarse])
        up = F.interpolate(module.fuse_layers['0']['1'](coarse), scale_factor=2, mode='bilinear')
        assert up.shape[-2:] == (6, 8)
        want = F.relu(fine + F.interpolate(up, size=(5, 7), mode='bilinear'))
        torch.testing.assert_close(got[0], want)
        torch.testing.assert_close(got[1], F.relu(coarse + module.fuse_layers['1']['0'](fine)))
