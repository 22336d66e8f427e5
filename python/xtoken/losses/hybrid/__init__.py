"""KL on a common set of tokens plus sorted L1 on the rest: GOLD, H-KL and ULD."""
