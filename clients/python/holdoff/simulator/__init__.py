"""A simulated Exact Online: a real HTTP server that keeps the provider's rules.

Test jobs against it: it answers as the provider does and reports who broke
which rule when. It knows nothing of Holdoff.
"""

from holdoff.simulator.accounting import Rule
from holdoff.simulator.faults import Fault, FaultKind
from holdoff.simulator.oauth import Rotation
from holdoff.simulator.rules import Provider
from holdoff.simulator.seeds import Seed
from holdoff.simulator.server import serving
from holdoff.simulator.switches import Switches

__all__ = ["Fault", "FaultKind", "Provider", "Rotation", "Rule", "Seed", "Switches", "serving"]
