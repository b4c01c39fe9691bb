"""The state of a RayJob in words, its exit code, and the one error of its driver."""

import pytest

from dpo_ray.deploy.kubernetes.state import failure_of, last_error, state_of

MESSAGE = (
    "Job entrypoint command failed with exit code 8, last available logs (truncated to 20,000 chars):\n"
    "reference: 128/512 groups, 12.1 groups/s\n"
    "error: reference: an engine cannot load libnuma.so.1\n"
    "  -> install it: apt-get install libnuma1\n"
    "Exception ignored in: <function ObjectRef.__del__>\n"
)


def status(**values):
    return state_of({"spec": {"backoffLimit": 3}, "status": values})


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, 0),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, 75),
        ({"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded"}, 9),
        ({"jobDeploymentStatus": "ValidationFailed", "message": "spec is invalid"}, 9),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": MESSAGE}, 8),
    ],
)
def test_ends_have_exit_codes(values, code):
    state = status(**values)
    assert state.finished
    assert state.exit_code == code


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "waiting for the KubeRay operator"),
        ({"jobDeploymentStatus": "Initializing"}, "the pods start: attempt 1 of 4"),
        ({"jobDeploymentStatus": "Running", "jobStatus": "RUNNING", "failed": 1}, "runs: attempt 2 of 4"),
        (
            {"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED", "failed": 2},
            "attempt 2 of 4 failed; the operator",
        ),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "failed": 4}, "failed, after 4 attempts"),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED", "failed": 1}, "done"),
    ],
)
def test_states_are_words_with_the_attempt(values, words):
    assert str(status(**values)).startswith(words)


def test_an_end_is_the_exit_code_and_the_one_error_with_its_advice():
    assert failure_of(status(jobDeploymentStatus="Failed", message=MESSAGE)) == [
        "exit code 8: An inference engine could not start, or returned an invalid result",
        "error: reference: an engine cannot load libnuma.so.1",
        "  -> install it: apt-get install libnuma1",
    ]
    deadline = failure_of(status(jobDeploymentStatus="Failed", reason="DeadlineExceeded"))
    assert deadline == ["it ran longer than cluster.kubernetes.deadline_seconds"]
    silent = "Job entrypoint command failed with exit code 137. No logs available."
    assert failure_of(status(jobDeploymentStatus="Failed", message=silent)) == ["exit code 137: it was killed"]


def test_the_last_error_counts_and_a_traceback_ends_with_its_own():
    assert last_error("error: a\n  -> b\nmore\n\x1b[31merror: c\n    d\n  -> e\x1b[0m\nnoise") == [
        "error: c",
        "    d",
        "  -> e",
    ]
    assert last_error("Traceback:\n  File x\nValueError: y\n\n") == ["ValueError: y"]
    assert last_error("") == []
