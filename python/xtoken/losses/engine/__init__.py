"""The machinery shared by the losses: row blocks, merges, divergences and input checks."""
