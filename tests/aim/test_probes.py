from typing import Any

import numpy as np
import torch

from aimscale.aim.probes import AttentiveProbe, EfficientProbe, LinearProbe


def used(probe: AttentiveProbe | EfficientProbe, width: int) -> tuple[Any, Any, dict[str, Any]]:
    """Standardised tokens and logits of two images of five tokens, and the weights, in float64."""
    probe.eval()
    probe.bn.running_mean.normal_()
    probe.bn.running_var.uniform_(0.5, 2)
    features = torch.randn(2, 5, width)
    with torch.no_grad():
        logits = probe(features).numpy()
    weights = {name: value.double().numpy() for name, value in probe.state_dict().items()}
    normed = (features.numpy() - weights["bn.running_mean"]) / np.sqrt(weights["bn.running_var"] + 1e-6)
    return normed, logits, weights


def test_attentive_probe_equals_its_description() -> None:
    num_heads = 2
    tokens, logits, weights = used(AttentiveProbe(8, num_heads, 3), 8)
    for image, normed in enumerate(tokens):
        keys, values = normed @ weights["k.weight"].T, normed @ weights["v.weight"].T
        pooled = []
        for head in range(num_heads):
            at = slice(head * 4, head * 4 + 4)
            scores = np.exp(keys[:, at] @ weights["cls_token"][0, 0, at] / np.sqrt(4))
            pooled.append(scores @ values[:, at] / scores.sum())
        np.testing.assert_allclose(logits[image], weights["linear.weight"] @ np.concatenate(pooled), atol=1e-5)


def test_attentive_probe_has_the_printed_number_of_parameters() -> None:
    width, num_classes = 16, 7
    count = sum(parameter.numel() for parameter in AttentiveProbe(width, 2, num_classes).parameters())
    assert count == 2 * width**2 + width + num_classes * width


def test_linear_probe_is_mean_then_norm_then_linear() -> None:
    probe = LinearProbe(8, 3)
    features = torch.randn(16, 5, 8) * 3 + 1
    pooled = features.mean(1)
    normed = (pooled - pooled.mean(0)) / (pooled.var(0, unbiased=False) + 1e-6).sqrt()
    expected = normed @ probe.linear.weight.T + probe.linear.bias
    torch.testing.assert_close(probe(features), expected)


def test_efficient_probe_equals_the_published_pooling() -> None:
    """Each query scores whole tokens, undivided by heads; each pools a slice of one value projection of its own."""
    probe = EfficientProbe(64, 3)
    torch.nn.init.normal_(probe.queries)
    both, logits, weights = used(probe, 64)
    for image, tokens in enumerate(both):
        values = tokens @ weights["v.weight"].T
        pooled = []
        for query in range(32):
            scores = np.exp(tokens @ weights["queries"][query] / 8)
            pooled += list(scores / scores.sum() @ values[:, 2 * query : 2 * query + 2])
        np.testing.assert_allclose(logits[image], weights["linear.weight"] @ pooled + weights["linear.bias"], atol=1e-5)


def test_a_norm_behind_the_efficient_pooling_changes_no_function() -> None:
    """Published: tokens as they are, a batch norm behind the pooling. Ours in front of it can compute the same."""
    torch.manual_seed(0)
    width, features = 32, torch.randn(50, 7, 32) * torch.rand(32) + 3
    ours = EfficientProbe(width, 4)
    torch.nn.init.normal_(ours.queries)
    expected = ours(features)  # in training mode: the statistics of these tokens
    mean, std = features.mean((0, 1)), (features.var((0, 1), correction=0) + 1e-6).sqrt()
    attention = (features @ (ours.queries / std).T / width**0.5).softmax(dim=1)
    pooled = torch.einsum("bnq,bnq->bq", attention, features @ (ours.v.weight / std).T)  # 32 queries of one channel
    centre, spread = pooled.mean(0), (pooled.var(0, correction=0) + 1e-6).sqrt()
    normed = (pooled - centre) / spread
    shift = (ours.v.weight / std) @ mean
    bias = ours.linear.bias + ours.linear.weight @ (centre - shift)
    torch.testing.assert_close(normed @ (ours.linear.weight * spread).T + bias, expected, rtol=1e-4, atol=1e-4)


def test_efficient_probe_has_the_printed_number_of_parameters() -> None:
    for width, queries in ((64, 32), (24, 8)):
        count = sum(parameter.numel() for parameter in EfficientProbe(width, 7).parameters())
        assert count == width**2 + queries * width + 7 * width + 7
