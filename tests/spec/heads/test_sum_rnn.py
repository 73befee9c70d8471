import pytest
import torch

from spec.heads import build

from .reference import config


def names(**changes: object) -> set[str]:
    return set(build(config(**changes)).state_dict())


def test_tied_names() -> None:
    assert names() == {
        "emb.0.0.weight",
        "proj.0.0.weight",
        "proj.1.0.weight",
        "ln.0.0.weight",
        "ln.0.0.bias",
        "head.0.weight",
        "head.1.weight",
        "head.2.weight",
    }


def test_untied_names() -> None:
    each = ("emb.{}.0.weight", "proj.{}.0.weight", "ln.{}.0.weight", "ln.{}.0.bias", "head.{}.weight")
    assert names(tie_weights=False) == {name.format(i) for name in each for i in range(3)}


def test_stack_names() -> None:
    extra = names(inner_dim=(6, 8), emb_dim=(6, 8), proj_dim=(6, 8)) - names()
    assert extra == {
        "emb.0.1.weight",
        "emb.0.1.bias",
        "emb.0.3.weight",
        "proj.0.1.weight",
        "proj.0.1.bias",
        "proj.0.3.weight",
        "proj.1.1.weight",
        "proj.1.1.bias",
        "proj.1.3.weight",
        "adapter.0.weight",
        "ln.0.2.weight",
        "ln.0.3.weight",
        "ln.0.3.bias",
    }


def test_shapes() -> None:
    shapes = {name: tuple(t.shape) for name, t in build(config(inner_dim=(6,))).state_dict().items()}
    assert shapes["emb.0.0.weight"] == (23, 8)
    assert shapes["proj.0.0.weight"] == (8, 12)
    assert shapes["proj.1.0.weight"] == (8, 6)
    assert shapes["adapter.0.weight"] == (6, 8)
    assert shapes["ln.0.0.weight"] == (6,)
    assert shapes["head.2.weight"] == (23, 6)


@pytest.mark.parametrize(("rows", "d", "h", "n"), [(23, 12, 8, 3), (31, 6, 10, 2)])
def test_size(rows: int, d: int, h: int, n: int) -> None:
    c = {"vocab_size": rows, "hidden_size": d, "n_predict": n, "inner_dim": (h,), "emb_dim": (h,), "proj_dim": (h,)}
    assert build(config(**c)).num_parameters() == 2 * rows * h + d * h + h * h + 2 * h
    untied = n * 2 * rows * h + d * h + (n - 1) * h * h + n * 2 * h
    assert build(config(**c, tie_weights=False)).num_parameters() == untied


def test_sizes_of_real_models() -> None:
    """SmolLM2-135M at h = d, and Qwen2.5-0.5B at h = 512: 57 M; 156 M tied and 468 M untied."""
    for V, d, h, n, tied, millions in (
        (49152, 576, 576, 5, True, 57),
        (151936, 896, 512, 3, True, 156),
        (151936, 896, 512, 3, False, 468),
    ):
        dims = {"inner_dim": (h,), "emb_dim": (h,), "proj_dim": (h,)}
        with torch.device("meta"):
            speculator = build(config(vocab_size=V, hidden_size=d, n_predict=n, tie_weights=tied, **dims))
        assert round(speculator.num_parameters() / 1e6) == millions
