from typing import Any

import numpy as np
import torch

from aimscale.aim.probes import AttentiveProbe


def used(probe: AttentiveProbe, width: int) -> tuple[Any, Any, dict[str, Any]]:
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
