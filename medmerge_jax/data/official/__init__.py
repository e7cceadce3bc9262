"""The layouts in which the papers' data sets are published."""
