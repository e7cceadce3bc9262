"""One training step, one loop: every stage is the same step on another parameterization."""
