"""Who computes what in each step, and with which pages. Pure Python: no jax, numpy, asyncio, clock or randomness."""

from jaxserve.scheduler import policies
from jaxserve.scheduler.limits import Limits
from jaxserve.scheduler.policies import make as make_policy
from jaxserve.scheduler.policies import names as policy_names
from jaxserve.scheduler.policy import Evict, Policy
from jaxserve.scheduler.pool import IntegrityError
from jaxserve.scheduler.record import Recorder, ReplayError, replay
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.view import SeqView, View

__all__ = [
    "Evict",
    "IntegrityError",
    "Limits",
    "Policy",
    "Recorder",
    "ReplayError",
    "Scheduler",
    "SeqView",
    "View",
    "make_policy",
    "policies",
    "policy_names",
    "replay",
]
