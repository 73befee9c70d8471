import pytest
import torch

from spec.heads import SumLstm, build, fuse, fused_projection, init_random, save

from .reference import config, inputs


def lstm(**changes: object) -> SumLstm:
    speculator = build(config("sum_lstm", **changes))
    assert isinstance(speculator, SumLstm)
    init_random(speculator)
    return speculator


def test_order_is_forget_input_output_cell() -> None:
    speculator = lstm(inner_dim=(6,))
    w = speculator.state_dict()
    for j, width in ((0, 12), (1, 6)):
        parts = fused_projection(speculator, j).split(8)
        assert parts[0].shape == (8, width)
        for part, gate in zip(parts, ("forget", "input", "output", "cell"), strict=True):
            assert torch.equal(part, w[f"{gate}_proj.{j}.weight"])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scale", [False, True])
def test_parity(tied: bool, scale: bool) -> None:
    speculator = lstm(tie_lstm_embs=tied, scale_input=scale, inner_dim=(6, 8), emb_dim=(4, 8)).double()
    fused = fuse(speculator)
    assert fused is not speculator
    states, tokens = inputs(speculator.config, positions=50)
    torch.testing.assert_close(fused(states, tokens), speculator(states, tokens), rtol=0, atol=1e-12)
    assert torch.equal(fused.draft(states, tokens[:, 0]), speculator.draft(states, tokens[:, 0]))


def test_a_draft_vocabulary_stays() -> None:
    speculator = build(config("sum_lstm", draft_vocab_size=3), torch.tensor([5, 7, 9]))
    states, tokens = inputs(speculator.config)
    assert torch.equal(fuse(speculator).draft(states, tokens[:, 0]), speculator.draft(states, tokens[:, 0]))


def test_what_cannot_be_fused_stays_as_it_is() -> None:
    stacked = lstm(proj_dim=(4, 8))
    for speculator in (stacked, build(config())):
        assert fuse(speculator) is speculator
    with pytest.raises(ValueError, match=r"proj_dim is \(4, 8\)"):
        fused_projection(stacked, 0)


def test_a_fused_copy_is_not_saved(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TypeError, match="FusedSumLstm"):
        save(fuse(lstm()), tmp_path / "x")
    assert not list(tmp_path.iterdir())
