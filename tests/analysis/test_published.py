"""Published numbers agree with themselves, with the released files and with the paper's exponents."""

import pytest

from aimscale.analysis import fit
from aimscale.analysis.published import TASKS, best_frozen, published_frame, table6


def test_every_printed_mean_is_the_mean_of_its_row():
    assert len(table6()) == 11
    assert len(TASKS) == 15
    assert table6()["mean"].to_numpy() == pytest.approx(table6()["printed_mean"].to_numpy(), abs=0.0006)


def test_sizes_have_the_parameters_of_the_released_files_and_the_flops_of_the_published_runs():
    sizes, last6 = published_frame(), table6()["imagenet-1k"]
    width, depth = sizes["width"], sizes["depth"]
    assert sizes["params_trunk"].to_list() == (depth * (12 * width**2 + 4 * width) + 2 * width).to_list()
    assert sizes["params_total"].to_list() == (width * 591 + sizes["params_trunk"] + sizes["params_head"]).to_list()
    head = width * 2048 + 2048 + 12 * (8 * 2048**2 + 2 * 2048) + 2 * 2048 + 2048 * 588 + 588
    assert sizes["params_head"].to_list() == head.to_list()
    assert 500_000 * 4096 * sizes["flops_per_image"][0] == pytest.approx(3.5e21, rel=0.01)
    assert 1_250_000 * 4096 * sizes["flops_per_image"][3] == pytest.approx(5.4e22, rel=0.01)
    assert sizes["in1k_last6"].to_list() == last6[sizes["size"]].to_list()
    assert last6["aim-7B-best"] == sizes["in1k_best6"][3]
    assert (best_frozen("imagenet-1k"), best_frozen("rxrx1")) == ("dinov2-g14", "aim-7B")


def test_losses_of_the_four_sizes_fall_by_the_exponents_that_the_paper_draws():
    exponents = [
        fit(published_frame(), "power:N", columns={"N": n}).params["a"] for n in ("params_trunk", "params_total")
    ]
    assert exponents == pytest.approx([0.0188, 0.0228], abs=5e-5)
