"""Positions of both schemes, spelled out."""

import torch

from gistkern import GistLayout


def test_gist_first_puts_gists_before_their_segment():
    layout = GistLayout.from_segments([3, 2], [2, 1], tail=2)
    #                                        raw raw raw g  g  raw raw g  tail
    assert layout.positions("gist_first").tolist() == [[2, 3, 4, 0, 1, 3, 4, 2, 3, 4]]
    assert layout.positions("absolute").tolist() == [list(range(10))]


def test_every_row_stands_behind_the_gists_it_sees():
    layout = GistLayout.hierarchical([4, 4, 3], 2, 3, tail=4, see_earlier_gists=True, sink_tokens=0)
    place = layout.positions("gist_first")[0]
    mask = layout.token_mask()[0] & layout.is_gist[0]
    for row in range(layout.num_rows):
        if not layout.is_gist[0, row]:
            earlier = mask[row].nonzero().flatten()
            assert (place[earlier] < place[row]).all()


def test_gist_first_positions_do_not_grow_with_the_context():
    short = GistLayout.hierarchical([64] * 2, 4, 10, tail=8)
    long = GistLayout.hierarchical([64] * 500, 4, 10, tail=8)
    assert short.positions("gist_first").max() == long.positions("gist_first").max() == 67
    assert torch.equal(short.positions("gist_first")[0, -18:], long.positions("gist_first")[0, -18:])


def test_padding_has_position_zero_and_shifts_nobody():
    ids = torch.tensor([[0, 0, 1, 2, 9, 3], [1, 2, 9, 3, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    layout = GistLayout.from_input_ids(ids, [9], mask)
    assert layout.positions("absolute").tolist() == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 0, 0]]
    assert layout.positions("gist_first").tolist() == [[0, 0, 1, 2, 0, 1], [1, 2, 0, 1, 0, 0]]
