"""Numbers reach the disk at once, and Weights & Biases never stops a run."""

import csv
import json
import os
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from genfw.train import loggers
from genfw.train.loggers import CSV, Wandb, answers, choose_mode
from genfw.train.process import prepare


def rows(file):
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


def records(file: Path):
    """A .wandb file: LevelDB's log, 32 KiB blocks after a header of 7 bytes, holding protobufs."""
    from wandb.proto import wandb_internal_pb2 as pb

    data = file.read_bytes()
    assert data[:4] in (b"", b":W&B")
    at, whole = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0:
            at += left
            continue
        if at + 7 + size > len(data):
            return  # still being written
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            record = pb.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def read_wandb(folder: Path, run: str = ""):
    """(config, history rows, summary) of the offline run of a run folder, or of an evaluation's,
    whose id goes on with `run`."""
    identity = (folder / "wandb_id.txt").read_text().strip()
    (file,) = folder.glob(f"wandb/offline-run-*/run-{identity}{run}.wandb")
    deadline = time.monotonic() + 20  # W&B's own process writes, a moment after `finish` returns
    while not any(r.HasField("exit") for r in records(file)) and time.monotonic() < deadline:
        time.sleep(0.05)
    config, history, summary = {}, [], {}

    def values(items):
        return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}

    for r in records(file):
        config |= values([*r.run.config.update, *r.config.update])
        summary |= values(r.summary.update)
        if r.history.item:
            history.append(values(r.history.item))
    return config, history, summary


def test_csv_writes_every_row_at_once_and_grows_columns(tmp_path):
    logger = CSV(tmp_path)
    logger.log_metrics({"a": torch.tensor(1.5)}, step=0)
    assert rows(logger.path) == [{"step": "0", "a": "1.5"}]
    logger.log_metrics({"b": 2.0}, step=1)
    logger.log_metrics({"a": 3.0, "b": 4.0}, step=2)
    again = CSV(tmp_path)  # a resumed run goes on in the same file
    again.log_metrics({"a": 5.0}, step=3)
    found = rows(logger.path)
    assert [row["step"] for row in found] == ["0", "1", "2", "3"]
    assert [row["a"] for row in found] == ["1.5", "", "3.0", "5.0"]
    assert [row["b"] for row in found] == ["", "2.0", "4.0", ""]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.csv"]


class Server:
    """A local web server that answers with a status and a content type, or is silent."""

    def __init__(self, status: int, kind: str):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *args):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self.url

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def silent():
    """The address of a server that takes connections and never says a word."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize(
    ("status", "kind", "heard"),
    [
        (200, "application/json; charset=utf-8", True),
        (401, "application/json", True),
        (200, "text/html", False),  # a hotel's login page
        (502, "text/html", False),  # a proxy's regret
    ],
)
def test_answer_is_json(status, kind, heard):
    with Server(status, kind) as url:
        assert answers(url) is heard


def test_silence_ends_in_time(silent):
    started = time.monotonic()
    assert not answers(silent, patience=0.3)
    assert time.monotonic() - started < 1


def test_nobody_there_and_nonsense():
    assert not answers("http://127.0.0.1:1")
    assert not answers("no address at all")


@pytest.fixture
def account(monkeypatch):
    """W&B as if it had credentials, or not, and were served at some address."""
    import wandb

    def pretend(credentials: bool, url: str):
        monkeypatch.delenv("WANDB_MODE", raising=False)
        monkeypatch.setattr(wandb, "login", lambda **asked: credentials and not asked["prompt"])
        settings = SimpleNamespace(base_url=url)
        monkeypatch.setattr(wandb, "setup", lambda *given: SimpleNamespace(settings=settings))

    return pretend


def test_credentials_and_network(account):
    with Server(200, "application/json") as url:
        account(True, url)
        assert choose_mode() == ("online", "")
        account(False, url)
        mode, reason = choose_mode()
    assert mode == "offline"
    assert "credentials" in reason


def test_credentials_without_network(account, silent):
    account(True, silent)
    started = time.monotonic()
    mode, reason = choose_mode()
    assert time.monotonic() - started < 3
    assert mode == "offline"
    assert silent in reason


@pytest.mark.parametrize(
    ("asked", "mode"), [({}, "auto"), ({"WANDB_MODE": "online"}, "auto"), ({}, "online")]
)
def test_a_stranger_is_offline_and_not_asked(tmp_path, asked, mode):
    """No account, no terminal, the real W&B; in its own process, for W&B keeps what it knows."""
    program = f"from genfw.train.loggers import choose_mode; print(*choose_mode({mode!r}), sep='|')"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    home = {**clean, "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "PYTHONPATH": "."}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**home, **asked},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=True,
    )
    assert done.stdout.startswith("offline|no credentials")
    assert done.stderr == ""


def test_online_is_a_wish_and_no_reason_to_ask(account, monkeypatch):
    with Server(200, "application/json") as url:
        account(False, url)
        assert choose_mode("online")[0] == "offline"
        monkeypatch.setenv("WANDB_MODE", "online")
        mode, reason = choose_mode("auto")
        assert mode == "offline" and "credentials" in reason
        account(True, url)
        assert choose_mode("online") == ("online", "")


def test_environment_is_obeyed_by_auto_only(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_mode("auto") == ("disabled", "WANDB_MODE=disabled")
    assert choose_mode("offline") == ("offline", "logger.wandb.mode=offline")
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    assert choose_mode("auto")[0] == "offline"


def test_mode_is_one_of_four(tmp_path):
    with pytest.raises(ValueError, match="auto, online, offline, disabled"):
        Wandb(tmp_path, mode="ofline")


def test_offline_run_holds_config_metrics_and_summary(tmp_path):
    logger = Wandb(tmp_path, mode="offline", tags=["law"])
    logger.log_hyperparams({"model": {"name": "vdm"}, "seed": 3})
    identity = (tmp_path / "wandb_id.txt").read_text().strip()
    assert identity == logger.version
    for step in range(3):
        logger.log_metrics({"val/nll": torch.tensor(90.0 - step)}, step=step)
    logger.summarize({"test/nll": 88.5})
    assert "wandb sync" in logger.where
    synced = Path(logger.where.split("wandb sync ")[1])
    assert synced.is_dir()
    assert identity in synced.name
    logger.finish()
    assert "wandb sync" in logger.where
    logger.finish()
    logger.log_metrics({"val/nll": 1.0}, step=4)  # too late: ignored

    config, history, summary = read_wandb(tmp_path)
    assert config["model"] == {"name": "vdm"}
    assert config["seed"] == 3
    curve = [(row["trainer/global_step"], row["val/nll"]) for row in history if "val/nll" in row]
    assert curve == [(0, 90.0), (1, 89.0), (2, 88.0)]
    assert summary["test/nll"] == 88.5


def test_refusal_of_a_run_costs_only_the_run(tmp_path, monkeypatch, capsys):
    import wandb

    def refuse(**settings):
        raise RuntimeError("disk full")

    monkeypatch.setattr(wandb, "init", refuse)
    logger = Wandb(tmp_path, mode="offline")
    logger.log_hyperparams({"a": 1})
    logger.log_metrics({"b": 1.0}, step=0)
    logger.summarize({"c": 1})
    logger.finish()
    assert "disk full" in capsys.readouterr().err
    assert "disk full" in logger.where
    assert not Wandb(tmp_path, mode="offline").where  # of which nobody has asked for a run


def test_online_refusal_continues_offline(tmp_path, monkeypatch):
    import wandb

    init, modes = wandb.init, []

    def refuse_online(**settings):
        modes.append(settings["mode"])
        if settings["mode"] == "online":
            raise wandb.errors.CommError("invalid key")
        return init(**settings)

    monkeypatch.setattr(wandb, "init", refuse_online)
    monkeypatch.setattr(loggers, "choose_mode", lambda mode: ("online", ""))
    logger = Wandb(tmp_path, mode="online")
    logger.log_hyperparams({"a": 1})
    assert modes == ["online", "offline"]
    assert "invalid key" in logger.where
    logger.finish()
    assert read_wandb(tmp_path)[0]["a"] == 1


def test_a_failing_log_call_is_said_once(tmp_path, capsys):
    logger = Wandb(tmp_path, mode="offline")
    logger.log_hyperparams({"a": 1})
    run = logger.run

    class Broken:
        id = "x"

        def log(self, row):
            raise OSError("no space left")

    logger.run = Broken()
    for step in range(3):
        logger.log_metrics({"b": 1.0}, step=step)
    assert capsys.readouterr().err.count("no space left") == 1
    run.finish()


@pytest.mark.parametrize(("code", "patience"), [(143, "LAST_PATIENCE"), (0, "UPLOAD_PATIENCE")])
def test_a_run_does_not_wait_for_its_upload_for_ever(tmp_path, monkeypatch, code, patience):
    ever = threading.Event()

    class Slow:
        disabled = offline = False
        url, settings = "https://there", SimpleNamespace(sync_dir=tmp_path / "run x")

        def finish(self, exit_code):
            ever.wait(60)

    monkeypatch.setattr(loggers, patience, 0.1)
    monkeypatch.setattr(Wandb, "left", False)
    logger = Wandb(tmp_path, mode="offline")
    logger.run = Slow()
    logger.finish(exit_code=code)
    assert Wandb.left
    assert not ever.is_set() and f"wandb sync '{tmp_path}/run x'" in logger.where
    ever.set()


def test_git_commit(monkeypatch):
    """Of the code that was started, whatever is committed while it runs."""
    loggers.git_commit.cache_clear()
    prepare()
    known = (Path(__file__).parents[1] / ".git").exists()
    monkeypatch.setattr(loggers.shutil, "which", lambda name: None)
    commit = loggers.git_commit()
    assert commit is not None if known else commit is None
    assert commit is None or len(commit.removesuffix("+")) == 40
    loggers.git_commit.cache_clear()
    assert loggers.git_commit() is None
    loggers.git_commit.cache_clear()


def test_rows_wait_for_room_on_the_disk(tmp_path, capsys):
    """A limit on the size of files, which stops a write in its midst as a full disk does."""
    log = CSV(tmp_path)
    log.log_metrics({"train/objective": 1.5}, step=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 2, hard))
    try:
        log.log_metrics({"train/objective": 2.5}, step=1)
        log.log_metrics({"val/nll": 3.5}, step=1)  # a new column too
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [row["step"] for row in csv.DictReader(log.path.open())] == ["0"]
    assert capsys.readouterr().err.count("wait for room") == 1
    log.log_metrics({"train/objective": 4.5}, step=2)
    rows = list(csv.DictReader(log.path.open()))
    assert [row["step"] for row in rows] == ["0", "1", "1", "2"]
    assert rows[2]["val/nll"] == "3.5" and log.rows == 4


def test_a_run_goes_on_in_its_own_wandb_run(tmp_path, monkeypatch):
    ids, written = [], []
    write = loggers.replace_text
    monkeypatch.setattr(loggers, "replace_text", lambda *a: (written.append(a[0].name), write(*a)))
    for _ in range(2):
        log = Wandb(tmp_path, mode="offline")
        log.log_hyperparams({})
        ids.append(log.version)
        log.finish()
    assert ids[0] == ids[1] == (tmp_path / "wandb_id.txt").read_text().strip()
    assert written == ["wandb_id.txt"] * 2  # a killed run leaves no half of an id


def test_an_evaluation_has_a_wandb_run_of_its_own_beside_the_trained_one(tmp_path, monkeypatch):
    import wandb

    asked = []
    init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **given: (asked.append(given), init(**given))[1])

    def opened(*evaluates):
        log = Wandb(tmp_path, name="mine", mode="offline")
        for name in evaluates:
            log.evaluates(name)
        log.log_hyperparams({})
        identity = log.version
        log.finish()
        return identity, asked[-1]

    trained, _ = opened()
    ode, again, other = (opened(name) for name in ("ode of best", "ode of best", "bound of last"))
    assert (tmp_path / "wandb_id.txt").read_text().strip() == trained
    for identity, given in (ode, again, other):
        assert given["group"] == trained and given["job_type"] == "evaluate"
        assert identity.startswith(f"{trained}-")
    assert ode[1]["name"] == "mine, ode of best"
    assert ode[0] == again[0] != other[0]  # the same number again replaces itself
