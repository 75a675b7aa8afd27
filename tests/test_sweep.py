"""A sweep: jobs that fail, are skipped, are interrupted, and the table over them."""

import csv
import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from hydra._internal.hydra import Hydra
from omegaconf import OmegaConf
from PIL import Image as PIL

from genfw.__main__ import main
from genfw.train import sweep
from genfw.train.compose import check_hydra
from genfw.train.errors import ConfigError, GenfwError
from genfw.train.jobs import Fresh, Interrupted, Job, handled, living, records
from genfw.train.run_folder import locked, noted
from genfw.train.sweep import Local, close, keep, reopen
from genfw.train.sweep_table import Group, groups, plot, show


class Script(Fresh):
    """Jobs that are a line of shell each."""

    def command(self, job):
        return ["sh", "-c", f"cd {job.folder}; {job.overrides[0]}"]


class Sweeper(Hydra):
    def __init__(self, error=None):
        self.error = error

    def multirun(self, name, task, overrides):
        if isinstance(self.error, int):
            signal.raise_signal(self.error)
        elif self.error:
            raise self.error


class Loader:
    """Hydra's, as far as a launcher asks it."""

    def __init__(self, folder):
        self.folder = folder

    def load_sweep_config(self, config, overrides):
        said = {"task": overrides, "hydra": []}
        sweep = {"dir": str(self.folder), "subdir": "${hydra.job.num}"}
        hydra = {"job": {"num": 0, "id": 0}, "sweep": sweep, "overrides": said}
        return OmegaConf.create({"hydra": hydra, "optimized": "val/nll"})


def launch(folder, *lines, n_jobs=1):
    launcher = Local(n_jobs)
    launcher.task = Script()
    launcher._run([Job(n, folder, folder / str(n), (line,)) for n, line in enumerate(lines)])


def wait_until(condition):
    while not condition():
        time.sleep(0.01)


def codes(folder):
    return [each["exit"] for each in records(folder)]


def test_a_failed_job_stops_no_other(tmp_path):
    launch(tmp_path, "exit 3", "exit 0", "kill -9 $$", "exit 0")
    assert codes(tmp_path) == [3, 0, -9, 0]
    assert [each.get("error") for each in records(tmp_path)] == [
        "exit code 3", None, "killed by SIGKILL", None,
    ]  # fmt: skip


def test_a_failed_job_is_told_of_once_and_by_us(tmp_path, capsys):
    """Hydra's sweeper asks every job for its value."""
    launcher = Local()
    launcher.task = Script()
    launcher.config = OmegaConf.create()
    launcher.context = SimpleNamespace(config_loader=Loader(tmp_path))
    failed, well = launcher.launch([["exit 3"], ["true"]], 0)
    assert well.return_value is None
    with pytest.raises(GenfwError, match="job 0 failed: exit code 3"):
        _ = failed.return_value
    assert capsys.readouterr().err == ""


def test_so_many_side_by_side(tmp_path):
    """Each waits for the other: one after the other they would wait forever."""
    meet = "touch here; until [ -e ../{}/here ]; do sleep 0.02; done"
    launch(tmp_path, meet.format(1), meet.format(0), n_jobs=2)
    assert codes(tmp_path) == [0, 0]


def test_side_by_side_is_each_in_its_own_place(tmp_path, monkeypatch):
    """The third takes the place of the one that ended first, and with it its GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "a,b")
    said = "echo $CUDA_VISIBLE_DEVICES > gpu; "
    wait = said + "until [ -e ../2/gpu ]; do sleep 0.02; done"
    launch(tmp_path, wait, said, said, n_jobs=2)
    assert [(tmp_path / n / "gpu").read_text().strip() for n in "012"] == ["a", "b", "b"]


def test_what_is_finished_is_not_run_again(tmp_path):
    lines = ("echo x >> ran", "echo x >> ran; [ -e ../mended ]")
    launch(tmp_path, *lines)
    (tmp_path / "mended").touch()
    launch(tmp_path, *lines)
    assert codes(tmp_path) == [0, 0]
    assert [len((tmp_path / n / "ran").read_text().split()) for n in "01"] == [1, 2]


def test_a_job_whose_folder_is_gone_is_run_again(tmp_path, capsys):
    launch(tmp_path, "echo x >> ../ran", "true")
    shutil.rmtree(tmp_path / "0")
    show(tmp_path, records(tmp_path), planned=2)
    said = capsys.readouterr().out
    assert "its folder is gone" in said and "1 of 2 jobs finished" in said
    launch(tmp_path, "echo x >> ../ran", "true")
    assert (tmp_path / "ran").read_text().split() == ["x", "x"]


def test_another_job_under_the_number_of_a_finished_one_is_refused(tmp_path):
    launch(tmp_path, "true")
    with pytest.raises(GenfwError, match=r"was true and is now :.*seed"):
        launch(tmp_path, ":")


def test_a_job_that_outlived_its_sweep_is_finished(tmp_path):
    """The sweep was killed before it could note the exit code."""
    job = Job(0, tmp_path, tmp_path / "0", ("seed=0",))
    job.folder.mkdir()
    job.record(None)
    assert not job.finished
    (job.folder / "results.json").write_text("{}")
    assert not job.finished
    (job.folder / "results.json").write_text('{"val/nll": 1.0}')
    assert job.finished


def test_a_job_that_outlived_its_sweep_is_left_alone(tmp_path):
    """While it lives nobody takes its folder; its lock ends with it, also by SIGKILL."""
    job = Job(0, tmp_path, tmp_path / "0", ("sleep 60 & wait",))
    process = Script().start(job, 1)
    assert living(tmp_path) == {0: str(process.pid)}
    with pytest.raises(GenfwError, match=f"jobs 0 still run.*{process.pid}"):
        sweep.run(Sweeper(), "config", Script(), [], tmp_path)
    with pytest.raises(GenfwError, match="job 0 runs already"):
        Script().start(job, 1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: not living(tmp_path))


def test_a_file_system_without_locks_stops_nothing(tmp_path, monkeypatch, capsys):
    """As Lustre, where it is mounted so."""

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(fcntl, "lockf", refuse)
    launch(tmp_path, "true")
    assert codes(tmp_path) == [0] and living(tmp_path) == {}
    with locked(tmp_path):
        assert "has no locks" in capsys.readouterr().out
    (tmp_path / "0" / "run.lock").mkdir()
    with pytest.raises(ConfigError, match="cannot write to this folder"), locked(tmp_path / "0"):
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_running_job_and_ends_the_sweep(tmp_path, number, capsys):
    waits = "trap 'echo saved > saved; exit 130' INT TERM; touch up; while :; do sleep 0.02; done"

    def send():
        wait_until((tmp_path / "0" / "up").exists)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=send).start()
    with pytest.raises(Interrupted) as stopped:
        launch(tmp_path, waits, "true")
    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    assert (tmp_path / "0" / "saved").exists(), "it was let finish"
    assert not (tmp_path / "1").exists(), "nothing starts after the signal"
    assert [each["error"] for each in records(tmp_path)] == ["interrupted"]
    show(tmp_path, records(tmp_path), planned=2)
    said = capsys.readouterr().out
    assert "job 0 interrupted after 0 s" in said and "failed" not in said
    assert f"0 of 2 jobs finished; table.csv, .md in {tmp_path}" in said  # no picture of nothing


def test_what_is_ignored_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handled(Interrupted.by):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            with pytest.raises(Interrupted):
                signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_error_of_before_is_not_said_again(tmp_path):
    """A job that failed, ran again and was interrupted, or killed."""
    for line, said in (("exit 143", "interrupted"), ("kill -9 $$", "killed by SIGKILL")):
        (tmp_path / "0").mkdir(exist_ok=True)
        (tmp_path / "0" / "error.txt").write_text("no ink")
        launch(tmp_path, line)
        assert [each["error"] for each in records(tmp_path)] == [said]


def test_a_job_starts_in_an_empty_folder(tmp_path):
    job = Job(3, tmp_path, tmp_path / "3", ("seed=0",), ("hydra.verbose=true",))
    job.folder.mkdir()
    (job.folder / "config.yaml").write_text("old")
    assert job.arguments() == ["seed=0", "hydra.verbose=true", f"hydra.run.dir='{job.folder}'"]
    assert not job.folder.exists()
    assert (tmp_path / "3.before-1" / "config.yaml").read_text() == "old"


def test_a_job_that_was_saved_goes_on(tmp_path):
    """While a file is whole; else it starts anew. The folder does not vouch for itself."""
    from genfw.train.checkpoint import write

    job = Job(0, tmp_path, tmp_path / "0", ("seed=0", "trusted=[mine]"), ("hydra.verbose=true",))
    file = job.folder / "checkpoints" / "last.ckpt"
    file.parent.mkdir(parents=True)
    (job.folder / "config.yaml").touch()
    write({"global_step": 3}, file)
    assert job.arguments(["--config-name=x"]) == [f"resume={job.folder}", "trusted=[mine]"]
    file.write_bytes(file.read_bytes()[:-1])
    anew = job.arguments(["--config-name=x"])
    assert anew[:2] == ["--config-name=x", "seed=0"]
    assert not job.folder.exists()


def test_threads_group_and_name_of_a_job(tmp_path, monkeypatch):
    """Two jobs on four cores have two threads each, and of three GPUs one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    code = "import os, json; json.dump(dict(os.environ), open('env.json', 'w'))"
    popen = subprocess.Popen

    def instead(command, **more):
        return popen([sys.executable, "-c", code], cwd=job.folder, **more)

    monkeypatch.setattr(subprocess, "Popen", instead)
    job = Job(3, tmp_path / "sweep", tmp_path / "sweep" / "3", ("model=vae", "seed=7"))
    for at_once, threads, gpu in ((1, None, "0,1,2"), (2, "2", "1"), (-1, "1", "0")):
        place = None if at_once == 2 else 0  # job 3 is the second of two
        assert Fresh(axes=("seed",)).start(job, at_once, place).wait() == 0
        said = json.loads((job.folder / "env.json").read_text())
        assert said.get("OMP_NUM_THREADS") == threads
        assert said["CUDA_VISIBLE_DEVICES"] == gpu
        assert (said["WANDB_RUN_GROUP"], said["WANDB_NAME"]) == ("sweep", "3 seed=7")
        assert "LOCAL_RANK" not in said


def test_what_goes_wrong_is_noted(tmp_path):
    with pytest.raises(RuntimeError), noted(tmp_path):
        raise RuntimeError("no ink\nmore")
    assert (tmp_path / "error.txt").read_text() == "RuntimeError: no ink\n"


# ---- sweep=<folder> ------------------------------------------------------------------------------


def test_a_sweep_is_gone_on_with_by_its_folder(tmp_path):
    overrides = ["seed=0,1", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=x", "hydra.verbose=true"]
    keep(tmp_path, [*overrides, "trusted=[mine]"], 2)
    folder, again = reopen([f"sweep={tmp_path}", "hydra.launcher.n_jobs=1"])
    assert folder == tmp_path
    assert again == ["seed=0,1", "hydra.launcher.n_jobs=2", "hydra.launcher.n_jobs=1"]
    assert reopen(["seed=1"]) == (None, ["seed=1"])
    with pytest.raises(ConfigError, match="holds a sweep already"):
        keep(tmp_path, overrides, 2)


def test_a_sweeps_folder_does_not_vouch_for_itself(tmp_path):
    keep(tmp_path, ["param._target_=mine.Flow", "seed=0,1"], 2)
    with pytest.raises(ConfigError, match="trusted"):
        reopen([f"sweep={tmp_path}"])
    assert "trusted=[mine]" in reopen([f"sweep={tmp_path}", "trusted=[mine]"])[1]


@pytest.mark.parametrize(
    "harm",
    [
        "hydra.callbacks.x._target_=os.system",
        "hydra.searchpath=[/evil]",
        "hydra.launcher.setup=[touch PWNED]",
        "+hydra.launcher.setup=[touch PWNED]",
        "hydra.launcher.python=evil",
        "hydra.launcher._target_=os.system",
        "hydra.launcher={_target_:os.system}",
        "hydra.sweeper._target_=os.system",
        "hydra.sweeper.sampler._target_=os.system",
        "hydra.sweeper.custom_search_space=evil.space",
        "hydra.sweeper.params={param._target_:evil.Flow}",
        "hydra.sweeper.params.trusted=[evil]",
        "hydra.job_logging.handlers.x.class=evil.Handler",
    ],
)
def test_code_cannot_hide_in_hydras_own_keys(tmp_path, harm):
    (tmp_path / "sweep.json").write_text(json.dumps({"overrides": [harm], "jobs": 1}))
    with pytest.raises(ConfigError, match=r"sweep\.json"):
        reopen([f"sweep={tmp_path}", "trusted=[mine]"])


def test_who_vouches_for_one_class_does_not_for_another(tmp_path):
    keep(tmp_path, ["param._target_=mine.Flow", "net={_target_:evil.Net}"], 2)
    with pytest.raises(ConfigError, match=r"names evil\.Net, and a folder"):
        reopen([f"sweep={tmp_path}", "trusted=[mine]"])
    reopen([f"sweep={tmp_path}", "trusted=[mine,evil.Net]"])


@pytest.mark.parametrize(
    "harm",
    [
        {"launcher": {"_target_": "os.system", "command": "touch PWNED"}},
        {"launcher": {"_target_": "hydra_plugins.genfw.sweep.subprocess.Popen"}},
        {"sweeper": {"sampler": {"_target_": "optuna.samplers._base.os.system"}}},
        {"callbacks": {"x": {"_target_": "evil.Callback"}}},
        {"job_logging": {"handlers": {"x": {"()": "evil.Handler"}}}},
        {"hydra_logging": {"formatters": {"x": {"class": "evil.Formatter"}}}},
        {"env": [{"_target_": "evil.f"}]},
    ],
)
def test_hydra_imports_nothing_foreign(harm):
    """What stands in the configuration itself, of a conf folder or a plug-in."""
    with pytest.raises(ConfigError, match="is not among what Hydra's own part"):
        check_hydra(OmegaConf.create(harm), ["mine"])
    check_hydra(OmegaConf.create(harm), ["os", "evil", "hydra_plugins.genfw", "optuna"])


def test_a_poisoned_sweep_runs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('PWNED', 'w')")
    for harm in ("hydra.launcher._target_=evil.Launcher", "param._target_=evil.Flow"):
        kept = {"overrides": ["seed=0,1", harm], "jobs": 2}
        (tmp_path / "sweep.json").write_text(json.dumps(kept))
        assert main([f"sweep={tmp_path}", "trusted=[mine]"]) == 2
    assert main(["-m", "seed=0,1", "+hydra.callbacks.x={_target_:evil.C}", "model=nothing"]) == 2
    assert [each.name for each in tmp_path.iterdir() if each.name != "evil.py"] == ["sweep.json"]


def test_a_requeued_sweep_goes_on_by_itself(tmp_path, monkeypatch):
    keep(tmp_path, ["seed=0,1"], 2)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(ConfigError, match="holds a sweep already"):
        keep(tmp_path, ["seed=0,1"], 2)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    keep(tmp_path, ["seed=0,1"], 2)


# ---- the table -----------------------------------------------------------------------------------


def swept(folder):
    values = {("eps", 0): 2.0, ("eps", 1): 2.5, ("eps", 2): 4.0, ("x0", 0): 1.0}
    jobs = [(param, seed) for param in ("eps", "x0") for seed in range(3)]
    keep(folder, ["param=eps,x0", "seed=0,1,2"], len(jobs))
    for number, (param, seed) in enumerate(jobs):
        overrides = ("model=vdm", f"param={param}", f"seed={seed}")
        job = Job(number, folder, folder / str(number), overrides)
        job.folder.mkdir()
        value = values.get((param, seed))
        if value is not None:
            kept = {"test/bpd": value, "test/nll": 2 * value, "versions/torch": "2"}
            (job.folder / "results.json").write_text(json.dumps(kept))
        job.record(1 if value is None else 0)
    return values


def test_mean_and_standard_error_over_seeds(tmp_path):
    values = swept(tmp_path)
    eps, x0 = groups(records(tmp_path))
    three = [values["eps", seed] for seed in range(3)]
    assert eps.choices == {"param": "eps"}, "what all jobs share is no column, nor is the seed"
    assert eps.mean("test/bpd") == pytest.approx(statistics.mean(three))
    assert eps.stderr("test/bpd") == pytest.approx(statistics.stdev(three) / 3**0.5)
    assert eps.cell("test/bpd") == "2.83 ± 0.60"
    assert (x0.jobs, x0.finished, x0.cell("test/bpd")) == (3, 1, "1")
    assert x0.stderr("test/bpd") is None
    some = Group({}, 3, {"test/bpd": [1.0, 2.0, 3.0], "test/fd": [5.0, 9.0], "test/x": [5.0]})
    assert (some.cell("test/fd"), some.cell("test/x")) == ("7.0 ± 2.0 (2)", "5 (1)")


@pytest.mark.parametrize("ends", [(0, 0, 0), (1, 0, 0), (0, 1, 0)])
def test_a_job_that_is_asked_for_twice_counts_once(tmp_path, ends):
    """seed=0,0,1: no second job of seed 0 makes the error smaller."""
    keep(tmp_path, ["seed=0,0,1"], 3)
    for number, (seed, end) in enumerate(zip((0, 0, 1), ends, strict=True)):
        job = Job(number, tmp_path, tmp_path / str(number), ("model=vae", f"seed={seed}"))
        job.folder.mkdir()
        if not end:
            (job.folder / "results.json").write_text(json.dumps({"test/bpd": 2.0 + seed}))
        job.record(end)
    (group,) = groups(records(tmp_path))
    assert (group.jobs, group.finished, group.mean("test/bpd")) == (2, 2, 2.5)
    assert group.stderr("test/bpd") == pytest.approx(0.5)


def test_a_narrow_screen_cuts_no_name(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"grid_vdm_score_{schedule}" for schedule in ("cosine", "linear")]
    kept = dict.fromkeys(("test/bpd", "test/nll", "val/nll", "seconds/fit"), 123.456789)
    kept |= {"test/fd_digits": 39.0, "test/fd_digits_samples": 1000}
    made = [
        {
            "number": n,
            "overrides": [f"experiment={each}"],
            "exit": 0,
            "results": kept,
            "folder": tmp_path,
        }
        for n, each in enumerate(names)
    ]
    show(tmp_path, made, 2)
    said = capsys.readouterr().out
    assert all(each in said for each in names), said


def test_tables_are_written_and_the_sweep_is_not_done(tmp_path, capsys):
    swept(tmp_path)
    assert close(tmp_path) is False
    with (tmp_path / "table.csv").open() as file:
        eps, x0 = csv.DictReader(file)
    assert (eps["param"], eps["finished"], float(eps["test/nll"])) == ("eps", "3", 17 / 3)
    assert (x0["jobs"], x0["finished"], x0["test/nll_stderr"]) == ("3", "1", "")
    assert (eps["test/nll_jobs"], x0["test/nll_jobs"]) == ("3", "1")
    with (tmp_path / "jobs.csv").open() as file:
        jobs = list(csv.DictReader(file))
    assert [job["status"] for job in jobs] == ["finished"] * 4 + ["failed: exit code 1"] * 2
    assert (jobs[2]["seed"], jobs[2]["test/bpd"], jobs[2]["versions/torch"]) == ("2", "4.0", "2")
    assert "| eps | 3 | 2.83 ± 0.60 | 5.7 ± 1.2 |" in (tmp_path / "table.md").read_text()
    assert "- job 4: failed: exit code 1" in (tmp_path / "table.md").read_text()
    assert PIL.open(tmp_path / "table.png").size[0] > 400
    said = capsys.readouterr().out
    assert f"4 of 6 jobs finished; table.csv, .md, .png in {tmp_path}" in said
    assert "job 4 (param=x0 seed=1): failed: exit code 1" in said


def test_tables_are_whole_or_as_they_were(tmp_path, capsys):
    """A limit on the size of files stops a write in its midst, as a full disk does."""
    swept(tmp_path)
    close(tmp_path)
    before = {each: each.read_bytes() for each in tmp_path.iterdir() if each.is_file()}
    assert {"table.csv", "table.md", "table.png", "jobs.csv"} <= {each.name for each in before}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        close(tmp_path)
        with pytest.raises(OSError):
            plot(tmp_path / "table.png", groups(records(tmp_path)), "test/bpd")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"{tmp_path}: the tables cannot be written" in capsys.readouterr().err
    assert {each: each.read_bytes() for each in before} == before
    close(tmp_path)
    assert {each for each in tmp_path.iterdir() if each.is_file()} == set(before)


def test_what_hydras_own_parts_cannot_do_is_a_line(tmp_path, capsys):
    swept(tmp_path)
    with pytest.raises(GenfwError, match=r"\(hydra/sweeper=optuna\) failed: KeyError: 'lr'"):
        sweep.run(Sweeper(KeyError("lr")), "config", Fresh(), ["hydra/sweeper=optuna"], tmp_path)
    assert "4 of 6 jobs finished" in capsys.readouterr().out
    (tmp_path / "jobs").rename(tmp_path / "kept")
    (tmp_path / "jobs").touch()
    with pytest.raises(ConfigError, match=f"{tmp_path}: cannot write to this folder: .*"):
        sweep.run(Sweeper(), "config", Fresh(), [], tmp_path)


def test_a_job_without_a_number_is_no_finished_one(tmp_path, capsys):
    """Whatever its exit code; a classifier has no NLL, and is finished."""
    made = {
        "nets=1 seed=0": (0, {"test/nll": 80.0, "seconds/fit": 1.0}),
        "nets=1 seed=1": (1, {"test/nll": None, "test/nonfinite": 3.0, "test/count": 7.0}),
        "nets=1 seed=2": (0, {"test/nll": None, "test/nonfinite": 7.0, "test/count": 7.0}),
        "nets=2 seed=0": (0, {"test/accuracy": 0.9}),
        "nets=2 seed=1": (1, {}),
    }
    keep(tmp_path, ["nets=1,2"], len(made))
    for number, (words, (code, results)) in enumerate(made.items()):
        job = Job(number, tmp_path, tmp_path / str(number), tuple(words.split()))
        job.folder.mkdir()
        kept = {"seconds/fit": 9.0, **results} if results else {}
        (job.folder / "results.json").write_text(json.dumps(kept))
        job.record(code)
    assert close(tmp_path) is False
    with (tmp_path / "jobs.csv").open() as file:
        said = [row["status"] for row in csv.DictReader(file)]
    assert said == [
        "finished",
        "not finite: the NLL of 3 of 7 test images is not finite",
        "not finite: the NLL of 7 of 7 test images is not finite",
        "finished",
        "failed: exit code 1",
    ]
    one, two = groups(records(tmp_path))
    assert (one.finished, one.mean("test/nll"), one.mean("seconds/fit")) == (1, 80.0, 1.0)
    assert two.finished == 1
    assert f"- job 1: {said[1]}" in (tmp_path / "table.md").read_text()
    shown = capsys.readouterr().out
    assert "2 of 5 jobs finished, 2 with a NLL that is not finite; table.csv" in shown
    assert f"job 2 (seed=2): {said[2]}" in shown.replace("nets=1 ", "")
    for number, code in ((1, 1), (4, 1), (2, 0)):  # 2 alone makes the sweep fail
        (tmp_path / str(number) / "results.json").write_text('{"test/nll": 1.0}')
        Job(number, tmp_path, tmp_path / str(number), ("seed=0",)).record(0)
        assert sweep.run(Sweeper(), "config", Fresh(), [], tmp_path) == code
    assert "5 of 5 jobs finished; table.csv" in capsys.readouterr().out


def test_the_exit_code_says_whether_all_jobs_finished(tmp_path, capsys):
    swept(tmp_path)
    assert sweep.run(Sweeper(), "config", Fresh(), ["seed=0"], tmp_path) == 1
    assert sweep.run(Sweeper(KeyboardInterrupt()), "config", Fresh(), [], tmp_path) == 130
    assert sweep.run(Sweeper(signal.SIGTERM), "config", Fresh(), [], tmp_path) == 143
    assert f"python -m genfw sweep={tmp_path}" in capsys.readouterr().err
    for number in (4, 5):
        overrides = ("model=vdm", "param=x0", f"seed={number - 3}")
        Job(number, tmp_path, tmp_path / str(number), overrides).record(0)
    assert sweep.run(Sweeper(), "config", Fresh(), [], tmp_path) == 0


def test_the_grid_is_eight_combinations():
    from genfw.train.compose import compose
    from genfw.train.overrides import jobs
    from genfw.train.session import session

    with session():
        commands = jobs(["experiment=glob(grid_*)"])
        composed = [compose(command) for command in commands]
    models = [OmegaConf.select(each, "model._target_") for each in composed]
    assert sorted(models) == ["genfw.MHVAE", "genfw.VAE", *["genfw.VDM"] * 6]
    pairs = {(each.param._target_, each.schedule._target_) for each in composed if "param" in each}
    assert len(pairs) == 6
