"""What processes that torchrun or srun started tell each other before there is a process group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import pytest
from torch.distributed import TCPStore

from finetune.errors import FinetuneError
from finetune.training import turns
from finetune.training.turns import in_turn, of_rank_zero


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Makes this process one of two that torchrun has started; its agent's store serves them, also after a restart."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def become_rank(rank: int, restarts: int = 0) -> None:
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "x"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": server.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        for name, value in {**variables, "TORCHELASTIC_RESTART_COUNT": restarts}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(turns, "_calls", count())
        turns._store.cache_clear()

    yield become_rank
    turns._store.cache_clear()


def test_another_process_hears_what_rank_zero_has(become: Callable[..., None]) -> None:
    become(0)
    assert of_rank_zero("date", "2026-11-29") == "2026-11-29"
    become(1)
    assert of_rank_zero("date", "2026-11-30") == "2026-11-29"


def test_what_was_said_before_a_restart_does_not_count(become: Callable[..., None]) -> None:
    become(0)
    with pytest.raises(OSError), in_turn():
        raise OSError
    become(1)
    with pytest.raises(FinetuneError, match="prepares the run for this one has failed"), in_turn():
        pass
    become(0, restarts=1)
    with in_turn():
        pass
    become(1, restarts=1)
    with in_turn():
        pass


def test_nobody_to_meet_is_said(become: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    become(1)
    monkeypatch.setattr(turns, "MEETING_TIMEOUT", turns.timedelta(seconds=1))
    monkeypatch.setenv("MASTER_PORT", "9")
    with pytest.raises(FinetuneError, match=r"rank 1 cannot meet the other processes at 127\.0\.0\.1:9 .*MASTER_PORT"):
        of_rank_zero("date", 1)
