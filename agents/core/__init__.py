"""What every agent family shares; knows no task and no algorithm by name."""
