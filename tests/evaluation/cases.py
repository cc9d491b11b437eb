"""All cases and mutations of the scorers."""

from __future__ import annotations

from tests.evaluation import (
    cases_answer_processor,
    cases_circular,
    cases_exact,
    cases_judged,
    cases_mme,
    cases_pope,
    cases_vqa,
)

_MODULES = (
    cases_answer_processor,
    cases_vqa,
    cases_pope,
    cases_mme,
    cases_exact,
    cases_circular,
    cases_judged,
)
CASES = [case for module in _MODULES for case in module.CASES]
MUTATIONS = [mutation for module in _MODULES for mutation in module.MUTATIONS]
