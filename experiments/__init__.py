"""The commands: the only place that puts environments, agents and loops together."""
