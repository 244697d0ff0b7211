"""How autoregressive image models scale, and what the next size will be worth: the harness around that question."""
