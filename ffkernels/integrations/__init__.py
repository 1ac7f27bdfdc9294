"""Code that people already have, on this package: one file per library or contract."""
