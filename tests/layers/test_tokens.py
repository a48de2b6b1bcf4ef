"""Tokens among patches, and orders of tokens."""

import pytest
import torch

from vmzoo.layers.mamba import MambaMixer, make_paths, shuffle_paths, token_paths
from vmzoo.layers.tokens import column_order, drop_tokens, insert_tokens


@pytest.mark.parametrize('places', [(), (0,), (3,), (6,), (0, 1, 2), (1, 4, 8), (0, 7)])
def test_inserted_tokens_have_their_indices_and_drop_out_again(places):
    patches, tokens = torch.randn(2, 6, 4), torch.randn(2, len(places), 4)
    both = insert_tokens(patches, tokens, places)
    assert torch.equal(both[:, list(places)], tokens)
    assert torch.equal(drop_tokens(both, places), patches)


@pytest.mark.parametrize('places', [(), (0,), (3,), (2, 5)])
@pytest.mark.parametrize('grid', [(2, 3), (3, 2), (1, 6)])
def test_column_order_turns_the_grid_around_the_other_tokens(grid, places):
    patches, tokens = torch.randn(1, 6, 4), torch.randn(1, len(places), 4)
    got = insert_tokens(patches, tokens, places)[:, column_order(grid, places)]
    turned = patches.unflatten(1, grid).transpose(1, 2).flatten(1, 2)
    assert torch.equal(got, insert_tokens(turned, tokens, places))


def test_a_path_is_a_scan_of_the_tokens_in_its_order():
    mixer = MambaMixer(8, d_state=4, scan='forward').double()
    x, order = torch.randn(2, 7, 8, dtype=torch.float64), torch.randperm(7)
    back = torch.argsort(order)
    paths = make_paths((order,), (0,), (False,), 7, x.device)
    torch.testing.assert_close(mixer(x, paths), mixer(x[:, order])[:, back])
    paths = make_paths((order,), (0,), (True,), 7, x.device)
    torch.testing.assert_close(mixer(x, paths), mixer(x[:, order].flip(1)).flip(1)[:, back])


@pytest.mark.parametrize('scan', ['forward', 'forward_backward', 'cross'])
def test_shuffled_paths_are_the_paths_of_the_shuffled_tokens(scan):
    mixer = MambaMixer(8, d_state=4, scan=scan).double()
    x, order = torch.randn(2, 7, 8, dtype=torch.float64), torch.randperm(7)
    paths = token_paths(scan, 7, x.device, column_order((2, 3), (3,)))
    want = mixer(x[:, order], paths)[:, torch.argsort(order)]
    torch.testing.assert_close(mixer(x, shuffle_paths(paths, order)), want)


def test_a_scan_of_columns_needs_their_order():
    with pytest.raises(ValueError, match='pass columns'):
        MambaMixer(8, scan='cross')(torch.randn(1, 5, 8))
    with pytest.raises(ValueError, match='scan must be one of forward, backward, forward_backward, cross'):
        MambaMixer(8, scan='zigzag')
