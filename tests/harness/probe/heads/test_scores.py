"""Accuracies, their intervals, and answers of several ranks."""

from __future__ import annotations

import pytest
import torch

from aimscale.harness.probe.heads.scores import Predictions, score, to_predictions


def test_intervals_are_those_of_published_examples() -> None:
    # Newcombe, Statistics in Medicine 17:857 (1998), table I
    for correct, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        predicted = torch.tensor([0] * correct + [1] * (n - correct))
        found = score(Predictions(predicted, predicted == 0), torch.zeros(n, dtype=torch.int64), ("right", "wrong"))
        assert (found["top1_lo95"], found["top1_hi95"]) == pytest.approx((low, high), abs=5e-5)
        assert (found["top1"], found["chance"], found["top5"]) == (correct / n, 1, None)


def test_a_label_among_the_five_highest_scores_counts_for_top_5() -> None:
    scores, labels = torch.arange(7.0).flip(0).repeat(7, 1), torch.arange(7)  # the label of row i is at place i + 1
    predictions = to_predictions(scores, labels)
    assert predictions.in_top5.tolist() == [True] * 5 + [False] * 2
    found = score(predictions, labels, tuple("abcdefg"))
    assert (found["top1"], found["top5"]) == (pytest.approx(1 / 7), pytest.approx(5 / 7))
