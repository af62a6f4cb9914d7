"""Did it work? Rates with intervals, figures, the paper's suites, disagreement, Elo."""
