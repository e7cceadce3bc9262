import pytest

from medmerge_jax.errors import UserError
from medmerge_jax.runtime import processes

STEP = {
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "4",
}


@pytest.fixture
def asked(monkeypatch):
    """What JAX is asked for, instead of waiting for other processes."""
    found = []
    monkeypatch.setattr("jax.distributed.initialize", lambda **options: found.append(options))
    monkeypatch.setattr("jax.config.update", lambda *_: None)
    for name in STEP:
        monkeypatch.delenv(name, raising=False)
    return found


@pytest.fixture
def slurm(monkeypatch):
    def pretend(**more):
        for name, value in {**STEP, **more}.items():
            monkeypatch.setenv(name, value)

    return pretend


def test_one_process_asks_nobody(asked, slurm):
    processes.start(None, None, None)
    processes.start("localhost:1234", 1, 0)
    slurm(SLURM_NTASKS="1")
    processes.start(None, None, None)
    assert asked == []


def test_a_shell_of_slurm_is_no_task(asked, slurm, monkeypatch):
    slurm()
    monkeypatch.delenv("SLURM_STEP_NODELIST")
    processes.start(None, None, None)
    assert asked == []


@pytest.mark.parametrize("tasks, devices", [("2", [0, 1, 2, 3]), ("8", None)])
def test_slurm_is_found_and_the_only_task_of_a_node_has_its_gpus(asked, slurm, tasks, devices):
    slurm(SLURM_NTASKS=tasks)
    processes.start(None, None, None)
    (options,) = asked
    assert options["local_device_ids"] == devices
    assert "coordinator_address" not in options  # JAX reads it from SLURM


def test_flags_come_before_slurm(asked, slurm):
    slurm()
    processes.start("other:1234", 3, 2)
    (options,) = asked
    assert options["coordinator_address"] == "other:1234"
    assert (options["num_processes"], options["process_id"]) == (3, 2)
    assert options["cluster_detection_method"] == "deactivate"
    assert options["heartbeat_timeout_seconds"] < 60


@pytest.mark.parametrize(
    "given, message",
    [
        (("host:1", 2, None), "--process_id is missing"),
        ((None, 2, 1), "--coordinator is missing"),
        (("host:1", 2, 2), "0 ≤ I < N"),
        (("host:1", 2, -1), "0 ≤ I < N"),
        (("host", 2, 1), "--coordinator HOST:PORT"),
    ],
)
def test_flags_that_cannot_be(asked, given, message):
    with pytest.raises(UserError, match=message):
        processes.start(*given)
    assert asked == []


def test_nobody_answers(monkeypatch, asked):
    def fail(**_):
        raise RuntimeError("DEADLINE_EXCEEDED")

    monkeypatch.setattr("jax.distributed.initialize", fail)
    with pytest.raises(UserError, match=r"did not meet at host:1 .*DEADLINE_EXCEEDED.*start all"):
        processes.start("host:1", 2, 1)


class Store:
    """The key-value store that JAX's processes share."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.values.items() if key.startswith(folder + "/")]

    def blocking_key_value_get(self, key, timeout):
        assert timeout > 3600 * 1000
        return self.values[key]


@pytest.fixture
def several(monkeypatch):
    """Two processes in one, one after the other."""
    store = Store()
    monkeypatch.setattr(processes, "_client", lambda: store)

    def process(index):
        us = type("Us", (), {k: v for k, v in vars(processes._Us).items() if k[0] != "_"})
        us.index, us.count = index, 2
        us.calls, us.stop_calls = iter(range(1000)), iter(range(1000))
        return us

    both = [process(0), process(1)]

    def become(index):
        monkeypatch.setattr(processes, "_Us", both[index])

    return become


def test_alone_nothing_is_shared():
    assert processes.from_first(lambda: {1: (2,)}) == {1: (2,)}
    with processes.first_alone():
        processes.wait_for_all()


def test_the_others_hear_what_the_first_found(several):
    several(0)
    assert processes.from_first(lambda: {"a": [1, None]}) == {"a": [1, None]}
    assert processes.from_first(lambda: 2) == 2
    several(1)
    assert processes.from_first(lambda: 1 / 0) == {"a": [1, None]}
    assert processes.from_first(lambda: 1 / 0) == 2


@pytest.mark.parametrize("error", [UserError("no such file"), OSError(28, "no such file")])
def test_the_others_stop_where_the_first_does(several, error):
    def fail():
        raise error

    several(0)
    with pytest.raises(type(error)):
        processes.from_first(fail)
    with pytest.raises(type(error)), processes.first_alone():
        fail()
    several(1)
    with pytest.raises(processes.StoppedElsewhereError, match="no such file"):
        processes.from_first(lambda: None)
    entered = []
    with (
        pytest.raises(processes.StoppedElsewhereError, match="no such file"),
        processes.first_alone(),
    ):
        entered.append(1)
    assert not entered


@pytest.mark.parametrize("wanting", [0, 1])
@pytest.mark.parametrize("lead", [-5, -1, 0, 3, 5])
@pytest.mark.parametrize("moment", range(9))
def test_all_stop_at_the_same_call(several, wanting, lead, moment):
    """However far the second process is ahead of the first or behind it."""
    calls, stopped = [0, 0], [None, None]
    for turn in range(100):
        for index in (0, 1):
            due = turn + (lead if index else 0)
            while stopped[index] is None and calls[index] <= due:
                several(index)
                wants = index == wanting and calls[index] >= 10 + moment
                if why := processes.all_stop("SIGTERM" if wants else ""):
                    assert why == "SIGTERM"
                    stopped[index] = calls[index]
                calls[index] += 1
    assert stopped[0] == stopped[1]
    assert 10 + moment <= stopped[0] <= 10 + moment + 25
