"""Which loss teaches uncommon tokens: the demo's pair and text under every loss, several seeds."""
