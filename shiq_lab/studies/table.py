"""The studies by name, in the order in which they are told. A line each to add one."""

from shiq_lab.errors import unknown
from shiq_lab.studies.ablation import ABLATION, ABLATION_TINY
from shiq_lab.studies.bfcl import BFCL
from shiq_lab.studies.data_size import DATA_SIZE
from shiq_lab.studies.every_loss import EVERY_LOSS
from shiq_lab.studies.frame import Study
from shiq_lab.studies.horizon import HORIZON
from shiq_lab.studies.metric import METRIC
from shiq_lab.studies.multi_turn import MULTI_TURN, MULTI_TURN_TINY
from shiq_lab.studies.off_policy import OFF_POLICY, OFF_POLICY_TINY
from shiq_lab.studies.real_lm import REAL_LM
from shiq_lab.studies.reward_kl import REWARD_KL
from shiq_lab.studies.reward_level import REWARD_LEVEL
from shiq_lab.studies.scale import SCALE
from shiq_lab.studies.tiny_truth import TINY

_ALL: tuple[Study, ...] = (
    TINY, EVERY_LOSS, REWARD_KL, ABLATION, ABLATION_TINY, OFF_POLICY, OFF_POLICY_TINY, REWARD_LEVEL, HORIZON, MULTI_TURN,
    MULTI_TURN_TINY, DATA_SIZE, METRIC, REAL_LM, BFCL, SCALE,
)  # fmt: skip
STUDIES: dict[str, Study] = {study.name: study for study in _ALL}


def lookup(name: str) -> Study:
    """The study of that name; an unknown one is a ValueError that suggests the nearest."""
    if name in STUDIES:
        return STUDIES[name]
    raise unknown("NAME", "a study", name, STUDIES)
