"""Target placements from load samples: pure functions, no torch, no engine."""
