"""Multiply-accumulates are counted as papers count them, and models cost what their papers state."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from vmzoo.models._macs import count_macs
from vmzoo.models._registry import family_of, list_architectures, summary_of
from vmzoo_kernels import get_routes, route_scan, selective_scan

from .published_macs import EXPLAINED, GMACS

CARDS = Path(__file__).parents[2] / 'model_cards'


class Scan(nn.Module):
    """2 images of 3x4 positions, 5 channels, 6 states and 4 routes, whose step sizes come from rank 7."""

    def forward(self, x):
        dim, d_state, rank, k = 5, 6, 7, 4
        new = x.new_zeros
        x_dbl = new(2, 12, k, rank + 2 * d_state)
        A, D, dt_weight, dt_bias = new(k, dim, d_state), new(k, dim), new(k, dim, rank), new(k, dim)
        return route_scan(x, x_dbl, A, D, dt_weight, dt_bias, get_routes('cross', 3, 4, device=x.device))


def test_a_scan_counts_its_operations_and_a_product_its_multiply_accumulates():
    lanes = 2 * 12 * 4 * 5
    assert count_macs(Scan(), torch.empty(2, 12, 5, device='meta')) == lanes * (9 * 6 + 1 + 7)
    assert count_macs(nn.Linear(3, 4, device='meta'), torch.empty(2, 3, device='meta')) == 2 * 3 * 4
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=2, device='meta')
    assert count_macs(conv, torch.empty(1, 4, 5, 7, device='meta')) == 35 * 6 * 2 * 9


@pytest.mark.parametrize('skip', [False, True])
def test_a_scan_of_whole_step_sizes_has_no_projection(skip):
    class Sequence(nn.Module):
        def forward(self, u):
            D = u.new_zeros(5) if skip else None
            return selective_scan(u, u, u.new_zeros(5, 6), u.new_zeros(2, 6, 12), u.new_zeros(2, 6, 12), D)

    assert count_macs(Sequence(), torch.empty(2, 5, 12, device='meta')) == 2 * 12 * 5 * (9 * 6 + skip)


def test_the_kernels_for_sequences_count_the_same():
    class Sequence(nn.Module):
        def forward(self, u):
            A, B, D = u.new_zeros(5, 6), u.new_zeros(2, 1, 6, 12), u.new_zeros(5)
            return torch.ops.vmzoo.sequence_scan(u, u, B, B, A, D, D, True, False)

    assert count_macs(Sequence(), torch.empty(2, 5, 12, device='meta')) == 2 * 12 * 5 * (9 * 6 + 1)


@pytest.mark.parametrize('name', sorted(GMACS))
def test_a_model_costs_what_its_paper_states(name):
    assert summary_of(name).gmacs == pytest.approx(GMACS[name], rel=0.03)


@pytest.mark.parametrize('name', EXPLAINED)
def test_a_difference_is_explained_in_the_card(name):
    stated = EXPLAINED[name]
    assert summary_of(name).gmacs != pytest.approx(stated, rel=0.03), 'it needs no explanation any more'
    card = ' '.join((CARDS / f'{family_of(name)}.md').read_text(encoding='utf-8').split())
    assert re.search(rf'`{name}`[^|]*\b{stated:g} G\b', card)


def test_figures_are_of_models_that_exist():
    assert {*GMACS, *EXPLAINED} <= {*list_architectures()}
    assert not GMACS.keys() & EXPLAINED.keys()
