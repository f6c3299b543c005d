"""All rewards by the name that settings give."""

from .reward_base import Reward
from .reward_difficulty import DifficultyReward
from .reward_gradient import GradientReward
from .reward_loss import LossReward
from .reward_regret import RegretReward
from .reward_similarity import SimilarityReward
from .reward_uncertainty import UncertaintyReward


REWARDS: dict[str, type[Reward]] = {
    "loss": LossReward,
    "regret": RegretReward,
    "difficulty": DifficultyReward,
    "similarity": SimilarityReward,
    "gradient": GradientReward,
    "uncertainty": UncertaintyReward,
}
