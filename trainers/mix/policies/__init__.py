"""All policies by the name that settings give."""

from .policy_aioli import AioliPolicy
from .policy_base import Policy
from .policy_exp3 import Exp3Policy
from .policy_logits import LogitsPolicy
from .policy_mlp import MLPPolicy
from .policy_rate import RatePolicy
from .policy_skill_it import SkillItPolicy
from .policy_ucb import UCBPolicy


POLICIES: dict[str, type[Policy]] = {
    "logits": LogitsPolicy,
    "mlp": MLPPolicy,
    "rate": RatePolicy,
    "exp3": Exp3Policy,
    "ucb": UCBPolicy,
    "skill_it": SkillItPolicy,
    "aioli": AioliPolicy,
}
