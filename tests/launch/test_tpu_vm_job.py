"""Cloud TPU VM launcher: the whole life of a job against fake cloud programs."""

import signal
import sys
import tarfile

import pytest

from gemma_encoder.launch import command, tpu_vm
from tests.launch.conftest import launcher_arguments, request_state, worker_reports

DELETE = (
    "gcloud compute tpus queued-resources delete first "
    "--project=my-project --zone=us-west4-a --force --quiet"
)


def count(cloud, *words: str) -> int:
    """Returns the number of calls that contain all words."""
    return len(cloud.calls(*words))


def test_undisturbed_run(healthy_vms, repository, capsys, launch):
    assert launch(tpu_vm, launcher_arguments()) == 0
    verbs = [call[4] if "queued-resources" in call else call[0] for call in healthy_vms.calls()]
    assert verbs == [
        "plan",
        "create",
        "describe",
        "describe",
        "describe",
        "scp",
        "ssh",
        "ssh",
        "delete",
    ]
    assert "host-3: step 1" in capsys.readouterr().out
    assert "host-3: step 1" in (repository / "runs/launch/first.log").read_text()
    with tarfile.open(repository / "runs/launch/first.tar.gz") as archive:
        assert "experiments/tiny.py" in archive.getnames()


def test_keep_leaves_machines_and_prints_the_delete_command(healthy_vms, capsys, launch):
    assert launch(tpu_vm, launcher_arguments("--keep")) == 0
    assert count(healthy_vms, "delete") == 0
    assert DELETE in capsys.readouterr().err


def test_plan_that_does_not_fit_costs_nothing(healthy_vms, capsys, launch):
    healthy_vms.plan_fails(1)
    assert launch(tpu_vm, launcher_arguments()) == 2
    assert "gemma-encoder plan exited with 1" in capsys.readouterr().err
    assert count(healthy_vms, "gcloud") == 0
    assert launch(tpu_vm, launcher_arguments("--skip_plan")) == 0


def test_refused_request_deletes_nothing(healthy_vms, capsys, launch):
    """It may be refused because another user's run has the name."""
    healthy_vms.rule(
        "queued-resources create",
        {"code": 1, "err": "ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUV5s' has been exceeded.\n"},
    )
    assert launch(tpu_vm, launcher_arguments()) == 1
    assert "Quota limit" in capsys.readouterr().out
    assert count(healthy_vms, "create") == 1
    assert count(healthy_vms, "delete") == 0


def test_late_quota_error_is_reported_and_request_deleted(healthy_vms, capsys, launch):
    healthy_vms.rule(
        "queued-resources describe",
        request_state("ACCEPTED"),
        request_state("FAILED", "Quota exceeded for TPUs"),
    )
    assert launch(tpu_vm, launcher_arguments()) == 1
    assert "FAILED: Quota exceeded for TPUs" in capsys.readouterr().err
    assert count(healthy_vms, "create") == count(healthy_vms, "delete") == 1
    assert count(healthy_vms, "ssh") == 0


def test_run_resumes_after_two_preemptions(healthy_vms, launch):
    """One preemption comes with SIGTERM, one without; all commands are repeated unchanged."""
    healthy_vms.rule(
        "worker.py run",
        worker_reports("run", 75, 75, 75, 75),
        {"code": 255},
        worker_reports("run", 0, 0, 0, 0),
    )
    healthy_vms.rule(
        "queued-resources describe",
        request_state("ACTIVE"),
        request_state("ACTIVE"),
        request_state("ACTIVE"),
        request_state("SUSPENDED"),
        request_state("ACTIVE"),
    )
    assert launch(tpu_vm, launcher_arguments("--spot")) == 0
    verbs = [call[4] for call in healthy_vms.calls("queued-resources") if call[4] != "describe"]
    assert verbs == ["create", "scp", "ssh", "ssh", "delete"] * 3
    for words in ("create", "worker.py run"):
        first, second, third = healthy_vms.calls(words)
        assert first == second == third


def test_preemption_of_a_waiting_request_is_retried(healthy_vms, launch):
    healthy_vms.rule(
        "queued-resources describe",
        request_state("PROVISIONING"),
        request_state("SUSPENDED"),
        request_state("ACTIVE"),
    )
    assert launch(tpu_vm, launcher_arguments()) == 0
    assert count(healthy_vms, "create") == count(healthy_vms, "delete") == 2


def test_lost_worker_is_detected_by_a_later_poll(healthy_vms, launch):
    """The request is still active; only the second poll of the slice's own state reveals it."""
    healthy_vms.rule(
        "worker.py run",
        {**worker_reports("run", 1, 1, 1), "code": 1},
        worker_reports("run", 0, 0, 0, 0),
    )
    healthy_vms.rule(
        "tpu-vm describe", {"out": '{"state": "READY"}'}, {"out": '{"state": "PREEMPTED"}'}
    )
    assert launch(tpu_vm, launcher_arguments()) == 0
    assert count(healthy_vms, "create") == 2
    assert count(healthy_vms, "tpu-vm describe first") == 2


def test_too_many_preemptions_exit_75(healthy_vms, capsys, launch):
    healthy_vms.rule("worker.py run", worker_reports("run", 75, 75, 75, 75))
    assert launch(tpu_vm, launcher_arguments("--max_retries=2")) == 75
    assert count(healthy_vms, "create") == count(healthy_vms, "delete") == 3
    assert "resume from the last checkpoint" in capsys.readouterr().err


def test_bad_input_is_not_retried(healthy_vms, capsys, launch):
    """Holds even if other workers failed differently or were preempted."""
    healthy_vms.rule(
        "worker.py run", worker_reports("run", 1, 2, 75, 1, text="error: unknown task 'glue_sts2'")
    )
    assert launch(tpu_vm, launcher_arguments()) == 2
    for command_words in ("create", "worker.py run", "delete"):
        assert count(healthy_vms, command_words) == 1
    error = capsys.readouterr().err
    assert "unknown task 'glue_sts2'" in error
    assert "first.log" in error
    assert "gs://bucket/runs/first/metrics.jsonl" in error


def test_failure_on_healthy_machines_is_not_retried(healthy_vms, capsys, launch):
    healthy_vms.rule("worker.py run", worker_reports("run", 0, 1, 0, 0, text="loss is not finite"))
    assert launch(tpu_vm, launcher_arguments()) == 1
    assert count(healthy_vms, "worker.py run") == count(healthy_vms, "delete") == 1
    assert "loss is not finite" in capsys.readouterr().err


def test_broken_connection_is_restored_on_the_same_machines(healthy_vms, launch):
    healthy_vms.rule(
        "worker.py run",
        {**worker_reports("run", 0, 0), "code": 255},
        worker_reports("run", 0, 0, 0, 0),
    )
    assert launch(tpu_vm, launcher_arguments()) == 0
    for command_words in ("create", "scp", "delete"):
        assert count(healthy_vms, command_words) == 1
    assert count(healthy_vms, "worker.py run") == 2


def test_exit_code_0_without_reports_is_not_success(healthy_vms, launch):
    """gcloud exits with 0 if it could not reach any machine."""
    healthy_vms.rule("worker.py run", {"code": 0})
    assert launch(tpu_vm, launcher_arguments("--max_retries=1")) == 75
    healthy_vms.rule("worker.py install", worker_reports("install", 0, 0, 0))
    assert launch(tpu_vm, launcher_arguments()) == 1


def test_failed_installation_ends_the_job(healthy_vms, capsys, launch):
    healthy_vms.rule(
        "worker.py install", worker_reports("install", 0, 1, 0, 0, text="No matching distribution")
    )
    assert launch(tpu_vm, launcher_arguments()) == 1
    assert count(healthy_vms, "worker.py run") == 0
    assert count(healthy_vms, "delete") == 1
    assert "No matching distribution" in capsys.readouterr().err


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interruption_deletes_the_machines(healthy_vms, signum, launch):
    before = signal.getsignal(signum)
    healthy_vms.rule("worker.py run", {"signal": signum, "wait": 60})
    assert launch(tpu_vm, launcher_arguments()) == 128 + signum
    assert count(healthy_vms, "delete") == 1
    assert signal.getsignal(signum) == before


def test_interruption_during_the_request_deletes_it(healthy_vms, launch):
    """The request is completed first, since a partial one may exist; a refused one is not ours."""
    healthy_vms.rule("queued-resources create", {"signal": signal.SIGTERM, "wait": 0})
    assert launch(tpu_vm, launcher_arguments()) == 128 + signal.SIGTERM
    assert count(healthy_vms, "create") == count(healthy_vms, "delete") == 1
    assert count(healthy_vms, "describe") == 0
    healthy_vms.rule("queued-resources create", {"signal": signal.SIGTERM, "wait": 0, "code": 1})
    assert launch(tpu_vm, launcher_arguments()) == 128 + signal.SIGTERM
    assert count(healthy_vms, "delete") == 1


def test_second_interruption_does_not_stop_the_deletion(healthy_vms, launch):
    healthy_vms.rule("worker.py run", {"signal": signal.SIGINT, "wait": 60})
    healthy_vms.rule("queued-resources delete", {"signal": signal.SIGINT, "wait": 0})
    assert launch(tpu_vm, launcher_arguments()) == 128 + signal.SIGINT
    assert count(healthy_vms, "delete") == 1


def test_failed_deletion_is_retried_and_reported(healthy_vms, capsys, launch):
    healthy_vms.rule("queued-resources delete", {"code": 1}, {"code": 0})
    assert launch(tpu_vm, launcher_arguments()) == 0
    healthy_vms.rule("queued-resources delete", {"code": 1})
    assert launch(tpu_vm, launcher_arguments()) == 1
    assert f"may cost money; run: {DELETE}" in capsys.readouterr().err


def test_unreadable_state_ends_the_wait(healthy_vms, capsys, launch):
    healthy_vms.rule("queued-resources describe", {"code": 1, "err": "ERROR: PERMISSION_DENIED\n"})
    assert launch(tpu_vm, launcher_arguments()) == 1
    assert "PERMISSION_DENIED" in capsys.readouterr().err
    assert count(healthy_vms, "delete") == 1


def test_missing_gcloud_is_reported(healthy_vms, monkeypatch, capsys, launch):
    monkeypatch.setattr(tpu_vm, "QUEUED_RESOURCES", ["gcloud-is-absent"])
    assert launch(tpu_vm, launcher_arguments()) == 2
    assert "gcloud-is-absent is not on the PATH" in capsys.readouterr().err


def test_abandoned_command_is_terminated(repository, tmp_path, monkeypatch):
    """Holds even for a command that ignores SIGTERM."""
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, lambda *_: None); "
        "print('up', flush=True); time.sleep(60)"
    )
    seen = []

    def stop(text: str) -> None:
        seen.append(text)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "TERMINATION_SECONDS", 0.1)
    with pytest.raises(KeyboardInterrupt):
        command.stream([sys.executable, "-IS", "-c", stubborn], tmp_path / "log", stop)
    assert seen == ["up\n"]
