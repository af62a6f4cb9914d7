"""How a model is asked, fast: one base with adapters, decoding, caches, sampling and log-probabilities, servers."""
