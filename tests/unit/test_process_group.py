"""Launchers that would start runs of their own are refused before a process group exists."""

from __future__ import annotations

import pytest

from selfgen_ds.errors import InputError
from selfgen_ds.ranks.process_group import init_process_group


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "PMI_SIZE"])
def test_tasks_without_rank_variables_do_not_train_models_of_their_own(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "2")
    with pytest.raises(InputError, match="say 1 rank: several tasks would each train a model"):
        init_process_group()


def test_torchrun_that_restarts_ranks_on_several_hosts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    with pytest.raises(InputError, match=r"^torchrun: --max_restarts works on one host"):
        init_process_group()
