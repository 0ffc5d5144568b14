"""The agents by name, and `Policy`, which acts from a finished run without any training code.

Example:
    >>> import agents
    >>> sorted(agents.AGENTS)[:3]
    ['ddpg', 'drq', 'drqv2']
"""

from __future__ import annotations

from agents.policy import Policy
from agents.registry import AGENTS, AgentSpec, make_agent, register

__all__ = ["AGENTS", "AgentSpec", "Policy", "make_agent", "register"]
