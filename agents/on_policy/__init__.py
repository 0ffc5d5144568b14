"""On-policy agents: PPO and the surrogates that take the place of its clip."""
