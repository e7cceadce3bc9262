"""Workers: what they do with jobs that fail, are lost, wait for others or are changed."""

import contextlib
import dataclasses
import json
import threading
import time

import pytest

from medmerge_jax.config import Config
from medmerge_jax.errors import DivergedError, OutOfMemoryError, UserError
from medmerge_jax.runtime import preemption
from medmerge_jax.storage.run_directory import RunDirectory
from medmerge_jax.studies import state, worker
from medmerge_jax.studies.jobs import Job
from medmerge_jax.studies.state import JobStates
from medmerge_jax.studies.worker import Worker


def job(name, *after, recipe="ft"):
    parents = {f"p{i}": f"job:{one}" for i, one in enumerate(after)} or {"p0": "random"}
    return Job(name, dataclasses.replace(Config(), recipe=recipe, parents=parents, start="p0"))


JOBS = {
    one.name: one
    for one in (
        job("warmup"),
        job("a", "warmup"),
        job("b", "warmup"),
        job("soup", "a", "b", recipe="soup"),
        job("after a", "a"),
    )
}


class Inputs:
    """A pool that has nothing."""

    def inputs(self, job):
        return job.name

    def forget(self, jobs):
        pass


@pytest.fixture
def runs(monkeypatch):
    """Names of the jobs that are run, in order; `fail` may raise for one of them."""
    names, failures = [], {}

    def run_recipe(config, directory, name, *, curves):
        names.append(name)
        if failures.get(name):
            raise failures[name].pop(0)
        directory.write_json("config.json", {"config": {"parents": config.parents}})
        results = {"wall_seconds": 1.0, "parents": list(config.parents)}
        directory.write_json("results.json", results)
        return results

    monkeypatch.setattr(worker, "run_recipe", run_recipe)
    monkeypatch.setattr(worker, "finished", lambda directory: directory.read_json("results.json"))
    return names, failures


def work(folder, jobs=None):
    one = Worker(jobs or JOBS, folder, Inputs())
    one.work()
    return one


def statuses(folder):
    return {name: entry.status for name, entry in JobStates(folder).read().items()}


def test_each_job_is_run_once_after_those_that_it_starts_from(tmp_path, runs):
    names, _ = runs
    work(tmp_path)
    assert names == list(JOBS)
    assert set(statuses(tmp_path).values()) == {"done"}
    work(tmp_path)
    assert names == list(JOBS)


def test_a_diverged_job_is_recorded_and_the_rest_go_on(tmp_path, runs, capsys):
    names, failures = runs
    failures["a"] = [DivergedError("the loss was not finite")]
    one = work(tmp_path)
    assert names == ["warmup", "a", "b", "soup"]  # it is not tried again, nor what starts from it
    assert one.failed() == {
        "a": "the loss was not finite", "after a": "it starts from a, which failed",
    }  # fmt: skip
    # The soup was made without it.
    assert json.loads((tmp_path / "soup" / "results.json").read_text())["parents"] == ["p1"]
    assert "a failed: the loss was not finite; the other jobs go on" in capsys.readouterr().err
    work(tmp_path)
    assert names == ["warmup", "a", "b", "soup"]


def test_a_soup_without_members_fails(tmp_path, runs):
    _, failures = runs
    failures.update({name: [DivergedError("far too fast")] for name in "ab"})
    assert set(work(tmp_path).failed()) == {"a", "b", "soup", "after a"}


def test_a_job_without_memory_is_tried_once_more(tmp_path, runs):
    names, failures = runs
    failures["b"] = [OutOfMemoryError("full")]
    assert work(tmp_path).failed() == {}
    assert names.count("b") == 2
    failures["c"] = [OutOfMemoryError("full"), OutOfMemoryError("still full")]
    assert work(tmp_path, {**JOBS, "c": job("c", "warmup")}).failed() == {"c": "still full"}


def test_what_would_meet_all_jobs_ends_the_study_and_fails_none(tmp_path, runs):
    names, failures = runs
    failures["a"] = [UserError("there is no such parent"), preemption.Preempted("SIGTERM")]
    for error in (UserError, preemption.Preempted):
        with pytest.raises(error):
            work(tmp_path)
        assert statuses(tmp_path)["a"] == "waiting"
    assert work(tmp_path).failed() == {}
    assert names.count("a") == 3


def test_results_that_are_deleted_are_made_again_and_so_are_soups_of_them(tmp_path, runs):
    names, _ = runs
    work(tmp_path)
    names.clear()
    (tmp_path / "b" / "results.json").unlink()
    work(tmp_path)
    assert names == ["b", "soup"]


def test_a_soup_of_further_members_is_made_again(tmp_path, runs):
    names, _ = runs
    work(tmp_path)
    names.clear()
    more = {**JOBS, "c": job("c", "warmup"), "soup": job("soup", "a", "b", "c", recipe="soup")}
    work(tmp_path, {name: more[name] for name in ("warmup", "a", "b", "c", "soup")})
    assert names == ["c", "soup"]


def test_a_soup_of_fewer_members_is_made_again(tmp_path, runs):
    """Although none of them is newer than the soup."""
    names, _ = runs
    work(tmp_path)
    names.clear()
    fewer = {**JOBS, "soup": job("soup", "a", recipe="soup")}
    work(tmp_path, fewer)
    assert names == ["soup"]


def lose(folder, name, lines):
    """Leaves what a process leaves that is killed at work, so many epochs after it began."""
    with JobStates(folder).changing() as entries:
        entries[name] = dataclasses.replace(entries[name], status="running")
    (folder / name / "results.json").unlink(missing_ok=True)
    records = "".join(json.dumps({"epoch": n + 1}) + "\n" for n in range(lines))
    (folder / name / "metrics.jsonl").write_text(records)


def test_a_job_that_kills_its_process_again_and_again_is_given_up(tmp_path, runs):
    work(tmp_path)
    with JobStates(tmp_path).changing() as entries:
        entries["b"].lost = worker._LOST - 1
    lose(tmp_path, "b", lines=0)
    failed = work(tmp_path).failed()
    assert failed == {"b": "its process was killed 10 times before it had finished another epoch"}


def test_a_job_that_is_lost_but_gets_on_is_not_given_up(tmp_path, runs):
    work(tmp_path)
    with JobStates(tmp_path).changing() as entries:
        entries["b"].lost = worker._LOST - 1
    lose(tmp_path, "b", lines=3)
    assert work(tmp_path).failed() == {}


def test_a_job_in_another_process_is_waited_for(tmp_path, runs, monkeypatch, capsys):
    names, _ = runs
    stack = contextlib.ExitStack()
    RunDirectory(tmp_path / "warmup").hold(stack)
    naps = []

    def nap(seconds):
        naps.append(seconds)
        stack.close()  # the other process has ended, without results

    monkeypatch.setattr(worker.time, "sleep", nap)
    work(tmp_path)
    assert (len(naps), names) == (1, list(JOBS))
    assert "waiting for jobs of other processes, 5 of them not done" in capsys.readouterr().err


def test_two_workers_share_the_jobs_and_repeat_none(tmp_path, monkeypatch):
    """Locks are of open files, so that two threads are held apart by them as two processes are."""
    ran = []

    def run_recipe(config, directory, name, *, curves):
        ran.append((threading.get_ident(), name))
        time.sleep(0.02)
        directory.write_json("results.json", {"wall_seconds": 0.02})
        return {"wall_seconds": 0.02}

    monkeypatch.setattr(worker, "run_recipe", run_recipe)
    monkeypatch.setattr(worker, "finished", lambda directory: directory.read_json("results.json"))
    monkeypatch.setattr(worker, "_POLL", 0.01)
    jobs = {f"j{i}": job(f"j{i}") for i in range(12)}
    threads = [threading.Thread(target=work, args=(tmp_path, jobs)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(name for _, name in ran) == sorted(jobs)
    assert len({thread for thread, _ in ran}) == 2


def test_a_damaged_jobs_file_is_named(tmp_path):
    (tmp_path / state.JOBS_FILE).write_text('{"jobs": {"a": {"status": "done", "colour": "red"}}}')
    with pytest.raises(UserError, match=r"jobs\.json is not as this program writes it .*colour"):
        JobStates(tmp_path).read()


def test_what_is_left_takes_as_long_as_jobs_of_the_same_recipe_took(tmp_path, runs, capsys):
    jobs = {one.name: one for one in (job("a"), job("b", recipe="lp"), job("c"), job("d"))}
    one = Worker(jobs, tmp_path, Inputs())
    entries = {"a": state.Entry(state.DONE, seconds=100.0)}
    assert one._seconds_left(entries, ["a"], 1) == 300  # of lp nothing is known yet
    entries["b"] = state.Entry(state.DONE, seconds=10.0)
    assert one._seconds_left(entries, ["a", "b"], 1) == 200
    assert one._seconds_left(entries, ["a", "b"], 2) == 100
    assert one._seconds_left(entries, ["b"], 1) == 30
    assert one._seconds_left({}, [], 1) is None
    one.work()
    said = capsys.readouterr().err
    assert "a: job 1 of 4\n" in said
    assert "d: job 4 of 4, about 1 s left\n" in said
