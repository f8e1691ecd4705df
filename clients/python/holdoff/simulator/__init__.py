"""A simulated Exact Online: a real HTTP server that keeps the provider's rules.

Test jobs against it: it answers as the provider does and reports who broke
which rule when. It knows nothing of Holdoff.
"""

from holdoff.simulator.rules import Provider, Rotation, Rule, Seed
from holdoff.simulator.server import serving

__all__ = ["Provider", "Rotation", "Rule", "Seed", "serving"]
