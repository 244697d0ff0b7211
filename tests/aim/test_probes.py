import numpy as np
import torch

from aimscale.aim.probes import AttentiveProbe


def test_attentive_probe_equals_its_description() -> None:
    num_heads = 2
    probe, features = AttentiveProbe(8, num_heads, 3).eval(), torch.randn(2, 5, 8)
    probe.bn.running_mean.normal_()
    probe.bn.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        logits = probe(features).numpy()
    weights = {name: value.double().numpy() for name, value in probe.state_dict().items()}
    tokens = (features.numpy() - weights["bn.running_mean"]) / np.sqrt(weights["bn.running_var"] + 1e-6)
    for image, normed in enumerate(tokens):
        keys, values = normed @ weights["k.weight"].T, normed @ weights["v.weight"].T
        pooled = []
        for head in range(num_heads):
            at = slice(head * 4, head * 4 + 4)
            scores = np.exp(keys[:, at] @ weights["cls_token"][0, 0, at] / np.sqrt(4))
            pooled.append(scores @ values[:, at] / scores.sum())
        np.testing.assert_allclose(logits[image], weights["linear.weight"] @ np.concatenate(pooled), atol=1e-5)
