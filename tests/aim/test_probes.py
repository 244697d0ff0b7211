import numpy as np
import torch

from aimscale.aim.probes import AttentiveProbe, LinearProbe


def test_attentive_probe_equals_its_description() -> None:
    width, num_heads, num_classes, num_tokens = 8, 2, 3, 5
    probe = AttentiveProbe(width, num_heads, num_classes).eval()
    probe.bn.running_mean.normal_()
    probe.bn.running_var.uniform_(0.5, 2)
    features = torch.randn(2, num_tokens, width)
    with torch.no_grad():
        logits = probe(features).numpy()

    weights = {name: value.double().numpy() for name, value in probe.state_dict().items()}
    for image in range(2):
        normed = (features[image].numpy() - weights["bn.running_mean"]) / np.sqrt(weights["bn.running_var"] + 1e-6)
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
