"""Errors planted in the factors of Prop. 1 are seen by the quick suite (`mutations`)."""

from __future__ import annotations

import models
import mutations
import pytest
import shapes

# Each takes seconds: .ci/run plants every sixth of these, and each night all are planted.
PLANTED = mutations.MUTATIONS if shapes.MORE_CASES > 1 else mutations.MUTATIONS[::3]
ON_THIS_LINE = [
    pytest.param(
        mutation,
        id=str(mutation),
        marks=[models.NEEDS_HOOKED_TRANSFORMER] if mutation.needs_hooked_transformer else [],
    )
    for mutation in PLANTED
]


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=str)
def test_the_text_that_is_replaced_is_there(mutation: mutations.Mutation, tmp_path):
    """Whoever changes such a line changes its mutation, too."""
    place = tmp_path / mutation.file
    place.parent.mkdir(parents=True)
    place.write_text((mutations.REPOSITORY / "lens_lora" / mutation.file).read_text())
    mutation.plant(tmp_path)
    assert mutation.new in place.read_text()
    assert (mutations.REPOSITORY / mutation.tests.partition("::")[0]).is_file()


@pytest.mark.exhaustive
@pytest.mark.parametrize("mutation", ON_THIS_LINE)
def test_a_planted_error_is_seen(mutation: mutations.Mutation):
    outcome = mutations.outcome_of(mutation)
    assert not outcome.trouble
    assert outcome.failed, f"{mutation} is seen by none of {mutation.tests}"
