"""Episodes of a policy that is done learning: how they are counted, kept and drawn."""
