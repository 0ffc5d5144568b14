"""On-policy agents: PPO with the surrogates that take the place of its clip, TRPO, V-MPO, REBEL."""
