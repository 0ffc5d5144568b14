"""Distractions: what changes the agent's picture and never what it is paid for."""
