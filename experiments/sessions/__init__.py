"""A run of each kind, built from its config; and the policies that it begins with or learns from."""
