"""Off-policy agents: SAC, DrQ, RAD, DDPG / DrQ-v2, and the methods SVEA and SGQN that attach to any of them."""
