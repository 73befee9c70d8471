import torch
from torch import nn

from spec.heads.layers import PerHead, RMSNorm, hidden_stack, norm_stack


def test_norm_scales_without_centring() -> None:
    norm = RMSNorm(2)
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), torch.tensor([3.0, 4.0]) / 12.5**0.5)
    with torch.no_grad():
        norm.weight.fill_(2)
        norm.bias.fill_(1)
    torch.testing.assert_close(norm(torch.tensor([5.0, 5.0])), torch.tensor([3.0, 3.0]))
    torch.testing.assert_close(norm(torch.zeros(2)), torch.ones(2))


def test_later_heads_share_the_last_module() -> None:
    per_head = PerHead([nn.Linear(1, 1), nn.Linear(1, 1)])
    assert per_head(0) is per_head[0]
    assert per_head(1) is per_head(2) is per_head(9) is per_head[1]


def test_one_width_is_no_stack() -> None:
    assert len(hidden_stack((8,))) == 0
    assert len(norm_stack((8,))) == 1


def test_norms_have_the_width_of_what_they_normalise() -> None:
    x = torch.randn(3, 4)
    assert hidden_stack((4, 6, 5))(x).shape == norm_stack((4, 6, 5))(x).shape == (3, 5)
